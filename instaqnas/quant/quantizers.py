"""Quantizers: weights and activations on grids of integers, one grid per bit choice.

A quantizer returns levels (integers held in floating point, the zero-point already subtracted) apart from step sizes.
A layer convolves the levels and multiplies the sums by the step sizes once. That equals ordinary fake quantization,
exactly as long as the integer sums stay below 2^24, and it is what integer hardware computes.

| name       | weights | activations                                                          |
|------------|---------|----------------------------------------------------------------------|
| `lsq_plus` | LSQ     | LSQ, with a learned zero-point for inputs without a ReLU (LSQ+)      |
| `lsq`      | LSQ     | LSQ                                                                  |
| `pact`     | DoReFa  | PACT: clipped at a learned alpha                                     |
| `dorefa`   | DoReFa  | clamped to [0, 1], or to [-1, 1] for inputs without a ReLU           |

Sources: LSQ (Esser et al., ICLR 2020), LSQ+ (Bhalgat et al., CVPR Workshops 2020), PACT (Choi et al., 2018), DoReFa-Net
(Zhou et al., 2016). Step sizes and alpha are learned as logarithms, so they stay positive (Jain et al., MLSys 2020).

LSQ multiplies the gradient of a step size s by g = 1 / sqrt(numel * highest level): SGD moves s by -lr * g * dL/ds.
Under AdamW g has no effect, for it divides each gradient by its own magnitude: a step moves log s by about lr, whatever
the scale. The setting that does have an effect is `step_size_lr_factor`, which multiplies the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.bits import FULL_PRECISION, QuantizerName
from instaqnas.quant.affine import Affine, as_affine, of_images
from instaqnas.quant.byte_conv import all_finite
from instaqnas.quant.fused import clip_round, clip_round_carried

SMALLEST_STEP, LARGEST_STEP = 1e-8, 1e8  # where step sizes stop, and alpha of PACT
PACT_FIRST_ALPHA = 10.0


def level_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest integer of a grid of `bits` bits: [-2^(b-1), 2^(b-1)-1] if signed, else [0, 2^b-1].

    Raises: ValueError for a signed grid of 1 bit, which has no positive level to scale by.
    """
    if signed and bits == 1:
        raise ValueError("a signed grid needs at least 2 bits")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class Grid(NamedTuple):
    """K grids: level = clip(round(x / step), lowest, highest).

    step: [K, 1], or [K, C] per channel.
    lowest, highest: [K]; with a gradient if an end of the range is learned.
    """

    step: Tensor
    lowest: Tensor
    highest: Tensor


class Quantizer(nn.Module):
    """K grids of integers.

    Learned step sizes are NaN until `initialize` has run, so an uncalibrated layer returns NaN.

    Args:
        bits: K bit-widths, 2 to 8 (1 to 8 if not signed), or 32 for choices that are not quantized.
        signed: whether the grids have negative levels.
    """

    lowest: Tensor  # [K], as are the next two
    highest: Tensor
    is_quantized: Tensor

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__()
        quantized = [b != FULL_PRECISION for b in bits]
        self.any_quantized, self.all_quantized = any(quantized), all(quantized)
        self.signed = signed
        ranges = torch.tensor([level_range(min(b, 8), signed=signed) for b in bits], dtype=torch.float32)
        self.register_buffer("lowest", ranges[:, 0].clone(), persistent=False)
        self.register_buffer("highest", ranges[:, 1].clone(), persistent=False)
        self.register_buffer("is_quantized", torch.tensor(quantized), persistent=False)

    def grid(self, numel: int) -> Grid:
        """The K grids; choices that are not quantized have step size 1.

        `numel`: elements per step size (of activations: in one image), for LSQ's gradient scale, which only SGD heeds.
        """
        raise NotImplementedError

    def initialize(self, x: Tensor) -> None:
        """Sets learned step sizes and zero-points from data `x` like that to be quantized; may be repeated."""

    def _step_column(self, step: Tensor) -> Tensor:
        return torch.where(self.is_quantized[:, None], step, 1.0)


# --- Weights ----------------------------------------------------------------------------------------------------------


