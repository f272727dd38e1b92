"""Feature maps with a pending scale and shift.

A quantized convolution produces integer sums. Its step sizes and BatchNorm fold into one scale and one shift per image
and channel. The next quantizer divides by its own step size and clips at its lowest level, 0, which is the ReLU. So a
layer returns an `Affine`, and the next quantizer applies everything in one multiply-add (`fused.clip_round`).
`value()` computes the feature map itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """The feature map `scale * y + shift`, before the ReLU, with scale and shift still to be applied.

    y: [B, C, H, W].
    scale, shift: [B, C], [1, C], [B, 1] or [1, 1]; both None for 1 and 0.
    known_finite: whether `y` is finite by construction (sums of bytes). Any other `y` must be checked with
        `byte_conv.all_finite` before it is converted to bytes.
    """

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    known_finite: bool = False

    @property
    def shape(self) -> torch.Size:
        """[B, C, H, W]."""
        return self.y.shape

    def value(self) -> Tensor:
        """The feature map [B, C, H, W], without ReLU."""
        if self.scale is None:
            return self.y
        assert self.shift is not None, "scale and shift come together"
        y = self.y.to(self.scale.dtype)  # under autocast the sums are bf16
        return y * self.scale[:, :, None, None] + self.shift[:, :, None, None]


def as_affine(x: Affine | Tensor) -> Affine:
    """`x` itself, or the tensor [B, C, H, W] with scale 1 and shift 0."""
    return x if isinstance(x, Affine) else Affine(x)


def of_images(table: Tensor, choice: Tensor | None, images: int) -> Tensor:
    """Rows [B, ...] of a per-choice table [K, ...], gathered by the choice of each image.

    Args:
        table: [K, ...]; [1, ...] if `choice` is None.
        choice: [B] indices of the K choices; None where K = 1.
        images: B.
    """
    return table.expand(images, *table.shape[1:]) if choice is None else table[choice]
