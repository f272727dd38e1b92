"""Image files: their names, headers and pixels, with EXIF orientation and 16 bits a channel."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from instaqnas.errors import InputError, warn_once

SMALL_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGE_SUFFIXES = (*SMALL_SUFFIXES, *(suffix.upper() for suffix in SMALL_SUFFIXES))
ORIENTATION_TAG = 0x0112  # of EXIF
# Turns of each EXIF orientation: quarter turns counterclockwise, then mirrored from left to right or not.
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras whose values are stored in 16 bits


class ImageHeader(NamedTuple):
    """Size in stored pixels, and the EXIF orientation: 1 upright, 2 to 8 turned or mirrored."""

    width: int
    height: int
    orientation: int

    @property
    def is_turned(self) -> bool:
        """Whether the stored picture is not upright."""
        return self.orientation != 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) in the file."""
        return self.width, self.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        quarters, _ = _TURNS.get(self.orientation, (0, False))
        return (self.height, self.width) if quarters % 2 else (self.width, self.height)


def read_header(path: Path) -> ImageHeader:
    """Size and orientation from the header of an image file.

    Raises: InputError if the file cannot be opened or is no image.
    """
    try:
        with path.open("rb") as file:
            return _parse_header(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_image(path: str | Path, orientation: Literal["stored", "upright"] = "stored") -> np.ndarray:
    """The pixels of an image file: uint8 [height, width, 3], RGB.

    `stored` ignores an EXIF orientation; `upright` applies it. Of 16 bits the upper 8 of the image's bit depth are
    kept: the least of `BIT_DEPTHS` that holds its largest value. A depth below 16 is warned of.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(encoded, flags)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except cv2.error as error:
        raise InputError(f"{path}: not a readable image") from error
    if image is None:
        raise InputError(f"{path}: not a readable image")
    if image.dtype == np.uint16:
        image = _upper_bits(image, Path(path))
    if image.dtype != np.uint8:
        raise InputError(f"{path}: expected 8 or 16 bits a channel, got {image.dtype}")
    if orientation == "upright":
        image = _upright(image, _parse_header(Path(path), io.BytesIO(encoded.tobytes())).orientation)
    return image


def _parse_header(path: Path, file: io.BufferedReader | io.BytesIO) -> ImageHeader:
    try:
        with Image.open(file) as image:
            # Not getexif: it decodes a whole PNG, and follows XMP too.
            return ImageHeader(*image.size, _orientation(image.info.get("exif", b"")))
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a readable image") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # damaged header, or huge size
        raise InputError(f"{path}: not a readable image ({error})") from error


def _orientation(exif_bytes: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or in damaged EXIF data, as image viewers do."""
    exif = Image.Exif()
    try:
        exif.load(exif_bytes)
        tag = exif.get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error):
        return 1
    return tag if tag in _TURNS else 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    quarters, mirrored = _TURNS.get(orientation, (0, False))
    turned = np.rot90(image, quarters)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


def _upper_bits(image: np.ndarray, path: Path) -> np.ndarray:
    """The upper 8 bits of the image's bit depth, uint8."""
    largest = int(image.max())
    depth = next(bits for bits in BIT_DEPTHS if largest < 2**bits)
    if depth < BIT_DEPTHS[-1]:
        # No file name: each text is shown once.
        warn_once(
            f"{path.parent}: values of 16-bit images need {depth} bits only, and are scaled from 0 to {2**depth - 1}"
        )
    return (image >> (depth - 8)).astype(np.uint8)
