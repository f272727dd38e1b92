"""Quantizers that put weights and activations on integer-valued grids, one grid per bit choice.

A quantizer returns the levels (integer values held in floating point, the zero-point already subtracted) and the step
size, apart: the layer convolves the levels and multiplies by the step sizes once. The product is that of ordinary
fake quantization, exact as long as the integer sums stay below 2^24, and what an integer machine computes.

| name       | weights | activations                                                                        |
|------------|---------|------------------------------------------------------------------------------------|
| `lsq_plus` | LSQ     | LSQ, with a learned zero-point where the input is not behind a ReLU (LSQ+)         |
| `lsq`      | LSQ     | LSQ                                                                                |
| `pact`     | DoReFa  | PACT: clipped at a learned end                                                     |
| `dorefa`   | DoReFa  | clamped to [0, 1], or [-1, 1] where the input is not behind a ReLU                 |

Sources: LSQ (Esser et al., ICLR 2020), LSQ+ (Bhalgat et al., CVPR Workshops 2020), PACT (Choi et al., 2018), DoReFa-Net
(Zhou et al., 2016). Whatever is learned and has to stay positive is held as its logarithm (as in Jain et al., MLSys
2020, section 3.3), so no gradient can make it negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.quant.fused import clip_round, clip_round_carried

FULL_PRECISION = 32  # as a bit-width: not quantized
SMALLEST_STEP, LARGEST_STEP = 1e-8, 1e8
PACT_FIRST_END = 10.0
QuantizerName = Literal["lsq_plus", "lsq", "pact", "dorefa"]


def level_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest integer of a grid of `bits` bits: [-2^(b-1), 2^(b-1)-1] if signed, else [0, 2^b-1].

    Raises: ValueError for a signed grid of 1 bit, which has no positive level to scale by.
    """
    if signed and bits == 1:
        raise ValueError("a signed grid needs at least 2 bits")
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


class Affine(NamedTuple):
    """`scale * y + shift`, not computed yet, so that the quantizer of the next layer can absorb it, and the ReLU too.

    y: [B, C, H, W].
    scale, shift: [B, C] or [1, C], [B, 1] or [1, 1]; None for 1 and 0.
    """

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[B, C, H, W]."""
        return self.y.shape

    def value(self) -> Tensor:
        """The feature map itself [B, C, H, W], without ReLU."""
        if self.scale is None:
            return self.y
        # Under autocast the sums are bf16.
        y = self.y.to(self.scale.dtype)
        return y * self.scale[:, :, None, None] + self.shift[:, :, None, None]


def as_affine(x: Affine | Tensor) -> Affine:
    """`x`, wrapped if it is a tensor."""
    return x if isinstance(x, Affine) else Affine(x)


class Grid(NamedTuple):
    """K grids: levels are clip(round(x / step), lowest, highest).

    step: [K, 1], or [K, C] per channel.
    lowest, highest: [K]; they carry a gradient where an end of the range is learned.
    """

    step: Tensor
    lowest: Tensor
    highest: Tensor


class Quantizer(nn.Module):
    """K grids of integers.

    Args:
        bits: K bit-widths, 2 to 8 (1 to 8 if not signed), or 32 for choices that are not quantized.
        signed: whether the grids reach below zero.

    What it learns is NaN until `initialize` has seen data: an uncalibrated layer can not yield silent nonsense.
    """

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
        """The grids, 1 as step size of choices that are not quantized.

        `numel` is the number of elements that share a step size (for activations those of one image): learned step
        sizes scale their gradient by it.
        """
        raise NotImplementedError

    def initialize(self, x: Tensor) -> None:
        """Takes what is learned from data like those that will be quantized; may be repeated."""

    def _step_column(self, step: Tensor) -> Tensor:
        return torch.where(self.is_quantized[:, None], step, 1.0)


# --- Weights ----------------------------------------------------------------------------------------------------------


class WeightQuantizer(Quantizer):
    """Signed grids of a convolution's weight: forward returns levels [K, out, in / groups, kh, kw] and step sizes
    [K, 1] or [K, out], None if no choice is quantized.

    Its argument is one weight [out, in / groups, kh, kw] for all choices, or one for each [K, out, ...].
    """

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__(bits, signed=True)
        self.integers = torch.int8  # what holds the levels of quantized choices

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        weight = weight.view(-1, *weight.shape[-4:])  # [1 or K, ...]
        if not self.any_quantized:
            return weight.expand(len(self.lowest), *weight.shape[1:]), None
        levels, step = self._levels(weight)
        if not self.all_quantized:
            levels = torch.where(self.is_quantized.view(-1, 1, 1, 1, 1), levels, weight)
        return levels, step

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [K, ...] and step sizes of a weight [1 or K, ...]."""
        raise NotImplementedError


