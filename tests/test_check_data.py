"""Tests that the job `check_data` finds every unreadable image of a folder in one pass."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from singer_jax import main
from singer_jax.config import check_data
from singer_jax.data.checking import unreadable_images
from singer_jax.data.images import UnreadableImage
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN, FolderSource, Record
from tests import tiny


def config_of(folder: Path):
    config = check_data()
    config.data.source, config.data.workers = str(folder), 0
    return config


def damage(folder: Path) -> set[str]:
    """Damages three of twelve images: truncated, empty, and not an image."""
    contents = (folder / "003.jpg").read_bytes()
    for name, content in (("003", contents[:200]), ("004", b""), ("011", b"text")):
        (folder / f"{name}.jpg").write_bytes(content)
    return {str(folder / f"{name}.jpg") for name in ("003", "004", "011")}


@pytest.mark.parametrize("layout", ["flat", "classes and splits"])
def test_all_unreadable_images_are_listed_and_the_status_says_so(tmp_path, capsys, layout):
    root = tmp_path / "images"
    folders = (
        [root] if layout == "flat" else [root / f"{s}/{c}" for s in ("train", "val") for c in "ab"]
    )
    for folder in folders:
        tiny.write_images(folder, 12)
    assert main.run(config_of(root), tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob("*.txt"))
    without_test = f"{root} test: none (needed by `evaluate` only)" in capsys.readouterr().out
    assert without_test == (layout == "flat")
    bad = set().union(*map(damage, folders))
    assert main.run(config_of(root), tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert f"{len(bad)} images cannot be read" in printed.err
    listed = "".join(file.read_text() for file in (tmp_path / "out").glob("*_unreadable.txt"))
    assert {line.split(": ")[0] for line in listed.splitlines()} == bad
    assert len(listed.splitlines()) == printed.out.count("unreadable: ") == len(bad)
    assert np.asarray(Image.open(tmp_path / "out" / "images_train.png")).any()
    config = config_of(root)
    config.decode = False
    assert main.run(config, tmp_path / "counted") == 0


def test_each_image_is_read_once_and_in_order(tmp_path):
    tiny.write_images(tmp_path, 40)
    source = make_source(str(tmp_path), "", TRAIN)
    bad = damage(tmp_path)
    found = [pair for batch in unreadable_images(source) for pair in batch]
    assert [index for index, _ in found] == list(range(40))
    assert {source.describe(index) for index, reason in found if reason} == bad


def test_nothing_readable_for_a_contact_sheet_is_a_line_and_a_status(tmp_path, capsys, monkeypatch):
    """Neither an image nor a source that cannot be read stops the check of what follows."""
    for split in ("train", "val"):
        tiny.write_images(tmp_path / "i" / split, 3)
    (tmp_path / "i" / "train" / "000.jpg").write_bytes(b"no image")
    config = config_of(tmp_path / "i")
    config.images, config.decode = 1, False
    read = FolderSource.__getitem__

    def damaged(source: FolderSource, index: int) -> Record:
        if index == 0 and source.root.name == "val":
            raise UnreadableImage("damaged")
        return read(source, index)

    for number, patched in enumerate((read, damaged)):
        monkeypatch.setattr(FolderSource, "__getitem__", patched)
        out = tmp_path / f"out{number}"
        assert main.run(config, out) == 1
        printed = capsys.readouterr()
        assert printed.out.count("no contact sheet: no image can be read; first: ") == number + 1
        assert "contact sheet can be read: " in printed.err and len(printed.err.splitlines()) == 1
        assert (out / "i_test.png").is_file() == (patched is read)


def test_a_folder_without_a_readable_image_is_listed_too(tmp_path, capsys):
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image")
    assert main.run(config_of(tmp_path), tmp_path / "out") == 1
    assert "5 images cannot be read" in capsys.readouterr().err
