"""The elementwise passes of a quantized layer, each as one pass over memory, with their gradients.

Beside its convolution a quantized layer costs memory traffic: statistics of BatchNorm, normalisation, ReLU, rounding.
Two passes do it all. `sums_of_powers` reads a feature map once; `clip_round`, or `clip_round_carried` in bytes, reads
it once more and writes what the next convolution reads: normalisation and division by the step size are one
multiply-add, and clipping at an unsigned grid's lowest level, 0, is the ReLU.

Composed from torch operations each of them is three to five passes; `torch.compile` makes one loop of it
(`compile_passes`). Only these few functions are compiled, not the network: seconds instead of minutes.

Feature maps may lie in memory as [B, C, H, W] or channels-last; results but for bytes lie as the map does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instaqnas.errors import InputError

log = logging.getLogger(__name__)
CompileMode = Literal["auto", "on", "off"]
Channels = Literal["first", "last"]  # where they lie: [B, C, N] or [B, H, W, C]
SMALL = 2**15  # elements up to which a pass is not worth a compiled function's call


def clip_round(y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Levels clip(round(scale * y + shift), lowest, highest), with straight-through rounding.

    Gradients: where scale * y + shift lies inside the range, its ends included, that of the identity; outside, that of
    the end that clips.

    Args:
        y: [B, C, ...], or [1, C, ...] that all of B share.
        scale, shift: [B, C].
        lowest, highest: [B]; integers, but for what a learned range adds to their gradient.

    Returns: [B, C, ...].
    """
    rows, channels = _rows(y)
    levels = _ClipRound.apply(rows, scale, shift, lowest, highest, channels)
    return levels.permute(0, 3, 1, 2) if channels == "last" else levels.view(len(scale), *y.shape[1:])


def sums_of_powers(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`y` [B, C, ...] itself, and per image and channel the sum of its values and that of their squares, [B, C].

    Read on from the `y` that is returned: then its gradient and those of the sums are joined in one pass.
    """
    rows, channels = _rows(y)
    same, sums, squares = _SumsOfPowers.apply(rows, channels)
    return same.permute(0, 3, 1, 2) if channels == "last" else same.view(y.shape), sums, squares


def clip_round_bytes(
    y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, offset: Tensor
) -> Tensor:
    """The levels of `clip_round` plus `offset` as bytes, uint8, channels-last; for inference.

    Args:
        y: [B, C, H, W], float or int32.
        scale, shift: [B, C].
        lowest, highest, offset: [B], whole numbers; lowest + offset to highest + offset lie in 0 to 255.
    """
    levels = _run(_clip_round_bytes, y.permute(0, 2, 3, 1).contiguous(), scale, shift, lowest, highest, offset)
    return levels.permute(0, 3, 1, 2)


def clip_round_carried(
    y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor]:
    """The levels of `clip_round`, from 0 to 255, as bytes, and what carries their gradient, for bytes have none.

    Args:
        y: [B, C, H, W].
        scale, shift, lowest, highest: as in `clip_round`.

    Returns: uint8 [B, C, H, W], channels-last; a tensor of that shape in `y`'s type whose elements are all the same
    place in memory and mean nothing: whoever reads the bytes gives it their gradient.
    """
    rows = y.permute(0, 2, 3, 1).contiguous()
    carrier, levels = _ClipRoundCarried.apply(rows, scale, shift, lowest, highest)
    return levels.permute(0, 3, 1, 2), carrier.permute(0, 3, 1, 2)


def integer_depthwise(levels: Tensor, taps: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Depthwise convolution of integers, summed in 32 bits; for inference.

    Args:
        levels: uint8 [B, H, W, C], already padded.
        taps: int32 [B, kernel_size^2, C].
        kernel_size: 3.
        stride: 1 or 2.

    Returns: int32 [B, H', W', C].
    """
    if kernel_size != 3 or stride not in (1, 2):
        raise ValueError(f"expected a kernel of 3 and stride 1 or 2, got {kernel_size} and {stride}")
    return _run(_integer_depthwise_1 if stride == 1 else _integer_depthwise_2, levels, taps)


class _ClipRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, *table_and_channels: Tensor | Channels) -> Tensor:
        *table, ctx.channels = table_and_channels
        ctx.save_for_backward(y, *table)
        return _run(_clip_round, y, *table, channels=ctx.channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_clip_round_gradients(ctx, grad, ctx.channels), None


class _ClipRoundCarried(torch.autograd.Function):
    """On [B, H, W, C]."""

    @staticmethod
    def forward(ctx, y: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, *table)
        levels = _run(_clip_round_bytes, y, *table, torch.zeros_like(table[-1]))
        ctx.mark_non_differentiable(levels)
        ctx.set_materialize_grads(False)
        return torch.empty_strided(levels.shape, (0, 0, 0, 0), dtype=y.dtype, device=y.device), levels

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return _clip_round_gradients(ctx, grad, "last")


def _clip_round_gradients(ctx: Any, grad: Tensor, channels: Channels) -> tuple[Tensor | None, ...]:
    """Of y, scale, shift, lowest and highest, the last two only where they are needed."""
    y, *table = ctx.saved_tensors
    grad_y, grad_scale, grad_shift = _run(_clip_round_backward, grad, y, *table, channels=channels)
    below = above = None
    if any(ctx.needs_input_grad[3:]):
        below, above = _run(_clip_round_bounds_backward, grad, y, *table, channels=channels)
    return grad_y, grad_scale, grad_shift, below, above


class _SumsOfPowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, channels: Channels) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(y)
        ctx.channels = channels
        return y.view_as(y), *_run(_sums_of_powers, y, channels=channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_sums: Tensor, grad_squares: Tensor) -> tuple[Tensor, None]:
        return _run(
            _sums_of_powers_backward, grad_y, *ctx.saved_tensors, grad_sums, grad_squares, channels=ctx.channels
        ), None


