"""Integer-exact inference: a network's quantized convolutions replaced by ones that compute on integers alone.

Between the quantization of a layer's input and the one rescale behind its sums there is no float arithmetic: inputs
are 8-bit integers, weights integers of their bit-width, sums 32-bit integers. Scale and shift of the rescale are those
of the fake-quantized layer in evaluation, applied by the same operations in the same order, so the integers that enter
every layer are the same as there, as long as float32 holds the sums there exactly (below 2^24).

CPU only. Products are `torch._int_mm` on processors with 8-bit dot products, else 32-bit ones, which are slow.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from instaqnas.errors import InputError
from instaqnas.quant.fused import integer_depthwise, integer_levels
from instaqnas.quant.quantizers import Affine, as_affine, of_images
from instaqnas.quant.switchable import BitChoice, SwitchableConv2d

Network = TypeVar("Network", bound=nn.Module)
EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class InputGrid:
    """Grids of a layer's input: levels are clip(round(x / step), lowest, highest), each [K]."""

    step: Tensor
    lowest: Tensor
    highest: Tensor


class IntegerConv2d(nn.Module):
    """What `SwitchableConv2d` computes in evaluation, on integers; called like it.

    Args:
        choices: the K bit choices.
        weight: levels [K, out, in / groups, kh, kw], any integer type.
        grid: grids of the input.
        scale, shift: [K, out] float32, the rescale of the sums.
        stride, groups: as in `torch.nn.Conv2d`, `groups` 1 or the input channels; padding keeps the size.

    Raises: ValueError for other groups.
    """

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
        # Levels are stored as 8 bits with this added, which is also the padding: the zero-point.
        offset = torch.zeros_like(grid.lowest)
        if not self.is_depthwise:
            offset = torch.where(grid.highest > 127, 127 - grid.highest, offset)
            offset = torch.where(grid.lowest < -128, -128 - grid.lowest, offset)
        self.offset = offset
        taps = weight.flatten(3).transpose(2, 3).flatten(2).to(torch.int32)  # [K, out, kh * kw * in / groups]
        if self.is_depthwise:
            self.taps = taps.transpose(1, 2).contiguous()  # [K, kh * kw, channels]
        else:
            self.matrices = [IntegerMatrix(matrix) for matrix in taps]
            self.correction = offset.to(torch.int32)[:, None] * taps.sum(2, dtype=torch.int32)  # [K, out]

    def forward(self, x: Affine | Tensor, choice: Tensor | None = None) -> Affine:
        """[B, in, H, W] -> [B, out, H', W'], of which `y` are int32 sums; `choice` [B] is unused where K = 1."""
        if len(self.choices) == 1:
            choice = None
        return self.sums(self.levels(x, choice), choice)

    def levels(self, x: Affine | Tensor, choice: Tensor | None) -> Tensor:
        """The quantized input [B, H, W, in]: levels plus `offset`; int8, int16 before a depthwise convolution."""
        x = as_affine(x)
        images, channels, height, width = x.shape
        step, lowest, highest, offset = (
            of_images(table, choice, images) for table in (self.step, self.lowest, self.highest, self.offset)
        )
        step = step[:, None]
        scale = step.reciprocal() if x.scale is None else x.scale / step
        shift = torch.zeros_like(scale) if x.shift is None else x.shift / step
        rows = x.y.permute(0, 2, 3, 1).reshape(images, height * width, channels)
        tables = (table.expand(images, channels) for table in (scale, shift))
        dtype = torch.int16 if self.is_depthwise else torch.int8
        return integer_levels(rows, *tables, lowest, highest, offset, dtype).view(images, height, width, channels)

    def sums(self, levels: Tensor, choice: Tensor | None) -> Affine:
        """The convolution of `levels`, not rescaled yet."""
        images = len(levels)
        if self.kernel_size > 1:
            levels = self._padded(levels, choice)
        if self.is_depthwise:
            y = integer_depthwise(levels, of_images(self.taps, choice, images), self.kernel_size, self.stride)
        else:
            y = self._products(_patches(levels, self.kernel_size, self.stride), choice)
        scale = of_images(self.scale, choice, images)
        return Affine(y.permute(0, 3, 1, 2), scale, of_images(self.shift, choice, images))

    def _padded(self, levels: Tensor, choice: Tensor | None) -> Tensor:
        images, height, width, channels = levels.shape
        border = self.kernel_size // 2
        zero = of_images(self.offset, choice, images).to(levels.dtype).view(-1, 1, 1, 1)
        padded = zero.expand(-1, height + 2 * border, width + 2 * border, channels).contiguous()
        padded[:, border : border + height, border : border + width] = levels
        return padded

    def _products(self, patches: Tensor, choice: Tensor | None) -> Tensor:
        """Sums [B, H', W', out] of patches [B, H', W', kh * kw * in], the images of each choice in one product."""
        if choice is None:
            return self._product(patches, 0)
        y = patches.new_empty(*patches.shape[:3], self.weight.shape[1], dtype=torch.int32)
        for k in choice.unique().tolist():
            images = (choice == k).nonzero().squeeze(1)
            if len(images) == len(patches):
                return self._product(patches, k)
            y[images] = self._product(patches[images], k)
        return y

    def _product(self, patches: Tensor, k: int) -> Tensor:
        y = self.matrices[k](patches.flatten(1, 2)).view(*patches.shape[:3], -1)
        return y.sub_(self.correction[k]) if self.offset[k] else y


