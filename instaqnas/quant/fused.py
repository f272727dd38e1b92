"""The elementwise passes of a quantized layer, each one pass over memory, with their gradients.

Apart from its convolution, a quantized layer computes BatchNorm statistics, normalisation, ReLU and rounding, all bound
by memory traffic. Two passes do it: `sums_of_powers` reads a feature map once for the statistics; `clip_round`, or
`clip_round_carried` for bytes, reads it once more and writes the input of the next convolution. Normalisation and
division by the step size are one multiply-add there, and clipping at the lowest level of an unsigned grid, 0, is the
ReLU.

Composed of torch operations, each of these takes three to five passes; `torch.compile` fuses them into one loop
(`compile_passes`). Compiling these few functions takes seconds, a whole network minutes.

Feature maps may be contiguous or channels-last. Results keep the layout; bytes are always channels-last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instaqnas.bits import CompileMode
from instaqnas.errors import InputError

log = logging.getLogger(__name__)
Channels = Literal["first", "last"]  # layout of a feature map: [B, C, N] or [B, H, W, C]
Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor])  # of a pass
SMALL = 2**15  # elements up to which calling a compiled function costs more than it saves


def clip_round(y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Levels clip(round(scale * y + shift), lowest, highest), with straight-through rounding.

    Within the range, ends included, the gradient is the identity's; beyond it, it goes to the end that clips.

    Args:
        y: [B, C, ...], or [1, C, ...] shared by all of B.
        scale, shift: [B, C].
        lowest, highest: [B], with integer values.

    Returns: [B, C, ...].
    """
    rows, channels = _rows(y)
    levels = _ClipRound.apply(rows, scale, shift, lowest, highest, channels)
    return levels.permute(0, 3, 1, 2) if channels == "last" else levels.view(len(scale), *y.shape[1:])


def sums_of_powers(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`y` [B, C, ...], and the sums [B, C] of its values and of their squares per image and channel.

    Go on with the returned `y`: the backward pass then adds its gradient and the gradients of the sums in one pass.
    """
    rows, channels = _rows(y)
    same, sums, squares = _SumsOfPowers.apply(rows, channels)
    return same.permute(0, 3, 1, 2) if channels == "last" else same.view(y.shape), sums, squares


def clip_round_bytes(
    y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, offset: Tensor
) -> Tensor:
    """The levels of `clip_round` plus `offset` as bytes, uint8, channels-last; for inference.

    NaN becomes an arbitrary byte: callers check with `byte_conv.all_finite`.

    Args:
        y: [B, C, H, W], float or int32.
        scale, shift: [B, C].
        lowest, highest, offset: [B], whole numbers with 0 <= lowest + offset and highest + offset <= 255.
    """
    levels = _run(_clip_round_bytes, y.permute(0, 2, 3, 1).contiguous(), scale, shift, lowest, highest, offset)
    return levels.permute(0, 3, 1, 2)


def clip_round_carried(
    y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor]:
    """The levels of `clip_round`, from 0 to 255, as bytes, and a carrier of their gradient, since bytes have none.

    NaN becomes an arbitrary byte: callers check with `byte_conv.all_finite`.

    Args:
        y: [B, C, H, W].
        scale, shift, lowest, highest: as in `clip_round`.

    Returns: levels uint8 [B, C, H, W], channels-last; the carrier, of the same shape and `y`'s type. The carrier's
        values are meaningless (all elements share one number in memory). The function that reads the bytes passes the
        gradient of the levels to the carrier.
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
    """`clip_round` on [B, C, N] or [B, H, W, C]."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor, channels: Channels
    ) -> Tensor:
        ctx.save_for_backward(y, scale, shift, lowest, highest)
        ctx.channels = channels
        return _run(_clip_round, y, scale, shift, lowest, highest, channels=channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_clip_round_gradients(ctx, grad, ctx.channels), None


class _ClipRoundCarried(torch.autograd.Function):
    """`clip_round_carried` on [B, H, W, C]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, *table)
        levels = _run(_clip_round_bytes, y, *table, torch.zeros_like(table[-1]))
        ctx.mark_non_differentiable(levels)
        ctx.set_materialize_grads(False)
        return torch.empty_strided(levels.shape, (0, 0, 0, 0), dtype=y.dtype, device=y.device), levels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return _clip_round_gradients(ctx, grad, "last")


