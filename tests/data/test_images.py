"""Every kind of image becomes RGB; crops are torchvision's."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from singer_jax.data.images import EvalTransform as CentreCrop
from singer_jax.data.images import (
    TrainTransform,
    UnreadableImage,
    open_image,
    random_crop,
    resized,
    to_rgb,
)
from singer_jax.io import limits

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(stored: bytes, exif: bool = False) -> np.ndarray:
    return np.asarray(to_rgb(open_image(stored, exif)))


def test_lossless_rgb_is_unchanged():
    image = Image.fromarray(RGB)
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), RGB)
    np.testing.assert_array_equal(pixels(encoded(image, "WEBP", lossless=True)), RGB)
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(RGB))), RGB)


def test_grey_palette_and_alpha_become_rgb():
    grey = Image.fromarray(RGB[..., 0])
    np.testing.assert_array_equal(pixels(encoded(grey, "PNG")), np.repeat(RGB[..., :1], 3, -1))
    palette = Image.fromarray(RGB).quantize(256)
    np.testing.assert_array_equal(
        pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB"))
    )
    alpha = np.concatenate([RGB, np.full((20, 30, 1), 128, np.uint8)], -1)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(alpha), "PNG")), RGB)


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = RGB[..., 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(
        pixels(encoded(Image.fromarray(deep), "PNG")), np.repeat(RGB[..., :1], 3, -1)
    )


def test_a_cmyk_jpeg_becomes_rgb():
    smooth = Image.fromarray(RGB).resize((90, 60), Image.Resampling.BICUBIC)
    stored = encoded(smooth.convert("CMYK"), "JPEG", quality=100)
    difference = np.abs(pixels(stored).astype(int) - np.asarray(smooth).astype(int))
    assert difference.mean() < 6  # JPEG loses a little


def test_exif_orientation_is_applied_only_where_asked():
    image = Image.fromarray(RGB)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stored = encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(stored), RGB)
    np.testing.assert_array_equal(pixels(stored, exif=True), np.rot90(RGB, -1))


def with_exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Returns a JPEG with orientation 6 and further tags: number, kind, count, four bytes."""
    entries = [(0x112, 3, 1, struct.pack("<H", 6)), *tags]
    table = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4)
    stored = encoded(Image.fromarray(RGB), "JPEG", quality=95)
    return stored[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + stored[2:]


@pytest.mark.parametrize(
    "tag",
    [
        (0x100, 8, 1, struct.pack("<h", -5)),
        (0x100, 9, 1, struct.pack("<i", -5)),
        (0x100, 2, 4, b"400\0"),
        (0x115, 8, 1, struct.pack("<h", -1)),
        (0x8769, 7, 4, b"abcd"),
    ],
)
def test_damaged_exif_tags_do_not_affect_the_orientation(tag):
    np.testing.assert_array_equal(pixels(with_exif(tag), exif=True), pixels(with_exif(), exif=True))
    assert pixels(with_exif(tag), exif=True).shape == (30, 20, 3)


def test_every_orientation_is_undone():
    image = Image.fromarray(RGB)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = encoded(image, "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))))
        np.testing.assert_array_equal(pixels(stored, exif=True), expected)


def test_text_and_profiles_of_a_png_count_under_our_limit(monkeypatch):
    """Image generators write workflows of several megabytes into the text chunks."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2**21, zip=True)
    image = Image.fromarray(RGB)
    for stored in (
        encoded(image, "PNG", pnginfo=text),
        encoded(image, "PNG", icc_profile=bytes(2**21)),
    ):
        monkeypatch.delenv(limits.FACTOR, raising=False)
        np.testing.assert_array_equal(pixels(stored), RGB)
        monkeypatch.setenv(limits.FACTOR, "0.01")
        with pytest.raises(UnreadableImage, match="SINGER_JAX_LIMITS"):
            pixels(stored)


def test_the_size_after_resizing_is_torchvisions():
    for width in range(1, 700, 3):
        for height in (*range(1, 40), 224, 255, 256, 257, 500):
            short, long = sorted((width, height))
            found = resized((width, height), 256)
            assert sorted(found) == [256, int(256 * long / short)]
            assert found == resized((height, width), 256)[::-1]


@pytest.mark.parametrize(
    "stored", [b"", b"not an image", encoded(Image.fromarray(RGB), "JPEG")[:200]]
)
def test_damaged_images_raise_what_the_loader_expects(stored):
    with pytest.raises(UnreadableImage):
        pixels(stored)


def test_transform_errors_are_not_reported_as_unreadable_images(tmp_path):
    """An error in a transform must not be reported as a hundred unreadable images."""
    image = open_image(encoded(Image.fromarray(RGB), "PNG"))
    with pytest.raises(ValueError, match="high - low"):
        TrainTransform(8, scale=(1.0, 0.1))(image, np.random.default_rng(0))


def test_the_test_transform_is_resize_and_centre_crop():
    image = Image.fromarray(RGB)
    result = CentreCrop(14)(image.copy())
    # Shorter side to int(14 x 256 / 224) = 16, the longer one to int(16 x 30 / 20) = 24.
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR))[1:15, 5:19]
    np.testing.assert_array_equal(result, expected)


def test_train_crops_have_the_wanted_area_and_ratio():
    transform = TrainTransform(8)
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(500):
        left, top, width, height = random_crop((300, 200), transform.scale, transform.ratio, rng)
        assert 0 <= left <= 300 - width and 0 <= top <= 200 - height
        areas.append(width * height / (300 * 200))
        ratios.append(width / height)
    assert min(areas) > 0.075 and max(areas) <= 1
    assert min(ratios) > 0.74 and max(ratios) < 1.35
    # Uniform in 0.08..1 (mean 0.54), but large areas fit only at few ratios.
    assert 0.3 < np.mean(areas) < 0.54


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    transform = TrainTransform(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert random_crop((300, 100), transform.scale, transform.ratio, np.random.default_rng(0)) == (
        100,
        0,
        100,
        100,
    )


def test_a_train_crop_is_the_resized_box_flipped_half_the_time():
    image = Image.fromarray(RGB)
    whole = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5)}
    plain = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    flipped = 0
    for seed in range(40):
        result = TrainTransform(8, **whole)(image.copy(), np.random.default_rng(seed))
        mirrored = np.array_equal(result, plain[:, ::-1])
        assert mirrored or np.array_equal(result, plain)
        flipped += mirrored
    assert 10 < flipped < 30
    assert TrainTransform(8, **whole, flip=0.0)(image, np.random.default_rng(1)).shape == (8, 8, 3)


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (46, 62, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-3, 4, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (90, 120), (1601, 1203), (2200, 300)])
def test_fast_crops_are_the_exact_ones_nearly(size):
    """Covers the same box and flip: enlarged, reduced, and halved by the decoder."""
    stored = encoded(photo(*size), "JPEG", quality=90)
    for seed in range(8):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        fast, exact = (
            TrainTransform(112, fast=kind)(open_image(stored), rng).astype(int)
            for kind, rng in zip((True, False), rngs, strict=True)
        )
        assert rngs[0].bit_generator.state == rngs[1].bit_generator.state
        difference = np.abs(fast - exact)
        assert difference.mean() < 1 and np.percentile(difference, 99) <= 5
        assert abs((fast - exact).mean()) < 0.5  # nothing is shifted or brighter


@pytest.mark.parametrize(
    "stored",
    [
        encoded(Image.fromarray(RGB), "PNG"),
        encoded(Image.fromarray(RGB).convert("L"), "JPEG"),
        encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
        RGB,
    ],
    ids=["png", "grey", "cmyk", "array"],
)
def test_other_formats_are_equal_with_fast_and_exact_decoding(stored):
    found = [
        TrainTransform(8, fast=fast)(open_image(stored), np.random.default_rng(0))
        for fast in (True, False)
    ]
    np.testing.assert_array_equal(*found)


def test_a_fast_crop_of_a_turned_image_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo(90, 120), "JPEG", quality=95, exif=exif)
    fast, exact = (
        TrainTransform(32, fast=kind)(open_image(turned, exif=True), np.random.default_rng(0))
        for kind in (True, False)
    )
    np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_jpeg_is_unreadable_with_fast_and_exact_decoding(kept):
    whole = encoded(photo(90, 120), "JPEG", quality=95)
    for fast in (True, False):
        opened = open_image(whole[: int(kept * len(whole))])
        with pytest.raises(UnreadableImage):
            TrainTransform(32, fast=fast)(opened, np.random.default_rng(0))


def test_large_jpegs_are_decoded_smaller_with_the_same_content():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    photo = coarse.resize((1600, 1200), Image.Resampling.BICUBIC)
    stored = encoded(photo, "JPEG", quality=95)
    for transform in (TrainTransform(64), CentreCrop(64)):
        small = transform(open_image(stored), np.random.default_rng(3)).astype(int)
        exact = transform(photo.copy(), np.random.default_rng(3)).astype(int)
        assert np.abs(small - exact).mean() < 3
    opened = open_image(stored)
    CentreCrop(64)(opened)
    assert opened.size[0] < 1600  # the decoder itself made it smaller
