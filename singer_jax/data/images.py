"""Decoding and cropping of images on the CPU, from bytes to uint8 [size, size, 3]."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from singer_jax.data import formats
from singer_jax.errors import InputError
from singer_jax.io import limits

# A process needs up to 16 bytes per pixel of an image, decoded or resized.
_MOST_PIXELS = 2**27
LARGEST_FILE = 2**30
# A progressive JPEG may have any number of scans, each of which passes over all pixels.
_MOST_SCANNED = 2**31
_LEAST_SCAN = 10  # bytes

# Bytes of a PNG's decompressed text or colour profile, each and in total. Pillow's own limit of
# one MiB is less than image editors and generators write.
_LARGEST_PNG_CHUNK, _LARGEST_PNG_TEXT = 2**25, 2**27

Image.MAX_IMAGE_PIXELS = None  # `open_image` has its own limit, which can be raised

_ORIENTATION = 0x0112  # EXIF tag
# The Pillow operation that undoes each orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats whose readers do not apply the orientation; those of TIFF, HEIF and JPEG XL apply it.
_TURNED_HERE = ("JPEG", "MPO", "PNG", "WEBP", "AVIF")

# Pillow's rule (`reducing_gap`): reducing to no less than twice the final size is not visible.
_REDUCING_GAP = 2.0


Box = tuple[int, int, int, int]
"""Left, top, width, height."""


class UnreadableImage(Exception):
    """Raised for a file that cannot be decoded, but not for errors in later steps."""


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns every exception of Pillow's readers, which differ for damaged files, into one type."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        problem = str(error) or type(error).__name__
        if "MAX_TEXT" in problem:
            problem = (
                f"a PNG's text or colour profile is too large; {limits.FACTOR}=2 doubles the limit"
            )
        raise UnreadableImage(problem) from error


def _check_pixels(width: int, height: int) -> None:
    if problem := limits.excess(width * height, _MOST_PIXELS, f"pixels ({width} x {height})"):
        raise UnreadableImage(problem)


def open_image(stored: bytes | Path | np.ndarray, exif: bool = False) -> Image.Image:
    """Opens an image with Pillow without decoding it.

    Args:
      stored: an encoded file, its path, or uint8 pixels [height, width, 3].
      exif: True to apply the EXIF orientation.

    Raises:
      UnreadableImage: it is not an image, or it exceeds a limit of `singer_jax.io.limits`.
    """
    if isinstance(stored, np.ndarray):
        return Image.fromarray(stored)
    with _decoding():
        size = len(stored) if isinstance(stored, bytes) else limits.file_size(stored)
        if problem := limits.excess(size, LARGEST_FILE, "bytes"):
            raise ValueError(problem)
        encoded = io.BytesIO(stored) if isinstance(stored, bytes) else stored
        PngImagePlugin.MAX_TEXT_CHUNK = limits.most(_LARGEST_PNG_CHUNK)
        PngImagePlugin.MAX_TEXT_MEMORY = limits.most(_LARGEST_PNG_TEXT)
        image = Image.open(encoded, formats=formats.readers())
        _check_pixels(*image.size)
        if image.format in ("JPEG", "MPO"):
            _check_scans(image, size)
        # A JPEG inside a JPEG XL file is decoded like the original JPEG.
        if exif and (image.format in _TURNED_HERE or getattr(image, "jpeg", False)):
            turn = _TURNS.get(_orientation(image))
            image = image if turn is None else image.transpose(turn)
        if 0 in image.size:
            raise ValueError("the image has no pixels")
        return image


def _orientation(image: Image.Image) -> Any:
    """Returns the EXIF orientation, or 1 without one; other tags may be damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # EXIF may follow the pixels; raises if these are damaged
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's EXIF reader raises many types
        return 1