def _clip_round_gradients(ctx: Any, grad: Tensor, channels: Channels) -> tuple[Tensor | None, ...]:
    """Gradients of y, scale, shift, lowest and highest; the last two None unless needed."""
    y, *table = ctx.saved_tensors
    grad_y, grad_scale, grad_shift = _run(_clip_round_backward, grad, y, *table, channels=channels)
    below = above = None
    if any(ctx.needs_input_grad[3:]):
        below, above = _run(_clip_round_bounds_backward, grad, y, *table, channels=channels)
    return grad_y, grad_scale, grad_shift, below, above


class _SumsOfPowers(torch.autograd.Function):
    """`sums_of_powers` on [B, C, N] or [B, H, W, C]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, channels: Channels) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(y)
        ctx.channels = channels
        return y.view_as(y), *_run(_sums_of_powers, y, channels=channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_sums: Tensor, grad_squares: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _run(_sums_of_powers_backward, grad_y, y, grad_sums, grad_squares, channels=ctx.channels), None


def _rows(y: Tensor) -> tuple[Tensor, Channels]:
    """A view of `y` [B, C, ...]: [B, H, W, C] if it is channels-last, else [B, C, N]."""
    if y.dim() == 4 and not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last):
        return y.permute(0, 2, 3, 1), "last"
    return y.flatten(2), "first"


# --- The passes: y [B, C, N], or with `channels` last [B, H, W, C]; tables [B, C] or [B] ------------------------------


def _spread(table: Tensor, channels: Channels) -> Tensor:
    return table[:, None, None] if channels == "last" else table[:, :, None]


def _over_pixels(y: Tensor, channels: Channels) -> Tensor:
    """Sums [B, C] over pixels; channels-last line by line, so that the partial sums stay in the cache."""
    return y.sum(2).sum(1) if channels == "last" else y.sum(2)


def _position(y: Tensor, scale: Tensor, shift: Tensor, channels: Channels) -> Tensor:
    """scale * y + shift, with the product rounded before the sum.

    Not `addcmul`, which may be a fused multiply-add: compiled code is not, and levels must not depend on compilation.
    """
    return (y.to(scale.dtype) * _spread(scale, channels)).add_(_spread(shift, channels))


def _clipped(position: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`clamp`, which is several times slower with tensors as bounds."""
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
    terms = [
        levels[:, i : i + height, j : j + width].to(torch.int32) * taps[:, None, None, 3 * i + j]
        for i in range(3)
        for j in range(3)
    ]
    return reduce(torch.add, terms)


def _integer_depthwise_2(levels: Tensor, taps: Tensor) -> Tensor:
    height, width = (levels.shape[1] - 1) // 2, (levels.shape[2] - 1) // 2
    terms = [
        levels[:, i : i + 2 * height : 2, j : j + 2 * width : 2].to(torch.int32) * taps[:, None, None, 3 * i + j]
        for i in range(3)
        for j in range(3)
    ]
    return reduce(torch.add, terms)


# --- Compilation ------------------------------------------------------------------------------------------------------

_PASSES = (
    _clip_round, _clip_round_backward, _clip_round_bounds_backward, _sums_of_powers, _sums_of_powers_backward,
    _clip_round_bytes, _integer_depthwise_1, _integer_depthwise_2,
)  # fmt: skip
_compiled: dict[Callable, Callable] = {}
_insists = False


def compile_passes(mode: CompileMode) -> None:
    """Compiles the passes for the whole process (`on`; `auto`: if this machine can), or not (`off`).

    Each pass is compiled when it is first called. If that fails, `auto` logs one line and continues uncompiled; under
    `on` the call raises InputError.
    """
    global _insists
    _compiled.clear()
    _insists = mode == "on"
    if mode != "off":
        # It warns of a CUDA toolkit on a machine without a GPU, which is no error here.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        for function in _PASSES:
            _compiled[function] = torch.compile(function, dynamic=True)


def _run(function: Callable[..., Result], first: Tensor, *others: Tensor, **settings: Channels) -> Result:
    """The pass `function`, compiled if it is to be and `first` is large enough."""
    compiled = _compiled.get(function)
    if compiled is None or first.numel() <= SMALL:
        return function(first, *others, **settings)
    try:
        # Compiled code is specialised to strides and requires_grad: give it only one kind of each.
        return compiled(*(tensor.detach().contiguous() for tensor in (first, *others)), **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the errors of a missing or broken compiler have no common base
        _give_up(error)
        return function(first, *others, **settings)


def _give_up(error: Exception) -> None:
    _compiled.clear()
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if _insists:
        raise InputError(f"runtime.compile: torch.compile does not work here: {reason}") from error
    log.info("torch.compile does not work here, quantized layers run slower: %s", reason)