def _rows(y: Tensor) -> tuple[Tensor, Channels]:
    """`y` [B, C, ...] as [B, C, N], or, if its channels lie last in memory, as [B, H, W, C]."""
    if y.dim() == 4 and not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last):
        return y.permute(0, 2, 3, 1), "last"
    return y.flatten(2), "first"


# --- The passes: y [B, C, N], or with `channels` last [B, H, W, C]; tables [B, C] or [B] ------------------------------


def _spread(table: Tensor, channels: Channels) -> Tensor:
    return table[:, None, None] if channels == "last" else table[:, :, None]


def _over_pixels(y: Tensor, channels: Channels) -> Tensor:
    """Sums [B, C]; of channels that lie last line by line, which the cache holds."""
    return y.sum(2).sum(1) if channels == "last" else y.sum(2)


def _position(y: Tensor, scale: Tensor, shift: Tensor, channels: Channels) -> Tensor:
    """Where `y` lies on the grid, in levels, before rounding.

    Not as a fused multiply-add, which compiled code is not: levels must not depend on what happens to be compiled.
    """
    return (y.to(scale.dtype) * _spread(scale, channels)).add_(_spread(shift, channels))


def _clipped(position: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Like `clamp`, which is several times slower with bounds that are tensors."""
    lowest, highest = (end.view(-1, *[1] * (position.dim() - 1)) for end in (lowest, highest))
    clipped = torch.maximum(position, lowest)
    return torch.minimum(clipped, highest, out=clipped)


def _clip_round(
    y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, *, channels: Channels
) -> Tensor:
    return _clipped(_position(y, scale, shift, channels).round_(), lowest, highest).to(y.dtype)


def _clip_round_backward(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, *, channels: Channels
) -> tuple[Tensor, Tensor, Tensor]:
    position = _position(y, scale, shift, channels)
    inside = _clipped(position, lowest, highest).eq_(position)  # 0 or 1
    passed = inside.mul_(grad)
    grad_y = (passed * _spread(scale, channels)).to(y.dtype)
    if len(y) < len(scale):  # shared
        grad_y = grad_y.sum(0, keepdim=True)
    return grad_y, _over_pixels(passed * y, channels), _over_pixels(passed, channels)


def _clip_round_bounds_backward(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, *, channels: Channels
) -> tuple[Tensor, Tensor]:
    position = _position(y, scale, shift, channels)
    lowest, highest = (end.view(-1, *[1] * (y.dim() - 1)) for end in (lowest, highest))
    below = torch.where(position < lowest, grad.to(scale.dtype), 0.0)
    above = torch.where(position > highest, grad.to(scale.dtype), 0.0)
    return below.flatten(1).sum(1), above.flatten(1).sum(1)


def _sums_of_powers(y: Tensor, *, channels: Channels) -> tuple[Tensor, Tensor]:
    exact = y if y.dtype == torch.float64 else y.float()
    return _over_pixels(exact, channels), _over_pixels(exact * exact, channels)


def _sums_of_powers_backward(
    grad_y: Tensor, y: Tensor, grad_sums: Tensor, grad_squares: Tensor, *, channels: Channels
) -> Tensor:
    doubled = _spread(2 * grad_squares, channels)
    through_sums = torch.addcmul(_spread(grad_sums, channels), y.to(grad_sums.dtype), doubled)
    return (grad_y + through_sums).to(y.dtype)


def _clip_round_bytes(
    y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, offset: Tensor
) -> Tensor:
    position = _position(y, scale, shift, channels="last").round_()
    return _clipped(position, lowest, highest).add_(offset[:, None, None, None]).to(torch.uint8)


def _integer_depthwise_1(levels: Tensor, taps: Tensor) -> Tensor:
    height, width = levels.shape[1] - 2, levels.shape[2] - 2
    return sum(
        levels[:, i : i + height, j : j + width].to(torch.int32) * taps[:, None, None, 3 * i + j]
        for i in range(3)
        for j in range(3)
    )


def _integer_depthwise_2(levels: Tensor, taps: Tensor) -> Tensor:
    height, width = (levels.shape[1] - 1) // 2, (levels.shape[2] - 1) // 2
    return sum(
        levels[:, i : i + 2 * height : 2, j : j + 2 * width : 2].to(torch.int32) * taps[:, None, None, 3 * i + j]
        for i in range(3)
        for j in range(3)
    )


# --- Compilation ------------------------------------------------------------------------------------------------------

_PASSES = (
    _clip_round, _clip_round_backward, _clip_round_bounds_backward, _sums_of_powers, _sums_of_powers_backward,
    _clip_round_bytes, _integer_depthwise_1, _integer_depthwise_2,
)  # fmt: skip
_compiled: dict[Callable, Callable] = {}
_insists = False


def compile_passes(mode: CompileMode) -> None:
    """Has the passes compiled for the whole process (`on`; `auto` if this machine can), or not (`off`).

    Compilation happens when a pass is first needed. If it fails, `auto` logs one line and goes on without, and the
    function that needed the pass raises InputError under `on`.
    """
    global _insists
    _compiled.clear()
    _insists = mode == "on"
    if mode != "off":
        # It warns of a CUDA toolkit without a GPU, which is nobody's mistake.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        for function in _PASSES:
            _compiled[function] = torch.compile(function, dynamic=True)


def _run(function: Callable, first: Tensor, *others: Tensor, **settings: Channels) -> Tensor | tuple[Tensor, ...]:
    compiled = _compiled.get(function)
    if compiled is None or first.numel() <= SMALL:
        return function(first, *others, **settings)
    try:
        # Compiled code is specialised to strides and to what needs a gradient: one kind of each.
        return compiled(*(tensor.detach().contiguous() for tensor in (first, *others)), **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a missing or broken compiler raises has no common base
        _give_up(error)
        return function(first, *others, **settings)


def _give_up(error: Exception) -> None:
    _compiled.clear()
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if _insists:
        raise InputError(f"runtime.compile: torch.compile does not work here: {reason}") from error
    log.info("torch.compile does not work here, quantized layers run slower: %s", reason)
