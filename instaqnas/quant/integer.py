"""Integer inference: replaces quantized convolutions by integer ones with the same results.

Inputs are bytes, weights are integers of their bit-width, and sums are 32-bit integers (or float32 of the same value).
Scale and shift of the sums come from the fake-quantized layer in evaluation mode and are applied by the same operations
in the same order. Every layer therefore receives the same integers as its fake-quantized counterpart, as long as
float32 holds the sums exactly (below 2^24).

CPU only. Convolutions use oneDNN's 8-bit dot products where available, otherwise slow 32-bit products. Integers cannot
represent NaN: networks and inputs must be finite.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.bits import BitChoice
from instaqnas.errors import InputError
from instaqnas.quant.affine import Affine, as_affine, of_images
from instaqnas.quant.byte_conv import ByteConv2d, all_finite, has_byte_products
from instaqnas.quant.convolution import by_choice, images_of_choices
from instaqnas.quant.fused import clip_round_bytes, integer_depthwise
from instaqnas.quant.switchable import SwitchableConv2d

Network = TypeVar("Network", bound=nn.Module)
EXACT_IN_FLOAT32 = 2**24  # float32 holds every integer up to here


@dataclass(frozen=True)
class InputGrid:
    """Grids of a layer's input: level = clip(round(x / step), lowest, highest), each [K]."""

    step: Tensor
    lowest: Tensor
    highest: Tensor


