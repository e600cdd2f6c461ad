"""Search of a folder for images, with a count of the skipped files."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from singer_jax.data import formats
from singer_jax.errors import InputError, shown

# Folders that operating systems and storage devices create.
_SYSTEM_FOLDERS = (
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "lost+found",
    "system volume information",
)
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini")
_MOST_NAMES = 5  # in a message
_LONGEST_SUFFIX = 12


@dataclasses.dataclass(frozen=True)
class Listing:
    """The content of a folder.

    Attributes:
      images: paths relative to the folder, sorted.
      others: number of other files by kind: a suffix, `hidden` or `no suffix`.
      unreadable: subfolders that cannot be read.
    """

    images: list[str]
    others: collections.Counter[str]
    unreadable: list[str]

    @property
    def left_out(self) -> str:
        """Returns a description of the other files; empty if there are none."""
        total = sum(self.others.values())
        if not total:
            return ""
        kinds = [f"{kind} {count:,}" for kind, count in self.others.most_common()]
        text = f"{total:,} other files left out: {few(kinds)}"
        if formats.WITH_EXTRA & self.others.keys():
            text += f"; pip install 'singer-jax[{formats.EXTRA}]' reads .heic and .jxl"
        return text


def few(names: Iterable[str]) -> str:
    """Returns at most five names, escaped for a terminal, and the number of the others."""
    names = list(names)
    more = len(names) - _MOST_NAMES
    text = ", ".join(map(shown, names[:_MOST_NAMES]))
    return f"{text} and {more:,} more" if more > 0 else text


def is_hidden_folder(name: str) -> bool:
    """Returns whether a folder is hidden or belongs to the system, so that it is not searched."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def class_folders(root: Path) -> list[str]:
    """Returns the sorted names of the folders directly below a folder, except hidden ones.

    Raises:
      InputError: the folder cannot be read.
    """
    return sorted(entry.name for entry in _entries(root) if _is_class(entry))


def _is_class(entry: os.DirEntry[str]) -> bool:
    return not is_hidden_folder(entry.name) and _is_folder(entry)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(root: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"data.path: cannot read the folder {shown(str(root))}: {error}"
        ) from error


def list_images(root: Path, skip: Collection[str] = ()) -> Listing:
    """Searches a folder and all folders below it.

    Links to folders are followed last, and each real folder is searched once, so that a link to a
    parent folder adds nothing.

    Args:
      root: the folder.
      skip: names of folders directly below `root` that are skipped.

    Raises:
      InputError: the folder itself cannot be read.
    """
    images: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    unreadable: list[str] = []
    real_root = os.path.realpath(root)
    searched: set[str] = set()
    folders, links = [("", real_root)], collections.deque[str]()
    while folders or links:
        if folders:
            relative, real = folders.pop()
        else:
            relative = links.popleft()
            real = os.path.realpath(os.path.join(root, relative))
            if os.path.join(real_root, "").startswith(os.path.join(real, "")):
                continue  # a parent of all
        if real in searched:
            continue
        searched.add(real)
        try:
            entries = _entries(real)
        except InputError:
            if not relative:
                raise
            unreadable.append(relative)
            continue
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if _is_folder(entry):
                if is_hidden_folder(entry.name) or (not relative and entry.name in skip):
                    continue
                if entry.is_symlink():
                    links.append(path)
                else:
                    folders.append((path, os.path.join(real, entry.name)))
            elif formats.is_image(entry.name):
                images.append(path)
            else:
                others[_kind(entry.name)] += 1
    images.sort()
    return Listing(images, others, sorted(unreadable))


def _kind(name: str) -> str:
    if name.startswith(".") or name.lower() in _SYSTEM_FILES:
        return "hidden"
    suffix = formats.suffix_of(name)
    return suffix if 1 < len(suffix) <= _LONGEST_SUFFIX else "no suffix"