def _check_scans(image: Image.Image, size: int) -> None:
    """Raises `UnreadableImage` for a JPEG that would take minutes to decode."""
    pixels = image.width * image.height
    if pixels * (size // _LEAST_SCAN) <= _MOST_SCANNED:
        return
    start = image.fp.tell()
    image.fp.seek(0)
    scans = image.fp.read().count(b"\xff\xda")
    image.fp.seek(start)
    if problem := limits.excess(pixels * scans, _MOST_SCANNED, f"pixels in its {scans} scans"):
        raise UnreadableImage(problem)


def decode(image: Image.Image) -> Image.Image:
    """Decodes an image; raises `UnreadableImage` if the pixels are damaged."""
    with _decoding():
        image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts grey, CMYK, palette, alpha and 16-bit images to 8-bit RGB; alpha is dropped.

    Raises:
      UnreadableImage: the pixels are damaged, or Pillow cannot convert them.
    """
    with _decoding():
        return _to_rgb(decode(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip 16-bit grey values at 255 instead of scaling them.
        grey = np.asarray(image).astype(np.float32)
        grey *= 1 if grey.max(initial=0) <= 255 and image.mode == "F" else 255 / 65535
        np.round(grey.clip(0, 255, out=grey), out=grey)
        image = Image.fromarray(grey.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop and horizontal flip, equal to torchvision's transforms of these names.

    Attributes:
      size: side of the result in pixels.
      scale: range of the fraction of the image area that the crop covers.
      ratio: range of the crop's aspect ratio, width / height.
      flip: probability of a horizontal flip.
      fast: decode JPEGs with simplejpeg and OpenCV, and all other images with Pillow. The crop is
        interpolated to a multiple of `size` and then averaged. The result differs by about half a
        grey level from Pillow's, which equals torchvision's (benchmarks/README.md).
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    fast: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        box = random_crop(image.size, self.scale, self.ratio, rng)
        pixels = _fast_crop(image, box, self.size) if self.fast else None
        if pixels is None:
            pixels = _crop(image, box, self.size)
        if rng.random() >= self.flip:
            return pixels
        # A view would be copied pixel by pixel when a batch is assembled.
        return _opencv().flip(pixels, 1) if self.fast else pixels[:, ::-1]


def _crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    left, top, width, height = box
    shrink = _draft(image, min(width, height), size)
    corners = (left * shrink[0], top * shrink[1])
    corners += ((left + width) * shrink[0], (top + height) * shrink[1])
    crop = to_rgb(image).crop(tuple(round(side) for side in corners))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


@functools.cache
def _opencv() -> Any:
    """Returns OpenCV, set to one thread because the loader has one process per core."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def _fast_crop(image: Image.Image, box: Box, size: int) -> np.ndarray | None:
    """Returns the crop, or None if Pillow must decode the image: not a colour JPEG, or damaged."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    import simplejpeg

    left, top, width, height = box
    halved = 1  # factor; the decoder reduces the image, as `_draft` does with Pillow
    while halved < 8 and min(width, height) >= 2 * halved * _REDUCING_GAP * size:
        halved *= 2
    image.fp.seek(0)
    stored = image.fp.read()
    try:
        height_read, width_read, *_ = simplejpeg.decode_jpeg_header(stored)
        if (width_read, height_read) != image.size:
            return None
        decoded = simplejpeg.decode_jpeg(
            stored,
            min_width=-(-image.width // halved),
            min_height=-(-image.height // halved),
        )
    except ValueError:  # damaged, possibly without visible effect
        return None
    down, across = decoded.shape[0] / image.height, decoded.shape[1] / image.width
    rows = slice(round(top * down), round((top + height) * down))
    columns = slice(round(left * across), round((left + width) * across))
    crop = decoded[rows, columns]
    return _resize(crop, size)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes to a square with the smoothing of Pillow's triangle filter.

    The crop is interpolated to a multiple of the size, averaged, and blurred. The blur adds the
    variance by which the triangle filter exceeds the first two steps.
    """
    cv2 = _opencv()
    times = math.ceil(max(image.shape[:2]) / size)
    if times == 1:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    finer = cv2.resize(image, (times * size, times * size), interpolation=cv2.INTER_LINEAR)
    averaged = cv2.resize(finer, (size, size), interpolation=cv2.INTER_AREA)
    kernels = []
    for side in image.shape[:2]:
        missing = 1 / 6 - (1 - times**-2) / 12 - (size / side) ** 2 / 6
        beside = max(0.0, missing / 2)
        kernels.append(np.asarray([beside, 1 - 2 * beside, beside], np.float32))
    down, across = kernels
    if max(down[0], across[0]) < 0.01:
        return averaged
    return cv2.sepFilter2D(averaged, -1, across, down)


def random_crop(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draws left, top, width, height of a crop (torchvision `RandomResizedCrop.get_params`).

    Args:
      image_size: width and height.
      scale: range of the fraction of the area that the crop covers.
      ratio: range of the aspect ratio, width / height. After ten rejected draws, the largest
        central crop with an allowed ratio is returned.
      rng: random generator.
    """
    image_width, image_height = image_size
    for _ in range(10):
        area = image_width * image_height * rng.uniform(*scale)
        drawn = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < width <= image_width and 0 < height <= image_height:
            left = int(rng.integers(image_width - width + 1))
            top = int(rng.integers(image_height - height + 1))
            return left, top, width, height
    legal = min(max(image_width / image_height, ratio[0]), ratio[1])
    width = min(image_width, round(image_height * legal))
    height = min(image_height, round(image_width / legal))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Resize of the shorter side to int(size x 256 / 224), then a centre crop; `rng` is unused."""

    size: int

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        shorter = int(self.size * 256 / 224)
        size = resized(image.size, shorter)
        _check_pixels(*size)
        _draft(image, min(image.size), shorter)
        image = to_rgb(image)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - self.size) / 2) for side in image.size)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Returns width and height after resizing the shorter side to `shorter` (as torchvision)."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _draft(image: Image.Image, used: int, wanted: int) -> tuple[float, float]:
    """Lets the JPEG decoder reduce an image that is much larger than needed.

    Returns:
      The factors by which width and height were reduced.
    """
    width, height = image.size
    if image.format == "JPEG" and used > _REDUCING_GAP * wanted:
        factor = _REDUCING_GAP * wanted / used
        image.draft(None, (math.ceil(width * factor), math.ceil(height * factor)))
    return image.size[0] / width, image.size[1] / height