class IntegerConv2d(nn.Module):
    """Integer counterpart of a `SwitchableConv2d` in evaluation mode, with the same call signature.

    Args:
        choices: the K bit choices.
        weight: levels [K, out, in / groups, kh, kw], any integer type.
        grid: grids of the input.
        scale, shift: [K, out] float32, finite: the rescale of the sums.
        stride, groups: as in `torch.nn.Conv2d`, `groups` 1 or the input channels; padding keeps the size.

    Raises: ValueError for other groups.
    """

    weight: Tensor
    step: Tensor
    lowest: Tensor
    highest: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        choices: Sequence[BitChoice],
        weight: Tensor,
        grid: InputGrid,
        scale: Tensor,
        shift: Tensor,
        *,
        stride: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.choices, self.stride, self.groups = tuple(choices), stride, groups
        self.kernel_size = weight.shape[-1]
        self.is_depthwise = groups > 1
        if self.is_depthwise and weight.shape[2] != 1:
            raise ValueError(f"groups must be 1 or the input channels, got {groups}")
        self.register_buffer("weight", weight.to(torch.int16))
        self.register_buffer("step", grid.step)
        self.register_buffer("lowest", grid.lowest)
        self.register_buffer("highest", grid.highest)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        # Bytes are levels plus this offset, so it is the byte of 0, with which maps are padded.
        self.offset = -grid.lowest

    @cached_property
    def byte_convs(self) -> list[ByteConv2d]:
        """The convolution of each choice, for CPUs with byte products."""
        padding = self.kernel_size // 2
        return [
            ByteConv2d(self.weight[k], stride=self.stride, padding=padding, groups=self.groups, zero=int(zero))
            for k, zero in enumerate(self.offset.tolist())
        ]

    @cached_property
    def taps(self) -> Tensor:
        """The weights for other CPUs, int32 [K, kh * kw * in / groups, out]."""
        return self.weight.permute(0, 3, 4, 2, 1).flatten(1, 3).to(torch.int32)

    def __getstate__(self) -> dict[str, object]:
        """Leaves out tensors derived from the weight: packed weights cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("byte_convs", "taps")}

    def forward(self, x: Affine | Tensor, choice: Tensor | None = None) -> Affine:
        """[B, in, H, W] -> [B, out, H', W'] whose `y` are the integer sums; `choice` [B] is ignored where K = 1.

        Raises: ValueError as `levels`.
        """
        if len(self.choices) == 1:
            choice = None
        return self.sums(self.levels(x, choice), choice)

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.weight.shape[1]

    def add_to_output(self, change: Tensor) -> None:
        """Adds `change` [out] to the outputs from now on."""
        self.shift += change.to(self.shift)

    def levels(self, x: Affine | Tensor, choice: Tensor | None) -> Tensor:
        """The quantized input [B, in, H, W], channels-last: levels plus `offset`, uint8.

        Raises: ValueError if `x` is not finite. Outputs of integer layers are finite and not checked.
        """
        x = as_affine(x)
        if not x.known_finite and not all_finite(*(part for part in (x.y, x.scale, x.shift) if part is not None)):
            raise ValueError("the input has NaN or infinite values, which have no integers")
        images, channels = x.shape[:2]
        step, *ends = (
            of_images(table, choice, images) for table in (self.step, self.lowest, self.highest, self.offset)
        )
        step = step[:, None]
        scale = step.reciprocal() if x.scale is None else x.scale / step
        shift = torch.zeros_like(scale) if x.shift is None else x.shift / step
        return clip_round_bytes(x.y, scale.expand(images, channels), shift.expand(images, channels), *ends)

    def sums(self, levels: Tensor, choice: Tensor | None) -> Affine:
        """The convolution of `levels` before the rescale; `y` is float32 with byte products, else int32."""
        images = images_of_choices(choice)
        if has_byte_products():
            y = by_choice([levels], images, lambda part, k: self.byte_convs[k](part))
        else:
            y = by_choice([levels], images, self._sums_of_32_bits)
        scale, shift = (of_images(table, choice, len(levels)) for table in (self.scale, self.shift))
        return Affine(y, scale, shift, known_finite=True)

    def _sums_of_32_bits(self, levels: Tensor, k: int) -> Tensor:
        """int32 sums [n, out, H', W'] of n images of choice k, by 32-bit products."""
        images, taps, offset = len(levels), self.taps[k], self.offset[k].to(torch.int32)
        if self.kernel_size > 1:
            levels = F.pad(levels, [self.kernel_size // 2] * 4, value=offset.item())
        rows = levels.permute(0, 2, 3, 1)
        if self.is_depthwise:
            y = integer_depthwise(rows, taps.expand(images, -1, -1), self.kernel_size, self.stride)
        else:
            patches = _patches(rows, self.kernel_size, self.stride)
            y = torch.bmm(patches.flatten(1, 2).to(torch.int32), taps.expand(images, -1, -1))
            y = y.view(*patches.shape[:3], -1)
        return y.sub_(offset * taps.sum(0, dtype=torch.int32)).permute(0, 3, 1, 2)


@torch.no_grad()
def integer_conv(layer: SwitchableConv2d, name: str) -> IntegerConv2d:
    """The integer form of a trained layer; `name` is for messages.

    Raises: InputError if a bit-width is 32, which has no integers; if step sizes, weight or BatchNorm are not finite;
        or if the layer pads and a learned zero-point has moved 0 out of the grid.
    """
    if not (layer.weight_quantizer.all_quantized and layer.input_quantizer.all_quantized):
        raise InputError(
            f"{name}: bits {list(map(list, layer.choices))}: 32 means full precision, which has no integers"
        )
    weight, weight_step = layer.weight_quantizer(layer.weight)
    step, lowest, highest = layer.input_quantizer.grid(1)
    grid = InputGrid(step.squeeze(1), lowest.expand(len(step)).clone(), highest.expand(len(step)).clone())
    if not all_finite(grid.step, grid.lowest, grid.highest, layer.weight_quantizer.grid(1).step):
        raise InputError(f"{name}: not calibrated, its step sizes are unknown")
    scale, shift = layer.folded(step * weight_step)
    if not all_finite(layer.weight, scale, shift):
        raise InputError(f"{name}: its weight, bias or BatchNorm has NaN or infinite values")
    if layer.padding and not ((grid.lowest <= 0) & (grid.highest >= 0)).all():
        raise InputError(f"{name}: the zero-point lies outside the grid, padding has no integer")
    return IntegerConv2d(
        layer.choices,
        weight.round().to(torch.int16),
        grid,
        scale.expand(len(layer.choices), -1).contiguous(),
        shift.expand(len(layer.choices), -1).contiguous(),
        stride=layer.stride,
        groups=layer.groups,
    )


def to_integer(network: Network, prefix: str = "") -> Network:
    """A copy of `network` for evaluation whose convolutions compute on integers.

    `prefix`, such as `policy.`, precedes the names of layers in messages.

    Raises: InputError as `integer_conv`.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)  # noqa: FBT003
    layers = {
        name: integer_conv(layer, prefix + name)
        for name, layer in network.named_modules()
        if isinstance(layer, SwitchableConv2d)
    }
    replace_convolutions(network, layers)
    return network


def replace_convolutions(network: nn.Module, layers: dict[str, IntegerConv2d]) -> None:
    """Replaces the modules of `network` with these names by `layers`."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)


def _patches(levels: Tensor, kernel_size: int, stride: int) -> Tensor:
    """The receptive field of each output: [B, H, W, C] -> [B, H', W', kh * kw * C]."""
    if kernel_size == 1:
        return levels[:, ::stride, ::stride]
    windows = levels.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)  # [B, H', W', C, kh, kw]
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
