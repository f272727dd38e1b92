"""Pixel normalisation. It is part of the networks, which all take RGB from 0 to 255."""

from __future__ import annotations

from torch import Tensor

MEAN_PIXEL, PIXEL_SCALE = 127, 128  # as in the published MobileNetV1-SSD


def normalized(images: Tensor) -> Tensor:
    """(images - 127) / 128 as float32: about -1 to 1 for uint8 or float images from 0 to 255."""
    return (images.float() - MEAN_PIXEL) / PIXEL_SCALE
