"""A convolution with per-choice BatchNorm that runs every image of a batch at its own bit choice, computed once.

Weights are shared by all choices, separate for each, or shared with nested integers, those of fewer bits the top bits
of the widest; step sizes (of nested weights all from one) and BatchNorm exist per choice. K = 1 is an ordinary
quantized convolution, and K = 1 at 32 bits an ordinary one: the full-precision network is built of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas import ranks
from instaqnas.quant.convolution import (
    ByteConv2d,
    by_choice,
    choice_conv2d,
    images_of_choices,
    keeps_bytes,
    plain_conv2d,
    uses_bytes,
)
from instaqnas.quant.fused import sums_of_powers
from instaqnas.quant.quantizers import (
    Affine,
    QuantizerName,
    activation_quantizer,
    as_affine,
    of_images,
    weight_quantizer,
)

BitChoice = tuple[int, int]
WeightSharing = Literal["shared", "separate", "nested"]
ParameterState = list[tuple[nn.Parameter, int, int]]  # with address and version
PackedWeight = tuple[list[ByteConv2d], Tensor]  # of each choice; step sizes as those of a weight quantizer
MOST_SCALE, MOST_SHIFT = 3.0, 5.0  # of batch renormalization: r_max and d_max that its schedule ends with


class PerChoiceBatchNorm(nn.Module):
    """BatchNorm with its own parameters and statistics for each of K choices; an image takes part in its choice's.

    Statistics are those of the images of all processes that train together.

    The input comes as integer sums with one factor per choice still to be multiplied in; normalisation absorbs it, and
    is itself left to the reader of the result.

    With `renormalize` set, training normalises as evaluation does, by the running statistics, while gradients are those
    of the batch's (batch renormalization: Ioffe, NeurIPS 2017): few images of a batch may have the same choice, and an
    image that is alone with its own would be normalised by itself. How far the two statistics may differ is limited,
    by `MOST_SCALE` and `MOST_SHIFT`. With one choice all images of the batch take part, and nothing changes.
    """

    def __init__(self, channels: int, choices: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.renormalize = False
        self.weight = nn.Parameter(torch.ones(choices, channels))
        self.bias = nn.Parameter(torch.zeros(choices, channels))
        self.register_buffer("running_mean", torch.zeros(choices, channels))
        self.register_buffer("running_var", torch.ones(choices, channels))

    def forward(self, y: Tensor, factor: Tensor | None, choice: Tensor | None) -> Affine:
        """Normalised `factor * y`.

        Args:
            y: [B, C, H, W].
            factor: [K, 1] or [K, C], or None for 1.
            choice: [B] indices of the K choices; None where K = 1.
        """
        if choice is None and factor is None and not (self.training and ranks.world_size() > 1):
            state = (self.running_mean[0], self.running_var[0], self.weight[0], self.bias[0])
            return Affine(F.batch_norm(y, *state, self.training, self.momentum, self.eps))
        if not self.training:
            scale, shift = self.folded(factor)
        elif self.renormalize and len(self.weight) > 1:
            known = self.running_mean.clone(), self.running_var.clone()  # of before this batch
            y, mean, var = self._batch_statistics(y, factor, choice)
            scale, shift = self._folded(*self._renormalized(mean.detach(), var.detach(), *known), mean, var, factor)
        else:
            y, mean, var = self._batch_statistics(y, factor, choice)
            scale, shift = self._folded(self.weight, self.bias, mean, var, factor)
        return Affine(y, of_images(scale, choice, len(y)), of_images(shift, choice, len(y)))

    def folded(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift [K, C] that normalisation of `factor * y` comes to in evaluation."""
        return self._folded(self.weight, self.bias, self.running_mean, self.running_var, factor)

    def totals(self, y: Tensor, factor: Tensor | None, choice: Tensor | None) -> Tensor:
        """Count, sum and sum of squares of `factor * y` over the pixels of each choice's images, float64 [3, K, C].

        Arguments as those of `forward`.
        """
        _, sums, squares = sums_of_powers(y)
        member = self._members(y, choice).double()
        count = member.sum(1, keepdim=True) * y[0, 0].numel()  # [K, 1]
        factor = torch.ones_like(count) if factor is None else factor.double()
        sums, squares = factor * (member @ sums.double()), factor**2 * (member @ squares.double())
        return torch.stack([count.expand_as(sums), sums, squares])

    @torch.no_grad()
    def take_statistics(self, totals: Tensor) -> None:
        """Sets the running statistics to the mean and unbiased variance behind `totals` [3, K, C].

        Those of a choice with fewer than two pixels stay.
        """
        count, sums, squares = totals
        mean = sums / count.clamp(min=1)
        var = (squares / count.clamp(min=1) - mean**2).clamp(min=0) * count / (count - 1).clamp(min=1)
        self.running_mean.copy_(torch.where(count > 1, mean, self.running_mean))
        self.running_var.copy_(torch.where(count > 1, var, self.running_var))

    def _renormalized(self, mean: Tensor, var: Tensor, known_mean: Tensor, known_var: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias [K, C] for what is normalised by the batch's statistics, as if it were by the known ones."""
        rate = (known_var + self.eps).rsqrt()
        scale = ((var + self.eps).sqrt() * rate).clamp(1 / MOST_SCALE, MOST_SCALE)
        shift = ((mean - known_mean) * rate).clamp(-MOST_SHIFT, MOST_SHIFT)
        return self.weight * scale, self.bias + self.weight * shift

    def _folded(
        self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scale = weight * (var + self.eps).rsqrt()
        shift = bias - mean * scale
        return scale if factor is None else scale * factor, shift

    def _batch_statistics(
        self, y: Tensor, factor: Tensor | None, choice: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`y`, to be read on, and the mean and variance [K, C] of `factor * y` over the images of each choice.

        Updates the running statistics.
        """
        y, sums, squares = sums_of_powers(y)
        member = self._members(y, choice).to(sums.dtype)
        pixels = member.sum(1, keepdim=True) * y[0, 0].numel()  # [K, 1]
        with torch.autocast(y.device.type, enabled=False):  # bf16 would leave nothing of the difference
            sums, squares = member @ sums, member @ squares  # [K, C]
            if ranks.world_size() > 1:
                of_all = ranks.total(torch.cat([pixels, sums, squares], 1))
                pixels, sums, squares = of_all.split([1, y.shape[1], y.shape[1]], 1)
            mean = sums / pixels.clamp(min=1)
            # E[y^2] - E[y]^2: one pass over memory, and close enough for what is nearly centred.
            var = (squares / pixels.clamp(min=1) - mean**2).clamp(min=0)
        if factor is not None:
            mean, var = mean * factor, var * factor**2
        with torch.no_grad():
            rate = self.momentum * (pixels > 1)  # one pixel has no variance
            unbiased = var * pixels / (pixels - 1).clamp(min=1)
            self.running_mean += rate * (mean - self.running_mean)
            self.running_var += rate * (unbiased - self.running_var)
        return y, mean, var

    def _members(self, y: Tensor, choice: Tensor | None) -> Tensor:
        """Which images have which choice, 0 or 1, [K, B]."""
        choice = choice if choice is not None else torch.zeros(len(y), dtype=torch.int64, device=y.device)
        return F.one_hot(choice, len(self.weight)).T


class SwitchableConv2d(nn.Module):
    """Quantized convolution, followed by BatchNorm or a bias, at one of K (weight bits, activation bits) per image.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as in `torch.nn.Conv2d`; padding keeps the size.
        choices: the K bit choices; with one, `forward` needs no choice.
        batch_norm: BatchNorm per choice instead of a bias.
        signed_input: the input is not behind a ReLU; otherwise the layer applies one to its input.
        quantizer: how weights and inputs are quantized.
        weights: one weight `shared` by all choices, a `separate` one for each, or a shared one with `nested` integers:
            those of fewer bits are the top bits of the widest (LSQ only).
        per_channel: a step size per output channel of the weight (LSQ only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        choices: Sequence[BitChoice],
        *,
        stride: int = 1,
        groups: int = 1,
        batch_norm: bool = True,
        signed_input: bool = False,
        quantizer: QuantizerName = "lsq_plus",
        weights: WeightSharing = "shared",
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        self.choices = tuple(choices)
        self.stride, self.padding, self.groups = stride, kernel_size // 2, groups
        weight = torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size)
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        if weights == "separate" and len(self.choices) > 1:
            weight = weight.repeat(len(self.choices), 1, 1, 1, 1)
        self.weight = nn.Parameter(weight)
        self.bias = None if batch_norm else nn.Parameter(torch.zeros(out_channels))
        self.norm = PerChoiceBatchNorm(out_channels, len(self.choices)) if batch_norm else None
        weight_bits, input_bits = zip(*self.choices, strict=True)
        self.weight_quantizer = weight_quantizer(
            quantizer,
            weight_bits,
            out_channels if per_channel else 1,
            nested=weights == "nested" and len(self.choices) > 1,
        )
        self.input_quantizer = activation_quantizer(quantizer, input_bits, signed=signed_input)
        has_integers = self.input_quantizer.has_bytes and self.weight_quantizer.all_quantized
        self.integers = self.weight_quantizer.integers if has_integers else None
        self._packed: tuple[ParameterState, PackedWeight] | None = None  # from what, and what

    def forward(self, x: Affine | Tensor, choice: Tensor | None = None) -> Affine:
        """[B, in, H, W] -> [B, out, H', W'], image b at bit choice `choice[b]`; `choice` [B] is unused where K = 1."""
        if len(self.choices) == 1:
            choice = None
        x = as_affine(x)
        levels = None
        if self.integers is not None and keeps_bytes(x.y):
            levels, x, input_step = self.input_quantizer.byte_levels(x, choice)
        else:
            x, input_step = self.input_quantizer(x, choice)
        if levels is not None and uses_bytes() and not torch.is_grad_enabled():
            convolutions, weight_step = self._packed_weight()
            y = by_choice([levels], images_of_choices(choice), lambda part, k: convolutions[k](part))
        else:
            self._packed = None
            weight, weight_step = self.weight_quantizer(self.weight)
            if choice is None and input_step is None:
                y = plain_conv2d(x, weight[0], **self._settings)
            else:
                y = choice_conv2d(x, weight, choice, **self._settings, levels=levels, integers=self.integers)
        factor = _product(None if input_step is None else input_step[:, None], weight_step)  # [K, 1] or [K, out]
        if self.norm is not None:
            return self.norm(y, factor, choice)
        scale, shift = self._folded_bias(factor)
        return Affine(y, of_images(scale, choice, len(y)), shift)

    @property
    def _settings(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}

    def _packed_weight(self) -> PackedWeight:
        """The weight as bytes, packed once for as long as it does not change.

        A change shows in the version of a parameter. Fused optimizers change it without one, but not before a forward
        pass with gradients, and that forgets what was packed.
        """
        parameters = (self.weight, *self.weight_quantizer.parameters())
        state = [(parameter, parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self._packed is None or not _is_same(self._packed[0], state):
            weight, step = self.weight_quantizer(self.weight)
            if not weight.isfinite().all():  # no byte says so
                step = torch.full_like(step, torch.nan)
            convolutions = [ByteConv2d(levels, **self._settings) for levels in weight.to(self.integers)]
            self._packed = state, (convolutions, step)
        return self._packed[1]

    def __getstate__(self) -> dict[str, object]:
        """Without what is packed, which cannot be copied."""
        return {**self.__dict__, "_packed": None}

    def folded(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale [K, out] and shift [K or 1, out] that stand between the integer sums and the output in evaluation.

        `factor` [K, 1 or out] is the product of the step sizes.
        """
        return self._folded_bias(factor) if self.norm is None else self.norm.folded(factor)

    def _folded_bias(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = torch.ones_like(self.bias)[None] if factor is None else factor.expand(-1, len(self.bias))
        return scale, self.bias[None]

    def initialize_steps(self, x: Affine | Tensor) -> None:
        """Takes what the quantizers learn from the weight and from an input `x` [B, in, H, W]."""
        self.weight_quantizer.initialize(self.weight)
        x = as_affine(x).value()
        self.input_quantizer.initialize(x if self.input_quantizer.signed else F.relu(x))


def _is_same(a: ParameterState, b: ParameterState) -> bool:
    return all(x[0] is y[0] and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


@torch.no_grad()
def calibrate(network: nn.Module, forward: Callable[[], object]) -> None:
    """Takes the first step sizes of every layer of `network` from the data that `forward()` sends through it.

    Each layer is initialised just before it first runs, so it sees inputs that its predecessors have quantized.
    Batch statistics are used on the way, since the running ones belong to another network.
    """
    layers = [module for module in network.modules() if isinstance(module, SwitchableConv2d)]
    hooks = [layer.register_forward_pre_hook(lambda layer, args: layer.initialize_steps(args[0])) for layer in layers]
    was_training = network.training
    try:
        network.train()
        forward()
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()


def use_batch_renorm(network: nn.Module, *, on: bool) -> None:
    """Lets the BatchNorms of `network` renormalize in training, or not."""
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.renormalize = on


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, forward: Callable[[], object]) -> None:
    """Takes the BatchNorm statistics of `network` anew from all the data that `forward()` sends through it.

    They are those of all images of a choice together, whatever batches and processes they come in ("precise BatchNorm",
    Wu and Johnson, 2021, section 3); a choice that no image has keeps its own. On the way every batch is normalised as
    in training. Nothing else changes, nor do layers that `network.train()` leaves in evaluation.
    """
    totals: dict[PerChoiceBatchNorm, Tensor] = {}

    def add(norm: PerChoiceBatchNorm, args: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        totals[norm] = totals.get(norm, 0) + norm.totals(*args)

    was_training = network.training
    network.train()
    norms = [module for module in network.modules() if isinstance(module, PerChoiceBatchNorm) and module.training]
    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        forward()
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    for norm, total in totals.items():
        norm.take_statistics(ranks.total(total))