class LsqWeights(WeightQuantizer):
    """LSQ: learned step sizes, one per choice, or one per choice and output channel.

    Args:
        channels: 1, or the output channels for a step size of each.
    """

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
            per_channel = self.log_step.shape[1] > 1
            magnitude = x.expand(len(self.log_step), *x.shape[-4:]).flatten(2).abs().mean(2)  # [K, out]
            if not per_channel:
                magnitude = magnitude.mean(1, keepdim=True)
            self.log_step.copy_(_first_lsq_step(magnitude, self.highest).log())

    def _levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        step, lowest, highest = self.grid(weight[0].numel() // self.log_step.shape[1])
        scale = step.reciprocal().expand(-1, weight.shape[1])
        return clip_round(weight, scale, torch.zeros_like(scale), lowest, highest), step


class NestedWeights(WeightQuantizer):
    """Any-Precision (Yu et al., AAAI 2021): the integers of a choice are the top bits of those of the widest choice.

    With Q = floor(w / s) the widest integer, of B bits, a choice of b bits has q = floor(Q / 2^(B - b)) and stands for
    the middle of what falls to it: level 2q + 1 at step size s * 2^(B - b) / 2. s is learned, one for all choices.

    Args:
        channels: 1, or the output channels for a step size of each.
    """

    def __init__(self, bits: Sequence[int], channels: int = 1) -> None:
        super().__init__(bits)
        self.integers = torch.int16  # -255 to 255
        quantized = [b for b in bits if b != FULL_PRECISION]
        if quantized:
            self.widest, self.narrowest = max(quantized), min(quantized)
            half_steps = [2.0 ** (self.widest - b - 1) if b != FULL_PRECISION else 1.0 for b in bits]
            self.register_buffer("half_step", torch.tensor(half_steps), persistent=False)  # [K], in units of s
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
        # Step sizes differ by powers of two, so that the floors are nested to the last bit.
        position = weight / step[..., None, None, None]
        lowest, highest = (end.view(-1, 1, 1, 1, 1) for end in (lowest, highest))
        passed = position.clamp(lowest, highest)
        levels = (2 * (position / 2).floor() + 1).clamp(lowest, highest)
        return levels.detach() + (passed - passed.detach()), step  # straight-through


class DoReFaWeights(WeightQuantizer):
    """DoReFa: tanh(w) / max|tanh(w)| mapped to [0, 1], rounded to one of 2^b levels, mapped back to [-1, 1].

    Levels are the odd integers from -(2^b - 1) to 2^b - 1. The maximum is multiplied in again as a constant, so that
    layers without BatchNorm keep their range; with BatchNorm it makes no difference.
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
    """Grids of a layer's input, picked per image; unsigned grids are also the ReLU before the layer."""

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        self.has_bytes = self.all_quantized and not signed  # levels lie in 0 to 255

    def forward(self, x: Affine | Tensor, choice: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Levels [B, C, H, W], and step sizes [K] (None if no choice is quantized).

        `choice` [B] indexes the K choices; it may be None where there is only one.
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
        """The same where all levels are bytes (`has_bytes`): uint8, channels-last; what carries their gradient; steps.

        See `clip_round_carried`. No byte says that something is not finite: the step sizes do.
        """
        tables, step = self._tables(x, choice)
        finite = torch.stack([table.isfinite().all() for table in tables[:2]]).all()
        return *clip_round_carried(x.y, *tables), torch.where(finite, step, torch.nan)

    def _tables(self, x: Affine, choice: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """What `clip_round` wants: scale and shift [B, C], ends [B]; and the step sizes [K]."""
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
    """LSQ+: a learned zero-point per choice as well, for inputs not behind a ReLU; the grid spans min to max."""

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        self.zero_point = nn.Parameter(torch.zeros(len(bits))) if signed and self.any_quantized else None

    def grid(self, numel: int) -> Grid:
        step, lowest, highest = super().grid(numel)
        if self.zero_point is None:
            return Grid(step, lowest, highest)
        zero_point = _with_gradient_scale(self.zero_point, _gradient_scale(numel, self.highest))
        zero_point = zero_point + (zero_point.round() - zero_point).detach()  # straight-through
        return Grid(step, lowest - zero_point, highest - zero_point)  # the shift of a rounded zero-point, no more

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

    Alpha learns from clipped values alone (PACT, equation 3): the step size alpha / highest level is a constant to the
    gradient, and the ends of the range are not. Carried away, alpha stays at an end of the range of step sizes.
    """

    def __init__(self, bits: Sequence[int], *, signed: bool) -> None:
        super().__init__(bits, signed=signed)
        if self.any_quantized:
            self.log_alpha = nn.Parameter(torch.full((len(bits),), math.log(PACT_FIRST_END)))

    def grid(self, numel: int) -> Grid:
        alpha = (_bounded(self.log_alpha) + (self.log_alpha - self.log_alpha.detach())).exp()
        relative = alpha / alpha.detach()  # 1, with alpha's gradient
        step = (alpha.detach() / self.highest)[:, None]
        lowest = -self.highest * relative if self.signed else self.lowest
        return Grid(self._step_column(step), lowest, self.highest * relative)


class DoReFaActivations(ActivationQuantizer):
    """DoReFa: clamped to [0, 1], or [-1, 1] if signed; nothing is learned."""

    def grid(self, numel: int) -> Grid:
        step = self._step_column(self.highest.reciprocal()[:, None])
        return Grid(step, -self.highest if self.signed else self.lowest, self.highest)


# --- Helpers ----------------------------------------------------------------------------------------------------------


def weight_quantizer(
    name: QuantizerName, bits: Sequence[int], channels: int = 1, *, nested: bool = False
) -> WeightQuantizer:
    """The quantizer `name` of a weight.

    With LSQ, `channels` above 1 gives each output channel a step size, and `nested` nests the grids of the choices.
    """
    if nested:
        return NestedWeights(bits, channels)
    return LsqWeights(bits, channels) if name in ("lsq_plus", "lsq") else DoReFaWeights(bits)


def activation_quantizer(name: QuantizerName, bits: Sequence[int], *, signed: bool) -> ActivationQuantizer:
    """The quantizer `name` of a layer's input; `signed`: the input is not behind a ReLU."""
    kinds = {
        "lsq_plus": LsqPlusActivations,
        "lsq": LsqActivations,
        "pact": PactActivations,
        "dorefa": DoReFaActivations,
    }
    return kinds[name](bits, signed=signed)


def of_images(table: Tensor, choice: Tensor | None, images: int) -> Tensor:
    """Rows of a table [K, ...] for B images, [B, ...]; without `choice` [B] the table has one row for all."""
    return table.expand(images, *table.shape[1:]) if choice is None else table[choice]


def _gradient_scale(numel: int, highest: Tensor) -> Tensor:
    """1 / sqrt(numel * highest level), [K] (LSQ, section 2.2)."""
    return (numel * highest).rsqrt()


def _with_gradient_scale(x: Tensor, scale: Tensor) -> Tensor:
    """`x`, to the last bit, with its gradient times `scale`."""
    return x.detach() + (x - x.detach()) * scale


def _lsq_step(log_step: Tensor, gradient_scale: Tensor) -> Tensor:
    """Step sizes s like `log_step`, whose descent is that of LSQ.

    A descent on log s by g / s^2 moves s, to first order, as one on s by g does. Where that is carried away, s stays at
    an end of its range.
    """
    bounded = _bounded(log_step)
    return (bounded + (log_step - log_step.detach()) * gradient_scale * (-2 * bounded).exp()).exp()


def _bounded(logarithm: Tensor) -> Tensor:
    """A constant: `logarithm` within the range of step sizes, so that its exponential is positive and finite."""
    return logarithm.detach().clamp(math.log(SMALLEST_STEP), math.log(LARGEST_STEP))


def _first_lsq_step(magnitude: Tensor, highest: Tensor) -> Tensor:
    """2 * mean|x| / sqrt(highest level), [K, C], from mean|x| [K or 1, C] (LSQ, section 2.1)."""
    return (2 * magnitude / highest.sqrt()[:, None]).clamp(min=SMALLEST_STEP)
