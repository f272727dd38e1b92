"""LSQ+ quantizers that put weights and activations on integer-valued grids, with one step size per bit choice.

A quantizer returns the grid itself (integer values held in floating point, the zero-point already subtracted) and the
step size, apart: the layer convolves the grids and multiplies by the step sizes once. The product is that of ordinary
fake quantization, exact as long as the integer sums stay below 2^24, and what an integer machine computes.

Sources: LSQ (Esser et al., ICLR 2020), LSQ+ (Bhalgat et al., CVPR Workshops 2020). Step sizes are held as logarithms
(Jain et al., MLSys 2020, section 3.3), so no gradient can make one negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

FULL_PRECISION = 32  # as a bit-width: not quantized


def level_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest integer of a grid of `bits` bits: [-2^(b-1), 2^(b-1)-1] if signed, else [0, 2^b-1]."""
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


class _Grid(torch.autograd.Function):
    """round(clip(x / step + zero_point, lowest, highest)) - zero_point, with straight-through rounding.

    Keeps only `x` for the backward pass; composed from torch operations it would keep three copies.
    """

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, lowest: Tensor, highest: Tensor, zero_point: Tensor | None) -> Tensor:
        if zero_point is not None:  # rounded, it shifts the range and nothing else
            lowest, highest = lowest - zero_point.round(), highest - zero_point.round()
        ctx.save_for_backward(x, step, lowest, highest)
        return (x / step).round_().clamp_(lowest, highest)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, lowest, highest = ctx.saved_tensors
        inside = (x >= lowest * step) & (x <= highest * step)
        grad_x = torch.where(inside, grad / step, 0.0)
        grad_step = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            grad_step = _sum_like(grad_x, x, step).neg_() / step
        if ctx.needs_input_grad[4]:
            grad_zero_point = torch.where(inside, 0.0, -grad).sum_to_size(step.shape)
        return grad_x, grad_step, None, None, grad_zero_point


def _sum_like(a: Tensor, b: Tensor, shape_of: Tensor) -> Tensor:
    """Sum of a * b down to the shape of `shape_of`, all of whose dimensions but the first are 1."""
    dots = torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1))  # [n, 1, 1], without the product in memory
    return dots.view(-1, *shape_of.shape[1:]).sum_to_size(shape_of.shape)


def to_grid(x: Tensor, step: Tensor, lowest: Tensor, highest: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Integer-valued levels of `x`, zero-point subtracted: times `step` they are the fake-quantized `x`.

    Gradients: straight through inside the range and none outside for `x`; together with the later multiplication by
    `step` the step size gets LSQ's gradient (equation 3), the zero-point that of LSQ+ (equation 5).

    Args:
        x: [n, ...].
        step: positive, [n, 1, ...] or [1, 1, ...], as are the following.
        lowest, highest: ends of the grid before the zero-point is subtracted.
        zero_point: rounded to an integer here; None for 0.
    """
    return _Grid.apply(x, step, lowest, highest, zero_point)


class StepSizes(nn.Module):
    """Learned step sizes, one per bit choice, with what else describes the K grids.

    Args:
        bits: K bit-widths, 2 to 8, or 32 for choices that are not quantized.
        signed: whether the grids reach below zero.
        learn_zero_point: LSQ+'s zero-point per choice; only for signed inputs.

    A new module holds NaN until `initialize` has seen data: an uncalibrated layer can not yield silent nonsense.
    """

    def __init__(self, bits: Sequence[int], *, signed: bool, learn_zero_point: bool = False) -> None:
        super().__init__()
        quantized = [b != FULL_PRECISION for b in bits]
        self.any_quantized, self.all_quantized = any(quantized), all(quantized)
        ranges = torch.tensor([level_range(min(b, 8), signed=signed) for b in bits], dtype=torch.float32)
        self.register_buffer("lowest", ranges[:, 0].clone(), persistent=False)
        self.register_buffer("highest", ranges[:, 1].clone(), persistent=False)
        self.register_buffer("is_quantized", torch.tensor(quantized), persistent=False)
        if self.any_quantized:
            self.log_step = nn.Parameter(torch.full((len(bits),), math.nan))
        self.zero_point = nn.Parameter(torch.zeros(len(bits))) if learn_zero_point and self.any_quantized else None

    def steps(self, numel: int) -> Tensor:
        """Step sizes [K], 1 where not quantized; gradients scaled by 1 / sqrt(numel * highest level) (LSQ, 2.2)."""
        scale = (numel * self.highest).rsqrt()
        scaled = self.log_step * scale + (self.log_step * (1 - scale)).detach()
        return torch.where(self.is_quantized, scaled.exp(), 1.0)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """First step sizes from data: 2 * mean|x| / sqrt(highest level) (LSQ, 2.1); min-max with a zero-point."""
        if not self.any_quantized:
            return
        if self.zero_point is not None:
            low, high = torch.aminmax(x)
            step = ((high - low) / (self.highest - self.lowest)).clamp(min=1e-8)
            self.zero_point.copy_((self.lowest - low / step).round())
        else:
            step = (2 * x.abs().mean() / self.highest.sqrt()).clamp(min=1e-8)
        self.log_step.copy_(torch.where(self.is_quantized, step.log(), 0.0))


class WeightQuantizer(StepSizes):
    """Signed grids of one shared weight, one per bit choice."""

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__(bits, signed=True)

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Levels [K, *weight.shape] and step sizes [K] (None if no choice is quantized)."""
        copies = weight.expand(len(self.lowest), *weight.shape)
        if not self.any_quantized:
            return copies, None
        step = self.steps(weight.numel())
        shape = (-1,) + (1,) * weight.dim()
        levels = to_grid(copies, *(column.view(shape) for column in (step, self.lowest, self.highest)))
        if not self.all_quantized:
            levels = torch.where(self.is_quantized.view(shape), levels, copies)
        return levels, step


class ActivationQuantizer(StepSizes):
    """Grid of a layer's input, picked per image: unsigned after a ReLU, signed with a learned zero-point elsewhere."""

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed, learn_zero_point=signed)

    def forward(self, x: Tensor, choice: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Levels like x [B, ...] and step sizes [B] (None if no choice is quantized).

        `choice` [B] indexes the K choices; it may be None where there is only one, then the step sizes are [1].
        """
        if not self.any_quantized:
            return x, None
        table = [self.steps(x[0].numel()), self.lowest, self.highest]
        if self.zero_point is not None:
            table.append(self.zero_point)
        if choice is not None:
            table = [column[choice] for column in table]
        shape = (-1,) + (1,) * (x.dim() - 1)
        levels, step = to_grid(x, *(column.view(shape) for column in table)), table[0]
        if not self.all_quantized:
            on = self.is_quantized if choice is None else self.is_quantized[choice]
            levels = torch.where(on.view(shape), levels, x)
        return levels, step
