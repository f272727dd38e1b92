"""Exact convolutions of bytes, and the conditions for using them.

Levels of a quantized input behind a ReLU are whole numbers from 0 to 255. On a CPU, layers keep them as bytes: a
quarter of the memory for the backward pass. CPUs with 8-bit dot products also multiply bytes several times faster than
float32; oneDNN's sums are exact as long as float32 holds them (below 2^24).

- `keeps_bytes`: whether a layer stores the levels of its input as bytes.
- `uses_bytes`: whether it also multiplies bytes (`ByteConv2d`), rather than converting them to float32 first.
- `in_floating_point`: switches both off, for comparisons.
- `all_finite`: the check before levels become bytes, which cannot hold a NaN.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST_BYTE, HIGHEST_BYTE = -128, 127  # of a signed weight
PROBE_LAYERS = (  # in, out, kernel, stride, groups: one layer for each kernel of oneDNN that `ByteConv2d` runs
    (64, 64, 1, 1, 1),
    (33, 5, 1, 2, 1),
    (33, 5, 3, 2, 1),
    (32, 32, 3, 1, 32),
)
_bytes_are_used = True  # changed by `in_floating_point`


class ByteConv2d:
    """Exact convolution of uint8 inputs with an integer weight; requires `has_byte_products`.

    A weight of more than 8 bits is split into two int8 weights and takes two convolutions.

    Args:
        weight: [out, in / groups, kh, kw], whole numbers of up to 13 bits.
        stride, padding, groups: as in `torch.nn.Conv2d`.
        zero: zero-point of the input, which is also the padding value.
    """

    def __init__(self, weight: Tensor, *, stride: int, padding: int, groups: int, zero: int = 0) -> None:
        self.stride, self.padding, self.groups, self.zero = [stride] * 2, [padding] * 2, groups, zero
        self.is_matrix = weight.shape[2:] == (1, 1) and (stride, padding, groups) == (1, 0, 1)
        self.unscaled = torch.ones(1), torch.zeros(1, dtype=torch.int32)  # scale and zero-point of the weight
        self.parts: list[tuple[Tensor, float]] = []  # weight = sum of part * factor
        for part, factor in _byte_parts(weight):
            if self.is_matrix:
                packed = torch.ops.onednn.qlinear_prepack(part.flatten(1).contiguous(), None)
            else:
                packed = torch.ops.onednn.qconv_prepack(
                    part.contiguous(), self.unscaled[0], 1.0, zero, self.stride, self.padding, [1, 1], groups, None
                )
            self.parts.append((packed, factor))

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 [B, in, H, W] -> float32 [B, out, H', W'], both channels-last; exact below 2^24."""
        (packed, factor), *others = self.parts
        y = self._sums(x, packed)
        if not others:
            return y
        y *= factor
        for packed, factor in others:
            y.add_(self._sums(x, packed), alpha=factor)
        return y

    def _sums(self, x: Tensor, packed: Tensor) -> Tensor:
        if self.is_matrix:
            rows = channels_last_rows(x)
            y = torch.ops.onednn.qlinear_pointwise(
                rows.flatten(0, 2), 1.0, self.zero, packed, *self.unscaled, None, 1.0, 0, torch.float32, "none", [], ""
            )
            return y.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)
        return torch.ops.onednn.qconv2d_pointwise(
            x, 1.0, self.zero, packed, *self.unscaled, None, self.stride, self.padding, [1, 1], self.groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def keeps_bytes(y: Tensor) -> bool:
    """Whether a layer stores levels from 0 to 255 as bytes: if the feature map `y` is float32 on a CPU."""
    plain = y.device.type == "cpu" and y.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and _bytes_are_used


def uses_bytes() -> bool:
    """Whether fake-quantized layers multiply bytes."""
    return _bytes_are_used and has_byte_products()


@contextlib.contextmanager
def in_floating_point() -> Iterator[None]:
    """Disables bytes: fake-quantized layers store and multiply levels in floating point within the context."""
    global _bytes_are_used
    _bytes_are_used = False
    try:
        yield
    finally:
        _bytes_are_used = True


@functools.cache
def has_byte_products() -> bool:
    """Whether this CPU has 8-bit dot products and oneDNN's results are exact.

    Without them, libraries may add pairs of products in 16 bits, which saturates.
    """
    try:
        return torch.cpu._is_vnni_supported() and _products_are_exact()
    except (RuntimeError, AttributeError):  # not built for this CPU, or missing from this version of torch
        return False


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all elements of `tensors` are finite, a bool scalar on their device.

    Computed from sums, which takes one pass over memory for any layout; `isfinite` takes several. Finite values whose
    sum overflows also count as not finite; they are far beyond every quantization grid.
    """
    return torch.stack([tensor.detach().sum().isfinite() for tensor in tensors]).all()


def channels_last_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], a view."""
    return x.permute(0, 2, 3, 1)


def _byte_parts(weight: Tensor) -> list[tuple[Tensor, float]]:
    """Pairs of an int8 tensor and a factor; `weight` is the sum of their products."""
    if weight.dtype == torch.int8:
        return [(weight, 1.0)]
    weight = weight.to(torch.int32)
    lowest, highest = int(weight.min()), int(weight.max())
    shift = 0
    while lowest >> shift < LOWEST_BYTE or highest >> shift > HIGHEST_BYTE:
        shift += 1
    parts = [((weight >> shift).to(torch.int8), 2.0**shift)]
    if shift:
        parts.append(((weight & (2**shift - 1)).to(torch.int8), 1.0))
    return parts


def _products_are_exact() -> bool:
    """Whether every kernel is exact for extreme and for random weights and inputs."""
    g = torch.Generator().manual_seed(0)
    for channels, out, size, stride, groups in PROBE_LAYERS:
        padding = size // 2
        drawn = torch.randint(-128, 128, (out, channels // groups, size, size), generator=g, device="cpu")
        levels = torch.randint(256, (2, channels, 12, 13), generator=g, device="cpu")
        drawn, levels = drawn.to(torch.int8), levels.to(torch.uint8)
        for weight in (drawn, torch.full_like(drawn, LOWEST_BYTE), torch.full_like(drawn, HIGHEST_BYTE)):
            for x in (levels, torch.full_like(levels, 255)):
                for zero in (0, 128):
                    convolve = ByteConv2d(weight, stride=stride, padding=padding, groups=groups, zero=zero)
                    found = convolve(x.contiguous(memory_format=torch.channels_last)).double()
                    expected = F.conv2d(
                        x.double() - zero, weight.double(), stride=stride, padding=padding, groups=groups
                    )
                    if not torch.equal(found, expected):
                        return False
    return True
