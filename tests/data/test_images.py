"""Image files: formats, EXIF orientation, 16 bits a channel, and broken files."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from instaqnas.data import images
from instaqnas.errors import InputError


def test_an_image_is_read_as_rgb(tmp_path):
    blue_green_red = np.zeros((2, 3, 3), np.uint8)
    blue_green_red[..., 2] = 200
    blue_green_red[0, 0] = (10, 20, 30)
    cv2.imwrite(str(tmp_path / "a.png"), blue_green_red)
    image = images.read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert image.tolist() == [[[30, 20, 10], [200, 0, 0], [200, 0, 0]], [[200, 0, 0]] * 3]


def picture(tag: int) -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = tag
    return Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)), exif


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_upright_is_as_the_exif_orientation_says_and_stored_is_as_in_the_file(tmp_path, name, tag):
    image, exif = picture(tag)
    options = {"lossless": True} if name == "a.webp" else {"quality": 95} if name == "a.jpg" else {}
    image.convert("RGB").save(tmp_path / name, exif=exif, **options)
    saved = Image.open(tmp_path / name)
    close = {"atol": 12 if name == "a.jpg" else 0, "rtol": 0}  # two decoders of JPEG
    stored, upright = images.read_image(tmp_path / name), images.read_image(tmp_path / name, "upright")
    np.testing.assert_allclose(stored.astype(int), np.asarray(saved, int), **close)
    np.testing.assert_allclose(upright.astype(int), np.asarray(ImageOps.exif_transpose(saved), int), **close)
    header = images.read_header(tmp_path / name)
    assert (header.stored_size, header.upright_size) == (saved.size, ImageOps.exif_transpose(saved).size)
    assert header.is_turned == (tag > 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\0" * 40])
def test_damaged_exif_data_turn_nothing(tmp_path, exif):
    picture(1)[0].save(tmp_path / "a.jpg", exif=exif)
    assert images.read_header(tmp_path / "a.jpg") == (6, 4, 1)
    assert images.read_image(tmp_path / "a.jpg", "upright").shape == (4, 6, 3)


@pytest.mark.parametrize("tag", [0, 9, 77])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, tag):
    image, exif = picture(tag)
    image.save(tmp_path / "a.png", exif=exif)
    assert images.read_header(tmp_path / "a.png") == (6, 4, 1)


@pytest.mark.parametrize(
    ("values", "expected", "depth"),
    [
        ([0, 256, 65535], [0, 1, 255], None),
        ([0, 64, 16383], [0, 1, 255], 14),
        ([0, 16, 2048, 4095], [0, 1, 128, 255], 12),
        ([0, 4, 600, 1023], [0, 1, 150, 255], 10),
        ([0, 3, 255], [0, 3, 255], 8),
        ([0, 0], [0, 0], 8),
        ([0, 16384], [0, 64], None),
    ],
)
def test_sixteen_bits_are_scaled_from_the_depth_of_the_camera_with_a_warning(tmp_path, values, expected, depth):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([values], np.uint16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = images.read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert image[0].tolist() == [[value] * 3 for value in expected]
    told = (
        []
        if depth is None
        else [f"{tmp_path}: values of 16-bit images need {depth} bits only, and are scaled from 0 to {2**depth - 1}"]
    )
    assert [str(warning.message) for warning in caught] == told


def test_the_colours_of_twelve_bits_are_those_of_eight(tmp_path):
    colours = np.array([[[4095, 16, 160], [0, 2048, 800]]], np.uint16)  # blue, green, red
    cv2.imwrite(str(tmp_path / "a.png"), colours)
    with pytest.warns(UserWarning, match="12 bits"):
        assert images.read_image(tmp_path / "a.png").tolist() == [[[10, 1, 255], [50, 128, 0]]]


def test_images_of_one_folder_and_depth_are_warned_of_once(tmp_path):
    for name in "abc":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((2, 2), 4000, np.uint16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own
        for name in "abc":
            images.read_image(tmp_path / f"{name}.png")
    assert len(caught) == 1


def test_floating_point_images_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.hdr"), np.zeros((2, 2, 3), np.float32))
    (tmp_path / "a.hdr").rename(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: expected 8 or 16 bits a channel, got float32$"):
        images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0\0\0"])
def test_a_broken_image_is_named(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        images.read_image(path)
    assert str(caught.value) == f"{path}: not a readable image"


def test_an_absent_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jpg: cannot be read: No such file"):
        images.read_image(tmp_path / "gone.jpg")
