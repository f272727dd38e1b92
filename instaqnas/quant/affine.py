"""Feature maps whose scale and shift are not applied yet.

A quantized convolution gives integer sums. Its step sizes and BatchNorm come to one scale and one shift per image and
channel. The quantizer of the next layer would divide the result by its own step size, and clipping at its lowest level,
0, is the ReLU. So a layer hands on an `Affine`, and the next quantizer does all of it in one multiply-add
(`fused.clip_round`). A reader that needs the map itself calls `value()`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """The feature map `scale * y + shift` before its ReLU, not computed yet.

    y: [B, C, H, W].
    scale, shift: [B, C], [1, C], [B, 1] or [1, 1]; both None for 1 and 0.
    known_finite: `y` holds sums of bytes, so a NaN can only be in scale or shift. Readers that make bytes of any other
        `y` have to look for one (`byte_conv.all_finite`).
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
    """The row of each image, [B, ...], from a table [K, ...] with one row per bit choice.

    Args:
        table: [K, ...]; [1, ...] if `choice` is None.
        choice: [B] indices of the K choices; None where K = 1.
        images: B.
    """
    return table.expand(images, *table.shape[1:]) if choice is None else table[choice]
