"""One picture gives the same pixels however it is encoded, and any shape goes through a multimodal model."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image, ImageCms
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.image_formats import HEIC_MISSING, content_type
from notellm2_ray.core.images import MIN_SIDE, check_image, decode_image, scaled_image
from tests.support.encoded_pictures import HEIC, LOSSLESS, LOSSY, encoded, seen


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_encoding_gives_the_same_pixels(name):
    check_image(LOSSLESS[name])
    assert np.array_equal(np.asarray(decode_image(LOSSLESS[name])), np.asarray(seen()))


@pytest.mark.parametrize("name", LOSSY)
def test_every_lossy_encoding_gives_nearly_the_same_pixels(name):
    check_image(LOSSY[name])
    difference = np.abs(np.asarray(decode_image(LOSSY[name]), int) - np.asarray(seen(), int))
    assert difference.mean() < 3 and np.percentile(difference, 95) < 12


def test_cmyk_goes_through_the_profile_in_the_file_and_a_broken_one_is_ignored():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    plain = decode_image(encoded(red, "TIFF")).getpixel((4, 4))
    assert decode_image(encoded(red, "TIFF", icc_profile=b"no profile")).getpixel((4, 4)) == plain == (255, 0, 0)
    # A profile for another kind of picture cannot be applied either.
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(encoded(red, "TIFF", icc_profile=wrong)).getpixel((4, 4)) == plain


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (27, 28), (5, 900), (10, 20_000), (40, 30), (900, 700)])
@pytest.mark.parametrize("most", [784, 3200, 262_144])
def test_any_shape_goes_through_a_multimodal_model(size, most):
    image = scaled_image(encoded(Image.new("RGB", size, "red"), "PNG"), most)
    assert min(image.size) >= MIN_SIDE and image.width * image.height <= most
    if min(size) >= MIN_SIDE and size[0] * size[1] <= most:
        assert image.size == size
    processed = Qwen2VLImageProcessorPil()(images=[image], return_tensors="np")
    assert processed["image_grid_thw"].prod() >= 4


def test_ordinary_pictures_keep_their_proportions():
    data = encoded(Image.new("RGB", (1600, 1200)), "PNG")
    assert scaled_image(data, 262_144).size == (591, 443)
    assert scaled_image(encoded(Image.new("RGB", (12, 9)), "PNG"), 262_144).size == (37, 28)


def test_of_a_very_long_strip_the_middle_is_read():
    strip = Image.new("RGB", (2000, 4), "white")
    strip.paste((255, 0, 0), (900, 0, 1100, 4))
    data = encoded(strip, "PNG")
    check_image(data)
    middle = decode_image(data)
    assert middle.size == (400, 4) and middle.getpixel((200, 2)) == (255, 0, 0)
    assert middle.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["TIFF", "TIFF LZW"])
def test_truncated_tiff_is_found(name):
    with pytest.raises(DataError):
        check_image(LOSSLESS[name][: int(len(LOSSLESS[name]) * 0.6)])


def test_truncated_avif_is_found_and_declared_sizes_are_checked():
    with pytest.raises(DataError):
        check_image(LOSSY["AVIF"][:-40])
    for data in (LOSSY["AVIF"], LOSSLESS["TIFF"]):
        with pytest.raises(DataError, match="declares 64 x 48 pixels"):
            check_image(data, max_pixels=3071)


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError) as caught:
        check_image(HEIC)
    assert str(caught.value) == HEIC_MISSING and "pip install 'notellm2-ray[heic]'" in HEIC_MISSING


def test_heic_with_its_package_is_read():
    heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    heif.register_heif_opener()
    data = encoded(seen(), "HEIF", quality=95)
    check_image(data)
    assert np.abs(np.asarray(decode_image(data), int) - np.asarray(seen(), int)).mean() < 3
    with pytest.raises(DataError, match="cannot be decoded|not a readable"):
        check_image(HEIC)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (LOSSLESS["PNG"], "image/png"),
        (LOSSLESS["GIF"], "image/gif"),
        (LOSSLESS["BMP"], "image/bmp"),
        (LOSSLESS["WebP"], "image/webp"),
        (LOSSLESS["TIFF"], "image/tiff"),
        (LOSSY["JPEG"], "image/jpeg"),
        (LOSSY["MPO"], "image/jpeg"),
        (LOSSY["AVIF"], "image/avif"),
        (HEIC, "image/heic"),
        (b"", "application/octet-stream"),
        (b"\0\0\0\x1cftyp", "application/octet-stream"),
    ],
)
def test_content_types(data, kind):
    assert content_type(data) == kind
