"""The supported image formats: one table for the search of folders and for the decoder."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os

EXTRA = "photos"
"""The extra of this package that installs decoders missing in Pillow."""


@dataclasses.dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
      readers: names of Pillow's readers.
      suffixes: endings of file names, in lower case.
      plugin: module of `EXTRA` that adds the reader; empty: Pillow includes the reader.
    """

    readers: tuple[str, ...]
    suffixes: tuple[str, ...]
    plugin: str = ""


# Pillow's other readers are for formats not used for photos; the EPS reader starts Ghostscript.
FORMATS = (
    Format(("JPEG",), (".jpg", ".jpeg", ".jpe", ".jfif")),
    Format(("PNG",), (".png",)),
    Format(("WEBP",), (".webp",)),
    Format(("BMP", "DIB"), (".bmp", ".dib")),
    Format(("GIF",), (".gif",)),
    Format(("TIFF",), (".tif", ".tiff")),
    Format(("PPM",), (".ppm", ".pgm", ".pbm", ".pnm")),
    Format(("JPEG2000",), (".jp2", ".j2k", ".jpf", ".jpx")),
    Format(("AVIF",), (".avif",)),
    Format(("HEIF",), (".heic", ".heif", ".hif"), "pillow_heif"),
    Format(("JXL",), (".jxl",), "pillow_jxl"),
)

WITH_EXTRA = frozenset(suffix for one in FORMATS if one.plugin for suffix in one.suffixes)
"""Suffixes of the formats that need `EXTRA`."""


@functools.cache
def _available() -> tuple[Format, ...]:
    """Returns the formats with an installed decoder, and adds those of `EXTRA` to Pillow."""
    found = []
    for one in FORMATS:
        if one.plugin:
            try:
                plugin = importlib.import_module(one.plugin)
            except ImportError:
                continue
            if one.plugin == "pillow_heif":
                plugin.register_heif_opener()
        found.append(one)
    return tuple(found)


@functools.cache
def readers() -> tuple[str, ...]:
    """Returns the names of the Pillow readers that are tried on a file."""
    return tuple(reader for one in _available() for reader in one.readers)


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of files that can be read, in lower case."""
    return frozenset(suffix for one in _available() for suffix in one.suffixes)


def suffix_of(name: str) -> str:
    """Returns the suffix of a file name in lower case, with its dot; empty: no suffix."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Returns whether a file name is that of an image: it has a known suffix and is not hidden."""
    return not name.startswith(".") and suffix_of(name) in suffixes()
