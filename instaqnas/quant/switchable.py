"""A convolution with per-choice BatchNorm that runs each image of a batch at its own bit choice.

All networks are built from `SwitchableConv2d`. With K = 1 it is an ordinary quantized layer, and with K = 1 at 32 bits
a full-precision layer. Each choice has its own step sizes and BatchNorm; weights are shared by all choices, separate,
or nested.

A layer returns an `Affine`, whose scale, shift and ReLU are applied by the next layer's quantizer. `calibrate`
initialises the step sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.bits import BitChoice, QuantizerName, WeightSharing
from instaqnas.quant.affine import Affine, as_affine, of_images
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.byte_conv import ByteConv2d, all_finite, keeps_bytes, uses_bytes
from instaqnas.quant.convolution import by_choice, choice_conv2d, images_of_choices, plain_conv2d
from instaqnas.quant.quantizers import activation_quantizer, weight_quantizer

ParameterState = list[tuple[nn.Parameter, int, int]]  # parameter, address of its data, version
PackedWeight = tuple[list[ByteConv2d], Tensor]  # the convolution of each choice; step sizes [K, 1 or out]


class SwitchableConv2d(nn.Module):
    """Quantized convolution with BatchNorm or a bias, at one of K (weight bits, activation bits) per image.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as in `torch.nn.Conv2d`; padding keeps the size.
        choices: the K bit choices; with one, `forward` needs no choice.
        batch_norm: BatchNorm per choice, instead of a bias.
        signed_input: quantize signed inputs; otherwise a ReLU is applied to the input first.
        quantizer: quantization method of weights and inputs.
        weights: `shared`: one weight for all choices; `separate`: one weight per choice; `nested`: one weight, whose
            integers at fewer bits are the top bits of the widest choice (LSQ only).
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
        self.has_bytes = self.input_quantizer.has_bytes and self.weight_quantizer.all_quantized
        self._packed: tuple[ParameterState, PackedWeight] | None = None  # parameters it was made from, and the result

    def forward(self, x: Affine | Tensor, choice: Tensor | None = None) -> Affine:
        """[B, in, H, W] -> [B, out, H', W'], image b at bit choice `choice[b]`; `choice` [B] is ignored where K = 1."""
        if len(self.choices) == 1:
            choice = None
        x = as_affine(x)
        by_bytes = self.has_bytes and keeps_bytes(x.y)
        y, factor = self._sums_of_bytes(x, choice) if by_bytes else self._sums(x, choice)
        if self.norm is not None:
            return self.norm(y, factor, choice)._replace(known_finite=by_bytes)
        scale, shift = self._folded_bias(factor)
        return Affine(y, of_images(scale, choice, len(y)), shift, known_finite=by_bytes)

    def _sums(self, x: Affine, choice: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The convolution of the levels [B, out, H', W'], and the product of the step sizes [K, 1 or out] or None."""
        self._packed = None
        levels, input_step = self.input_quantizer(x, choice)
        weight, weight_step = self.weight_quantizer(self.weight)
        if choice is None and input_step is None:
            y = plain_conv2d(levels, weight[0], self.stride, self.padding, self.groups)
        else:
            y = choice_conv2d(levels, weight, choice, stride=self.stride, padding=self.padding, groups=self.groups)
        return y, _product(None if input_step is None else input_step[:, None], weight_step)

    def _sums_of_bytes(self, x: Affine, choice: Tensor | None) -> tuple[Tensor, Tensor]:
        """Like `_sums`, with levels stored as bytes. Step sizes are NaN if the input or the weight is not finite."""
        levels, carrier, input_step = self.input_quantizer.byte_levels(x, choice)
        if uses_bytes() and not torch.is_grad_enabled():
            convolutions, weight_step = self._packed_weight()
            y = by_choice([levels], images_of_choices(choice), lambda part, k: convolutions[k](part))
        else:
            self._packed = None
            weight, weight_step = self._quantized_weight()
            y = choice_conv2d(
                carrier,
                weight,
                choice,
                stride=self.stride,
                padding=self.padding,
                groups=self.groups,
                levels=levels,
                integers=self.weight_quantizer.integers,
            )
        return y, input_step[:, None] * weight_step

    def _quantized_weight(self) -> tuple[Tensor, Tensor]:
        """Levels and step sizes of the weight; the step sizes are NaN if the weight is not finite."""
        levels, step = self.weight_quantizer(self.weight)
        return levels, torch.where(all_finite(self.weight), step, torch.nan)

    def _packed_weight(self) -> PackedWeight:
        """The weight packed for byte products, kept until a parameter changes.

        Changes are detected by the version counters of the parameters. Fused optimizers do not increment them, but they
        only run after a forward pass with gradients, which discards the packed weight.
        """
        parameters = (self.weight, *self.weight_quantizer.parameters())
        state = [(parameter, parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self._packed is None or not _is_same(self._packed[0], state):
            weight, step = self._quantized_weight()
            convolutions = [
                ByteConv2d(levels, stride=self.stride, padding=self.padding, groups=self.groups)
                for levels in weight.to(self.weight_quantizer.integers)
            ]
            self._packed = state, (convolutions, step)
        return self._packed[1]

    def __getstate__(self) -> dict[str, object]:
        """Leaves out the packed weight, which cannot be copied."""
        return {**self.__dict__, "_packed": None}

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.weight.shape[-4]

    @torch.no_grad()
    def add_to_output(self, change: Tensor) -> None:
        """Adds `change` [out] to the outputs of a layer with a bias from now on."""
        assert self.bias is not None, "the layer has BatchNorm"
        self.bias.add_(change.to(self.bias))

    def folded(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale [K, out] and shift [K or 1, out] from the integer sums to the output in evaluation.

        `factor` [K, 1 or out] is the product of the step sizes.
        """
        return self._folded_bias(factor) if self.norm is None else self.norm.folded(factor)

    def _folded_bias(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.bias is not None, "a layer without BatchNorm has a bias"
        scale = torch.ones_like(self.bias)[None] if factor is None else factor.expand(-1, len(self.bias))
        return scale, self.bias[None]

    def initialize_steps(self, x: Affine | Tensor) -> None:
        """Sets the first step sizes from the weight and from an input `x` [B, in, H, W]."""
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
    """Initialises the step sizes of every layer of `network` from the data that `forward()` sends through it.

    Each layer is initialised just before it runs, so its inputs are already quantized by the layers before it.

    The network is in training mode during the call: BatchNorm normalises by batch statistics, because its running
    statistics do not belong to the quantized network. As in a training step, `forward()` updates the running statistics
    of the choices that have images. The updated statistics are kept for evaluation and for the training that follows.
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
