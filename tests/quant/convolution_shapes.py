"""Shapes of convolutions, and integers for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instaqnas.quant.byte_conv import has_byte_products

needs_bytes = pytest.mark.skipif(not has_byte_products(), reason="no fast products of bytes on this machine")
SHAPES = {  # in, out, kernel, stride, padding, groups
    "pointwise": (4, 6, 1, 1, 0, 1),
    "strided pointwise": (4, 6, 1, 2, 0, 1),
    "strided": (4, 6, 3, 2, 1, 1),
    "depthwise": (4, 4, 3, 1, 1, 4),
    "strided depthwise": (5, 5, 3, 2, 1, 5),
    "two groups": (4, 6, 3, 1, 1, 2),
    "one channel": (1, 2, 1, 1, 0, 1),
    "7x7": (3, 4, 7, 2, 3, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def levels(shape: tuple[int, ...], lowest: int, highest: int, seed: int = 0) -> Tensor:
    return torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
