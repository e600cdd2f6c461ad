"""Image sources in the formats that are in common use."""

import hashlib
import io
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from singer_jax.data import formats
from singer_jax.data.benchmarks import open_benchmark
from singer_jax.data.images import open_image, to_rgb
from singer_jax.data.registry import make_source, summary
from singer_jax.data.sources import (
    TEST,
    TRAIN,
    DigitsSource,
    FolderSource,
    Subset,
    check_same_classes,
    evenly,
)
from singer_jax.errors import InputError
from singer_jax.settings.settings import to_dict
from singer_jax.training.resume_checks import check_same_run
from singer_jax.training.settings import DistillSettings
from tests.tiny import write_images


def test_digits_are_split_once_and_for_all():
    train, test = DigitsSource(TRAIN), DigitsSource(TEST)
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    rows = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in rows for image in test.images) < 5  # a few scans are alike
    image, label = test[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and image.max() > 200
    assert label in range(10)
    assert train.fingerprint() == DigitsSource(TRAIN).fingerprint() != test.fingerprint()


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        write_images(tmp_path / name, 3)
    source = FolderSource(str(tmp_path), TRAIN)
    assert len(source) == 6 and source.num_classes == 2
    assert [source[i].label for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert source.describe(0) == str(tmp_path / "a" / "000.jpg")
    assert source[5].image == tmp_path / "b" / "002.jpg"
    assert source.exif


def test_any_tree_of_images_works_without_labels(tmp_path):
    write_images(tmp_path, 2)
    write_images(tmp_path / "deep" / "er", 1)
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(str(tmp_path), TRAIN)
    assert len(source) == 3 and source.num_classes == 0
    assert source[0].label == -1
    assert pickle.loads(pickle.dumps(source)).describe(2) == source.describe(2)


def test_train_and_val_folders_are_splits(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("x", "y"):
            write_images(tmp_path / split / name, count)
    assert len(FolderSource(str(tmp_path), TRAIN)) == 6
    assert len(FolderSource(str(tmp_path), TEST)) == 4
    # ImageNet in its own layout: by the name of the set, EXIF ignored as torchvision does.
    imagenet = make_source("imagenet2012", str(tmp_path), TEST)
    assert (len(imagenet), imagenet.num_classes, imagenet.exif) == (4, 2, False)


def test_the_path_of_a_folder_is_a_source(tmp_path):
    write_images(tmp_path, 2)
    assert len(make_source(str(tmp_path), "", TRAIN)) == 2
    assert len(make_source("folder", str(tmp_path), TRAIN)) == 2


def test_a_changed_folder_has_another_fingerprint(tmp_path):
    write_images(tmp_path, 2)
    before = FolderSource(str(tmp_path), TRAIN).fingerprint()
    write_images(tmp_path / "more", 1)
    assert FolderSource(str(tmp_path), TRAIN).fingerprint() != before


def test_equal_fingerprints_mean_equal_labels(tmp_path):
    """Also of the same paths; the former digest counts where the labels are as before."""
    for name in "bc":
        write_images(tmp_path / "train" / name, 1)
    before = FolderSource(str(tmp_path), TRAIN)
    of_paths = hashlib.sha256(b"b/000.jpg\0c/000.jpg").hexdigest()
    assert before.former_fingerprint() == of_paths != before.fingerprint()
    (tmp_path / "train" / "a").mkdir()
    shifted = FolderSource(str(tmp_path), TRAIN)
    assert (shifted.paths == before.paths).all() and (shifted.labels != before.labels).all()
    assert shifted.fingerprint() != before.fingerprint()
    assert shifted.former_fingerprint() == shifted.fingerprint()
    (tmp_path / "train" / "a").rmdir()
    write_images(tmp_path / "train", 1)  # in no class folder: no labels
    flat = FolderSource(str(tmp_path), TRAIN)
    assert flat.former_fingerprint() == flat.fingerprint()


def test_a_run_on_a_labelled_folder_continues_from_its_former_digest():
    settings = DistillSettings()
    meta = {"data": "new", "config": to_dict(settings)}
    check_same_run(settings, Path("run"), meta, meta | {"data": "former"}, "former")
    with pytest.raises(InputError, match="trained on other images"):
        check_same_run(settings, Path("run"), meta, meta | {"data": "another"}, "former")


@pytest.mark.parametrize(
    ("name", "path", "split", "message"),
    [
        ("digitz", "", TRAIN, "unknown data.source 'digitz'; closest: digits"),
        ("folder", "", TRAIN, "data.path: empty"),
        ("folder", "{tmp}/none", TRAIN, "no folder at .*none"),
        ("folder", "{tmp}", TRAIN, "no image .* below"),
        ("folder", "{tmp}", TEST, r"no test split \(val, validation, "),
        ("imagenet2012", "{tmp}", TRAIN, "imagenet2012 is not prepared .* prepared records"),
    ],
)
def test_missing_sources_are_named(tmp_path, name, path, split, message):
    with pytest.raises(InputError, match=message):
        make_source(name, path.format(tmp=tmp_path), split)


def test_a_subset_keeps_order_and_names():
    source = DigitsSource(TEST)
    subset = Subset(source, np.array([7, 3]))
    assert len(subset) == 2 and subset.num_classes == 10
    np.testing.assert_array_equal(subset[1].image, source[3].image)
    assert subset.describe(0) == source.describe(7)
    assert subset.fingerprint() != Subset(source, np.array([3, 7])).fingerprint()


class SingerTestShapes(tfds.core.GeneratorBasedBuilder):
    """A small data set that TFDS prepares without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    NAME = "singer_test_shapes"

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (12 + number, 10), (40 * number, 0, 0)).save(buffer, "PNG")
            yield number, {"image": buffer.getvalue(), "label": number % 3}


def test_tfds_is_read_without_tensorflow(tmp_path: Path):
    builder = SingerTestShapes(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    train = make_source("singer_test_shapes", str(tmp_path), TRAIN)
    test = make_source("singer_test_shapes", str(tmp_path), TEST)
    assert (len(train), len(test), train.num_classes) == (5, 2, 3)
    own = str(tmp_path / "singer_test_shapes")
    for folder in (own, f"{own}/1.0.0"):  # as good as the data directory
        assert len(make_source("singer_test_shapes", folder, TEST)) == 2
    record = pickle.loads(pickle.dumps(train))[0]
    image = Image.open(io.BytesIO(record.image))
    assert image.size[0] - 12 == np.asarray(image)[0, 0, 0] // 40
    assert record.label == (image.size[0] - 12) % 3
    assert "validation" in test.describe(0)
    assert "tensorflow" not in sys.modules


def prepared(folder: Path, features: dict, splits: list[str]) -> str:
    """Prepares a data set with two examples per split, and returns its name."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), (200, 0, 0)).save(buffer, "PNG")
    values = {tfds.features.Image: buffer.getvalue(), tfds.features.ClassLabel: 1}
    example = {key: values.get(type(one), 5) for key, one in features.items()}
    name = f"singer_test_{len(features)}_{'_'.join([*features, *splits])}".lower()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            yield from ((number, example) for number in range(2))

    Builder.name = name
    Builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return name


IMAGE = tfds.features.Image()
CLASSES = tfds.features.ClassLabel(num_classes=3)


@pytest.mark.parametrize(
    ("features", "splits", "labels"),
    [
        ({"image": IMAGE}, ["train", "val"], 0),  # unlabelled
        ({"image": IMAGE, "number": np.int32}, ["train", "test"], 0),
        ({"picture": IMAGE, "species": CLASSES}, ["training", "testing"], 3),
        (
            {"image": IMAGE, "mask": IMAGE, "label": CLASSES, "other": CLASSES},
            ["trainval", "dev"],
            3,
        ),
        ({"image": IMAGE, "breed": CLASSES, "species": CLASSES}, ["full", "valid"], 0),
    ],
)
def test_tfds_sets_of_other_features_and_splits_are_read(tmp_path, features, splits, labels):
    name = prepared(tmp_path, features, splits)
    for split in (TRAIN, TEST):
        source = make_source(name, str(tmp_path), split)
        assert len(source) == 2 and source.num_classes == labels
        assert source[0].label == (1 if labels else -1)
        assert Image.open(io.BytesIO(source[1].image)).size == (9, 8)


@pytest.mark.parametrize(
    ("features", "splits", "message"),
    [
        ({"image": IMAGE}, ["train"], "has no test split; it has train"),
        ({"image": IMAGE}, ["odd"], "has no test split; it has odd"),
        ({"left": IMAGE, "right": IMAGE}, ["test"], "several images, left, right; one must be"),
        ({"number": np.int32}, ["test"], "no image; a feature must be called image, it has number"),
    ],
)
def test_a_feature_or_split_that_a_tfds_set_lacks_is_named(tmp_path, features, splits, message):
    name = prepared(tmp_path, features, splits)
    with pytest.raises(InputError, match=message) as found:
        make_source(name, str(tmp_path), TEST)
    assert "not prepared" not in str(found.value) and len(str(found.value)) <= 200


def test_the_test_split_numbers_the_classes_of_the_training_split(tmp_path):
    for folder in ("train/a", "train/b", "train/c", "val/a", "val/c"):
        write_images(tmp_path / folder, 2)
    train, test = (make_source("folder", str(tmp_path), split) for split in (TRAIN, TEST))
    assert [test[i].label for i in range(4)] == [0, 0, 2, 2]
    assert train.num_classes == test.num_classes == 3
    write_images(tmp_path / "val" / "d", 1)
    with pytest.raises(InputError, match="d is not a class of"):
        make_source("folder", str(tmp_path), TEST)


def labels_by_file(folder: Path, split: str) -> dict[str, int]:
    source = FolderSource(str(folder), split)
    return {
        str(source[i].image.relative_to(source.root)): source[i].label for i in range(len(source))
    }


@pytest.mark.parametrize(
    "made",
    [
        "train/.ipynb_checkpoints",
        "val/.ipynb_checkpoints",
        "train/__MACOSX",
        "train/@eaDir",
        "val/$RECYCLE.BIN",
        "train/aa",
    ],
)
@pytest.mark.parametrize("holds", ["nothing", "an image"])
def test_both_splits_number_their_classes_alike_whatever_lies_beside(tmp_path, made, holds):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        write_images(tmp_path / folder, 2)
    (tmp_path / made).mkdir()
    if holds == "an image":
        write_images(tmp_path / made, 1)
    train, test = (labels_by_file(tmp_path, split) for split in (TRAIN, TEST))
    assert test.items() <= train.items() and train["a/000.jpg"] != train["b/000.jpg"]
    if not made.endswith("/aa"):
        assert train == test and set(train.values()) == {0, 1}


def test_common_names_of_split_folders_are_recognised(tmp_path):
    for number, (train, test) in enumerate((("Train", "Val"), ("training", "validation"))):
        root = tmp_path / str(number)
        for folder in (f"{train}/a", f"{train}/b", f"{test}/a", f"{test}/b"):
            write_images(root / folder, 1)
        assert labels_by_file(root, TRAIN) == labels_by_file(root, TEST)


def test_a_test_split_beside_the_classes_is_not_trained_on(tmp_path):
    for folder in ("a", "b", "val/b"):
        write_images(tmp_path / folder, 2)
    assert set(labels_by_file(tmp_path, TRAIN)) == {
        f"{name}/00{n}.jpg" for name in "ab" for n in (0, 1)
    }
    assert labels_by_file(tmp_path, TEST) == {"b/000.jpg": 1, "b/001.jpg": 1}


def test_images_without_labels_cause_a_warning(tmp_path, caplog):
    for folder in ("train/a", "train/b", "train/empty", "val"):
        (tmp_path / folder).mkdir(parents=True)
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "train" / "b", 2)
    write_images(tmp_path / "val", 2)
    assert FolderSource(str(tmp_path), TRAIN).num_classes == 3
    assert "1 of 3 classes have no images: empty" in caplog.text
    assert FolderSource(str(tmp_path), TEST).num_classes == 0
    assert "2 of 2 images are in no class folder" in caplog.text
    write_images(tmp_path / "train", 1)
    assert FolderSource(str(tmp_path), TRAIN).num_classes == 0
    assert "1 of 5 images are in no class folder" in caplog.text


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
    for name in "abc":
        write_images(tmp_path / name, 1)
    scandir = os.scandir

    def refusing(folder: str) -> object:
        if str(folder).endswith("/b"):
            raise PermissionError("not yours")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    assert labels_by_file(tmp_path, TRAIN) == {"a/000.jpg": 0, "c/000.jpg": 2}
    assert "skipping unreadable folders: b" in caplog.text
    assert "1 of 3 classes have no images: b" in caplog.text


def test_every_listed_suffix_is_read_and_other_files_are_counted(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    kinds = {"JPEG": "jpg JPEG jpe jfif", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
    kinds |= {"TIFF": "tif TIFF", "PPM": "ppm", "JPEG2000": "jp2", "AVIF": "avif"}
    for kind, suffixes in kinds.items():
        for suffix in suffixes.split():
            image.save(tmp_path / f"{suffix}.{suffix}", kind)
    for name in ("._jpg.jpg", ".DS_Store", "Thumbs.db", "a.mov", "b.MOV", "c.heic5", "none"):
        (tmp_path / name).write_bytes(b"")
    source = FolderSource(str(tmp_path), TRAIN)
    assert len(source) == sum(len(suffixes.split()) for suffixes in kinds.values())
    for index in range(len(source)):
        assert to_rgb(open_image(source[index].image)).size == (7, 9)
    assert summary(source) == (
        f"{len(source)} images without labels (7 other files left out: hidden 3, .mov 2, "
        f".heic5 1, no suffix 1), {tmp_path}"
    )


@pytest.fixture
def no_cached_formats():
    """Clears the cache of installed formats before and after a test."""
    caches = (formats._available, formats.readers, formats.suffixes)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("installed", [False, True])
def test_formats_of_the_extra_are_listed_where_it_is_installed(
    tmp_path, monkeypatch, no_cached_formats, installed
):
    plugin = types.SimpleNamespace(register_heif_opener=lambda: None) if installed else None
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setitem(sys.modules, "pillow_jxl", plugin)
    write_images(tmp_path, 1)
    for name in ("a.HEIC", "b.jxl"):
        (tmp_path / name).write_bytes(b"")
    source = FolderSource(str(tmp_path), TRAIN)
    assert len(source) == (3 if installed else 1)
    assert ("singer-jax[photos]" in source.left_out) == (not installed)
    assert ("HEIF" in formats.readers()) == installed


def test_each_real_folder_is_listed_once_through_any_links(tmp_path):
    write_images(tmp_path / "set" / "a", 2)
    write_images(tmp_path / "elsewhere" / "deep", 1)
    links = {"set/a/again": "..", "set/up": "../..", "set/b": "../elsewhere", "set/b2": "b"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    assert set(labels_by_file(tmp_path / "set", TRAIN)) == {
        "a/000.jpg",
        "a/001.jpg",
        "b/deep/000.jpg",
    }


def test_the_path_is_the_sets_own_folder_or_the_one_that_holds_it(tmp_path):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            write_images(tmp_path / "imagenet" / split / wnid, 1)
    found = [
        [str(source[i].image) for i in range(len(source))]
        for path in (tmp_path, tmp_path / "imagenet")
        for source in (
            make_source("imagenet2012", str(path), TEST),
            open_benchmark("imagenet2012", str(path), TEST),
        )
    ]
    assert all(files == found[0] for files in found)


def test_splits_of_different_classes_are_refused():
    def split(names: str, classes: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(num_classes=classes, class_names=tuple(names))

    for fine in (("ab", 2), ("", 2), ("", 0)):
        check_same_classes(split("ab", 2), split(*fine))
        check_same_classes(split(*fine), split("ab", 2))
    with pytest.raises(InputError, match="training split has 2 classes, the test split 3"):
        check_same_classes(split("ab", 2), split("", 3))
    with pytest.raises(InputError, match="class 1 is b in the training split, c in the test split"):
        check_same_classes(split("ab", 2), split("ac", 2))


def test_evenly_chosen_records_cover_all_classes(tmp_path):
    for name in "abcd":
        write_images(tmp_path / name, 5)
    few = evenly(FolderSource(str(tmp_path), TRAIN), 8)
    assert len(few) == 8 and {few[i].label for i in range(8)} == {0, 1, 2, 3}
    assert len(evenly(few, 100)) == 8
