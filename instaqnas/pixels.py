"""What pixel values mean to the networks; normalisation is part of them, so they all take RGB from 0 to 255."""

from __future__ import annotations

from torch import Tensor

MEAN_PIXEL, PIXEL_SCALE = 127, 128  # of the public MobileNetV1-SSD


def normalized(images: Tensor) -> Tensor:
    """About -1 to 1 for uint8 or float images from 0 to 255."""
    return (images.float() - MEAN_PIXEL) / PIXEL_SCALE