class WeightQuantizer(Quantizer):
    """Signed grids of a convolution's weight."""

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__(bits, signed=True)
        self.integers = torch.int8  # a type that holds all levels

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Levels [K, out, in / groups, kh, kw], and step sizes [K, 1] or [K, out] (None if no choice is quantized).

        `weight` is [out, in / groups, kh, kw], shared by all choices, or [K, out, ...].
        """
        weight = weight.view(-1, *weight.shape[-4:])  # [1 or K, ...]
        if not self.any_quantized:
            return weight.expand(len(self.lowest), *weight.shape[1:]), None
        levels, step = self._levels(weight)
        if not self.all_quantized:
            levels = torch.where(self.is_quantized.view(-1, 1, 1, 1, 1), levels, weight)
        return levels, step

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [K, ...] and step sizes for a weight [1 or K, ...]."""
        raise NotImplementedError


class LsqWeights(WeightQuantizer):
    """LSQ: learned step sizes, one per choice, or one per choice and output channel (`channels` > 1)."""

    log_step: nn.Parameter  # [K, channels]; only if any choice is quantized

    def __init__(self, bits: Sequence[int], channels: int = 1) -> None:
        super().__init__(bits)
        if self.any_quantized:
            self.log_step = nn.Parameter(torch.full((len(bits), channels), math.nan))

    def grid(self, numel: int) -> Grid:
        step = _lsq_step(self.log_step, _gradient_scale(numel, self.highest)[:, None])
        return Grid(self._step_column(step), self.lowest, self.highest)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        if self.any_quantized:
            magnitude = x.expand(len(self.log_step), *x.shape[-4:]).flatten(2).abs().mean(2)  # [K, out]
            if self.log_step.shape[1] == 1:
                magnitude = magnitude.mean(1, keepdim=True)
            self.log_step.copy_(_first_lsq_step(magnitude, self.highest).log())

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        step, lowest, highest = self.grid(weight[0].numel() // self.log_step.shape[1])
        scale = step.reciprocal().expand(-1, weight.shape[1])
        return clip_round(weight, scale, torch.zeros_like(scale), lowest, highest), step


class NestedWeights(WeightQuantizer):
    """Any-Precision (Yu et al., AAAI 2021): every choice uses the top bits of the widest choice's integers.

    With Q = floor(w / s) the integer of the widest choice, of B bits, a choice of b bits has q = floor(Q / 2^(B - b)).
    It stands for the middle of its interval of weights: level 2q + 1 at step size s * 2^(B - b) / 2. s is learned, one
    for all choices, or one per output channel (`channels` > 1).
    """

    half_step: Tensor  # [K], step sizes in units of s; only if any choice is quantized, as is `log_step`
    log_step: nn.Parameter  # [1, channels]

    def __init__(self, bits: Sequence[int], channels: int = 1) -> None:
        super().__init__(bits)
        self.integers = torch.int16  # -255 to 255
        quantized = [b for b in bits if b != FULL_PRECISION]
        if quantized:
            self.widest, self.narrowest = max(quantized), min(quantized)
            half_steps = [2.0 ** (self.widest - b - 1) if b != FULL_PRECISION else 1.0 for b in bits]
            self.register_buffer("half_step", torch.tensor(half_steps), persistent=False)
            self.log_step = nn.Parameter(torch.full((1, channels), math.nan))

    def grid(self, numel: int) -> Grid:
        widest = torch.tensor([level_range(self.widest, signed=True)[1]], device=self.lowest.device)
        step = _lsq_step(self.log_step, _gradient_scale(numel, widest)[:, None]) * self.half_step[:, None]
        last = 2 * self.highest + 1  # 2^b - 1
        return Grid(self._step_column(step), -last, last)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        if self.any_quantized:
            per_channel = self.log_step.shape[1] > 1
            magnitude = x.flatten(1).abs().mean(1)[None] if per_channel else x.abs().mean()[None, None]
            highest = self.highest.new_tensor([level_range(self.narrowest, signed=True)[1]])
            step = _first_lsq_step(magnitude, highest) / 2 ** (self.widest - self.narrowest)
            self.log_step.copy_(step.log())

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        step, lowest, highest = self.grid(weight[0].numel() // self.log_step.shape[1])
        # Step sizes differ by exact powers of two, so the floors are nested to the last bit.
        position = weight / step[..., None, None, None]
        lowest, highest = lowest.view(-1, 1, 1, 1, 1), highest.view(-1, 1, 1, 1, 1)
        passed = position.clamp(lowest, highest)
        levels = (2 * (position / 2).floor() + 1).clamp(lowest, highest)
        return levels.detach() + (passed - passed.detach()), step  # straight-through


class DoReFaWeights(WeightQuantizer):
    """DoReFa: tanh(w) / max|tanh(w)| mapped to [0, 1], rounded to one of 2^b levels, mapped back to [-1, 1].

    Levels are the odd integers from -(2^b - 1) to 2^b - 1. The step size includes the maximum (no gradient), so that
    layers without BatchNorm keep their range.
    """

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__(bits)
        self.integers = torch.int16  # -255 to 255

    def grid(self, numel: int) -> Grid:
        last = 2 * self.highest + 1  # 2^b - 1
        return Grid(self._step_column(last.reciprocal()[:, None]), -last, last)

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        step, _, last = self.grid(1)
        squashed = weight.tanh()
        largest = squashed.detach().abs().amax((1, 2, 3, 4), keepdim=True).clamp(min=SMALLEST_STEP)
        half = (last / 2)[:, None].expand(-1, weight.shape[1])
        index = clip_round(squashed / largest, half, half, torch.zeros_like(last), last)
        scale = torch.where(self.is_quantized, largest.flatten(), 1.0)
        return 2 * index - last.view(-1, 1, 1, 1, 1), step * scale[:, None]


# --- Activations ------------------------------------------------------------------------------------------------------


class ActivationQuantizer(Quantizer):
    """Grids of a layer's input, one per image by its choice; an unsigned grid also applies the ReLU."""

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        self.has_bytes = self.all_quantized and not signed  # all levels are 0 to 255

    def forward(self, x: Affine | Tensor, choice: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Levels of `x` [B, C, H, W], and step sizes [K] (None if no choice is quantized).

        `choice` [B] are indices of the K choices; None where K = 1.
        """
        x = as_affine(x)
        if not self.any_quantized:
            return self._unquantized(x), None
        tables, step = self._tables(x, choice)
        levels = clip_round(x.y, *tables)
        if not self.all_quantized:
            on = of_images(self.is_quantized, choice, len(x.y))
            levels = torch.where(on.view(-1, 1, 1, 1), levels, self._unquantized(x))
        return levels, step

    def byte_levels(self, x: Affine, choice: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` for `has_bytes`: levels uint8 [B, C, H, W], channels-last; their carrier; step sizes [K].

        See `clip_round_carried`. Bytes hold no NaN: if `x` is not finite, all step sizes, and so all outputs, are NaN.
        """
        tables, step = self._tables(x, choice)
        checked = tables[:2] if x.known_finite else [*tables[:2], x.y]
        levels, carrier = clip_round_carried(x.y, *tables)
        return levels, carrier, torch.where(all_finite(*checked), step, torch.nan)

    def _tables(self, x: Affine, choice: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Arguments of `clip_round` (scale and shift [B, C], ends [B]), and the step sizes [K]."""
        images, channels = x.shape[:2]
        step, *ends = self.grid(x.y[0].numel())
        own_step = of_images(step, choice, images)  # [B, 1]
        scale = own_step.reciprocal() if x.scale is None else x.scale / own_step
        shift = torch.zeros_like(scale) if x.shift is None else x.shift / own_step
        tables = [table.expand(images, channels) for table in (scale, shift)]
        return [*tables, *(of_images(end, choice, images) for end in ends)], step.squeeze(1)

    def _unquantized(self, x: Affine) -> Tensor:
        return x.value() if self.signed else F.relu(x.value())


class LsqActivations(ActivationQuantizer):
    """LSQ: a learned step size per choice."""

    log_step: nn.Parameter  # [K]; only if any choice is quantized

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        if self.any_quantized:
            self.log_step = nn.Parameter(torch.full((len(bits),), math.nan))

    def grid(self, numel: int) -> Grid:
        step = _lsq_step(self.log_step, _gradient_scale(numel, self.highest))[:, None]
        return Grid(self._step_column(step), self.lowest, self.highest)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        if self.any_quantized:
            self.log_step.copy_(_first_lsq_step(x.abs().mean()[None, None], self.highest).log().squeeze(1))


class LsqPlusActivations(LsqActivations):
    """LSQ+: LSQ, and for signed inputs a learned zero-point per choice; their first grid spans minimum to maximum."""

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        self.zero_point = nn.Parameter(torch.zeros(len(bits))) if signed and self.any_quantized else None

    def grid(self, numel: int) -> Grid:
        step, lowest, highest = super().grid(numel)
        if self.zero_point is None:
            return Grid(step, lowest, highest)
        zero_point = _with_gradient_scale(self.zero_point, _gradient_scale(numel, self.highest))
        zero_point = zero_point + (zero_point.round() - zero_point).detach()  # straight-through
        return Grid(step, lowest - zero_point, highest - zero_point)  # a rounded zero-point only shifts the range

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        if self.zero_point is None:
            super().initialize(x)
            return
        low, high = torch.aminmax(x)
        step = ((high - low) / (self.highest - self.lowest)).clamp(min=SMALLEST_STEP)
        self.zero_point.copy_((self.lowest - low / step).round())
        self.log_step.copy_(step.log())


class PactActivations(ActivationQuantizer):
    """PACT: clipped to [0, alpha], or [-alpha, alpha] if signed, with a learned alpha per choice that starts at 10.

    Only clipped values have a gradient to alpha (PACT, equation 3); the step size alpha / highest level is a constant.
    """

    log_alpha: nn.Parameter  # [K]; only if any choice is quantized

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        if self.any_quantized:
            self.log_alpha = nn.Parameter(torch.full((len(bits),), math.log(PACT_FIRST_ALPHA)))

    def grid(self, numel: int) -> Grid:
        alpha = (_bounded(self.log_alpha) + (self.log_alpha - self.log_alpha.detach())).exp()
        relative = alpha / alpha.detach()  # 1, with a gradient to alpha
        step = (alpha.detach() / self.highest)[:, None]
        lowest = -self.highest * relative if self.signed else self.lowest
        return Grid(self._step_column(step), lowest, self.highest * relative)


class DoReFaActivations(ActivationQuantizer):
    """DoReFa: clamped to [0, 1], or [-1, 1] if signed; nothing is learned."""

    def grid(self, numel: int) -> Grid:
        step = self._step_column(self.highest.reciprocal()[:, None])
        return Grid(step, -self.highest if self.signed else self.lowest, self.highest)


def weight_quantizer(
    name: QuantizerName, bits: Sequence[int], channels: int = 1, *, nested: bool = False
) -> WeightQuantizer:
    """The quantizer `name` of a weight; with LSQ, one step size or `channels` many, and grids that may be `nested`."""
    if nested:
        return NestedWeights(bits, channels)
    return LsqWeights(bits, channels) if name in ("lsq_plus", "lsq") else DoReFaWeights(bits)


def activation_quantizer(name: QuantizerName, bits: Sequence[int], *, signed: bool) -> ActivationQuantizer:
    """The quantizer `name` of a layer's input; `signed` if the layer does not apply a ReLU to it."""
    kinds: dict[QuantizerName, type[ActivationQuantizer]] = {
        "lsq_plus": LsqPlusActivations,
        "lsq": LsqActivations,
        "pact": PactActivations,
        "dorefa": DoReFaActivations,
    }
    return kinds[name](bits, signed=signed)


def _gradient_scale(numel: int, highest: Tensor) -> Tensor:
    """1 / sqrt(numel * highest level), [K] (LSQ, section 2.2); without effect under AdamW, see the module."""
    return (numel * highest).rsqrt()


def _with_gradient_scale(x: Tensor, scale: Tensor) -> Tensor:
    """`x`, to the last bit, with its gradient multiplied by `scale`."""
    return x.detach() + (x - x.detach()) * scale


def _lsq_step(log_step: Tensor, gradient_scale: Tensor) -> Tensor:
    """Step sizes s = exp(log_step) within their range, with the gradient that makes SGD move s as LSQ does.

    The gradient of `log_step` is g / s * dL/ds; the chain rule alone would give s * dL/ds. AdamW undoes both factors.
    """
    bounded = _bounded(log_step)
    return (bounded + (log_step - log_step.detach()) * gradient_scale * (-2 * bounded).exp()).exp()


def _bounded(logarithm: Tensor) -> Tensor:
    """`logarithm` clamped to the range of step sizes, without gradient: its exponential is positive and finite."""
    return logarithm.detach().clamp(math.log(SMALLEST_STEP), math.log(LARGEST_STEP))


def _first_lsq_step(magnitude: Tensor, highest: Tensor) -> Tensor:
    """2 * mean|x| / sqrt(highest level), [K, C], from mean|x| [K or 1, C] (LSQ, section 2.1)."""
    return (2 * magnitude / highest.sqrt()[:, None]).clamp(min=SMALLEST_STEP)