class IntegerMatrix:
    """A matrix [out, in] of integers of up to 13 bits, kept as the machine multiplies it exactly."""

    def __init__(self, matrix: Tensor) -> None:
        bits = exact_weight_bits()
        if bits == 0:
            self.parts = [(matrix.to(torch.int32).T, 0)]
            return
        self.parts = []
        lowest, highest = matrix.min().item(), matrix.max().item()
        shift = 0
        while lowest >> shift < -(2 ** (bits - 1)) or highest >> shift > 2 ** (bits - 1) - 1:
            shift += 1
        if shift:  # matrix = high * 2^shift + low
            self.parts.append(((matrix & (2**shift - 1)).T.to(torch.int8).contiguous(), 0))
        self.parts.append(((matrix >> shift).T.to(torch.int8).contiguous(), shift))

    def __call__(self, rows: Tensor) -> Tensor:
        """int8 rows [B, N, in] -> int32 [B, N, out]."""
        y = None
        for matrix, shift in self.parts:
            product = _int_product(rows, matrix)
            if shift:
                product = product.bitwise_left_shift_(shift)
            y = product if y is None else y.add_(product)
        return y


def _int_product(rows: Tensor, matrix: Tensor) -> Tensor:
    if matrix.dtype == torch.int8:
        return torch._int_mm(rows.flatten(0, 1), matrix).view(*rows.shape[:2], -1)
    return torch.bmm(rows.to(torch.int32), matrix.expand(len(rows), -1, -1))


@functools.cache
def exact_weight_bits() -> int:
    """Bit-width of weights up to which to use `torch._int_mm` on this machine: 8, 7, or 0 for not at all.

    Where only AVX-512 without 8-bit dot products is there, libraries may add pairs of products in 16 bits, which
    saturates; with weights of 7 bits it can not. Below AVX-512 it is a plain loop, slower than 32-bit products.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 0
    return _exact_bits()


def _exact_bits() -> int:
    ends = torch.tensor([-128, 127, -1, 1, 0, 64, -64], dtype=torch.int8)
    random = torch.Generator().manual_seed(0)

    def exact(bits: int) -> bool:
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        for rows, inner, columns in ((3, 7, 5), (64, 64, 64), (361, 512, 96), (257, 1023, 33)):
            drawn = ends[torch.randint(len(ends), (rows, inner), generator=random)]
            left = (torch.full_like(drawn, 127), torch.full_like(drawn, -128), drawn)
            drawn = ends[torch.randint(len(ends), (inner, columns), generator=random)].clamp(lowest, highest)
            right = (torch.full_like(drawn, highest), torch.full_like(drawn, lowest), drawn)
            for a in left:
                for b in right:
                    if not torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double()):
                        return False
        return True

    try:
        return next((bits for bits in (8, 7) if exact(bits)), 0)
    except RuntimeError:  # not built for this processor
        return 0


@torch.no_grad()
def integer_conv(layer: SwitchableConv2d, name: str) -> IntegerConv2d:
    """The integer form of a trained layer; `name` is for messages.

    Raises: InputError if a bit-width is 32, which has no integers, or padding would need a zero that a learned
        zero-point has moved out of the grid.
    """
    if not (layer.weight_quantizer.all_quantized and layer.input_quantizer.all_quantized):
        raise InputError(
            f"{name}: bits {list(map(list, layer.choices))}: 32 means full precision, which has no integers"
        )
    weight, weight_step = layer.weight_quantizer(layer.weight)
    step, lowest, highest = layer.input_quantizer.grid(1)
    grid = InputGrid(step.squeeze(1), lowest.expand(len(step)).clone(), highest.expand(len(step)).clone())
    if not (torch.isfinite(grid.step).all() and torch.isfinite(weight_step).all()):
        raise InputError(f"{name}: not calibrated, its step sizes are unknown")
    if layer.padding and not ((grid.lowest <= 0) & (grid.highest >= 0)).all():
        raise InputError(f"{name}: the zero-point lies outside the grid, padding has no integer")
    scale, shift = layer.folded(step * weight_step)
    tables = (table.expand(len(layer.choices), -1).contiguous() for table in (scale, shift))
    return IntegerConv2d(
        layer.choices, weight.round().to(torch.int16), grid, *tables, stride=layer.stride, groups=layer.groups
    )


def to_integer(network: Network, prefix: str = "") -> Network:
    """A copy of `network` for evaluation whose convolutions compute on integers.

    Messages name a layer by `prefix`, such as `policy.`, and its name in the network.

    Raises: InputError as `integer_conv`.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)  # noqa: FBT003
    replace_convolutions(network, {
        name: integer_conv(layer, prefix + name)
        for name, layer in network.named_modules()
        if isinstance(layer, SwitchableConv2d)
    })  # fmt: skip
    return network


def replace_convolutions(network: nn.Module, layers: dict[str, IntegerConv2d]) -> None:
    """Puts `layers` in the place of the modules of these names."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)


def _patches(levels: Tensor, kernel_size: int, stride: int) -> Tensor:
    """What each output looks at: [B, H, W, C] -> [B, H', W', kh * kw * C]."""
    if kernel_size == 1:
        return levels[:, ::stride, ::stride]
    windows = levels.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)  # [B, H', W', C, kh, kw]
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
