"""Finds the images of a source that cannot be read."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from singer_jax.data.images import UnreadableImage, decode, open_image, to_rgb
from singer_jax.data.loader import map_batches
from singer_jax.data.sources import Source, Subset
from singer_jax.errors import InputError, shown

_LOG = logging.getLogger("singer_jax")
_LONGEST = 120  # bytes of a reported reason


def why_unreadable(source: Source, index: int) -> str:
    """Decodes a record's image, and its label if the label is an image.

    Returns:
      The reason why they cannot be read, or an empty string.
    """
    try:
        record = source[index]
        image = open_image(record.image, source.exif)
        image.draft("RGB", (1, 1))  # the decoder reads all data at an eighth of the size
        to_rgb(image)
        if isinstance(record.label, bytes | Path):
            decode(open_image(record.label))
    except (UnreadableImage, InputError) as error:
        return shown(str(error)) or type(error).__name__
    return ""


@dataclasses.dataclass(frozen=True)
class _Reason:
    """Returns `why_unreadable` as an array of bytes, which a loader worker can return."""

    source: Source

    def __call__(self, index: int) -> np.ndarray:
        encoded = why_unreadable(self.source, int(index)).encode()[:_LONGEST]
        return np.frombuffer(encoded.ljust(_LONGEST, b"\0"), np.uint8)


def unreadable_images(source: Source, workers: int = 0) -> Iterator[list[tuple[int, str]]]:
    """Reads every image of a source once.

    Args:
      source: source of the images.
      workers: number of decoding processes; 0: decode in a thread.

    Yields:
      Lists of up to 32 pairs of an image's index and the reason why it cannot be read, in order.
      The reason of a readable image is empty.
    """
    first = 0
    with contextlib.closing(map_batches(source, _Reason(source), 32, workers)) as batches:
        for batch in batches:
            reasons = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in batch]
            yield list(enumerate(reasons, first))
            first += len(reasons)


def readable(source: Source) -> Subset:
    """Returns the readable images of a small source, each of which is decoded here.

    Unreadable images are named in the log.

    Raises:
      InputError: no image can be read.
    """
    reasons = [why_unreadable(source, index) for index in range(len(source))]
    for index, reason in enumerate(reasons):
        if reason:
            _LOG.warning("skipping unreadable image: %s", source.describe(index))
    if all(reasons):
        raise InputError(f"none of {len(source)} images can be read; first: {source.describe(0)}")
    return Subset(source, np.flatnonzero([not reason for reason in reasons]))
