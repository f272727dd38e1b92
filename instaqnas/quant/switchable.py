"""A convolution with per-choice BatchNorm that runs every image of a batch at its own bit choice, computed once.

One weight is shared by all choices; step sizes and BatchNorm exist per choice. K = 1 is an ordinary quantized
convolution, and K = 1 at 32 bits an ordinary one: the full-precision network is built of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.quant.quantizers import ActivationQuantizer, WeightQuantizer

BitChoice = tuple[int, int]


def per_image_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """Convolution of every image with its own weight.

    Args:
        x: [B, in, H, W].
        weight: [B, out, in / groups, kh, kw].

    Returns: [B, out, H', W'].
    """
    images, channels, height, width = x.shape
    out = weight.shape[1]
    if weight.shape[2:] == (channels, 1, 1) and stride == 1 and padding == 0:  # pointwise: one batched product
        return torch.bmm(weight.view(images, out, channels), x.flatten(2)).view(images, out, height, width)
    y = F.conv2d(
        x.reshape(1, images * channels, height, width),
        weight.reshape(images * out, *weight.shape[2:]),
        stride=stride,
        padding=padding,
        groups=images * groups,
    )
    return y.view(images, out, *y.shape[2:])


class PerChoiceBatchNorm(nn.Module):
    """BatchNorm with its own parameters and statistics for each of K choices; an image takes part in its choice's.

    The input comes as integer sums with one factor per image still to be multiplied in; normalisation absorbs it.
    """

    def __init__(self, channels: int, choices: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(choices, channels))
        self.bias = nn.Parameter(torch.zeros(choices, channels))
        self.register_buffer("running_mean", torch.zeros(choices, channels))
        self.register_buffer("running_var", torch.ones(choices, channels))

    def forward(self, y: Tensor, factor: Tensor | None, choice: Tensor | None) -> Tensor:
        """Normalised `factor * y`.

        Args:
            y: [B, C, H, W].
            factor: [B] or [1], or None for 1.
            choice: [B] indices of the K choices; None where K = 1.
        """
        if self.training and choice is None:
            y = y if factor is None else y * factor.view(-1, 1, 1, 1)
            statistics = (self.running_mean[0], self.running_var[0])
            return F.batch_norm(y, *statistics, self.weight[0], self.bias[0], True, self.momentum, self.eps)  # noqa: FBT003
        mean, var = self._batch_moments(y, factor, choice) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        if choice is not None:
            scale, shift = scale[choice], shift[choice]  # [B, C]
        if factor is not None:
            scale = scale * factor[:, None]
        return torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None])

    def _batch_moments(self, y: Tensor, factor: Tensor | None, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [K, C] over the images of each choice, from per-image moments; updates the running ones."""
        values = y.flatten(2)
        pixels = values.shape[2]
        image_mean = values.sum(2) / pixels  # [B, C]
        # E[y^2] - E[y]^2: on a CPU a tenth of the time of torch.var_mean, and close enough for what is nearly centred.
        image_var = (torch.linalg.vecdot(values, values) / pixels - image_mean**2).clamp(min=0)
        if factor is not None:
            image_var, image_mean = image_var * factor[:, None] ** 2, image_mean * factor[:, None]
        member = F.one_hot(choice, len(self.weight)).to(y.dtype)  # [B, K]
        images = member.sum(0)[:, None]  # [K, 1]
        share = (member / images.clamp(min=1).T).T  # [K, B]
        mean = share @ image_mean
        var = share @ (image_var + (image_mean - mean[choice]) ** 2)  # law of total variance
        with torch.no_grad():
            rate = self.momentum * (images > 0)
            unbiased = var * (images * pixels) / (images * pixels - 1).clamp(min=1)
            self.running_mean += rate * (mean - self.running_mean)
            self.running_var += rate * (unbiased - self.running_var)
        return mean, var


class SwitchableConv2d(nn.Module):
    """Quantized convolution, followed by BatchNorm or a bias, at one of K (weight bits, activation bits) per image.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as in `torch.nn.Conv2d`; padding keeps the size.
        choices: the K bit choices; with one, `forward` needs no choice.
        batch_norm: BatchNorm per choice instead of a bias.
        signed_input: the input is not behind a ReLU.
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
    ) -> None:
        super().__init__()
        self.choices = tuple(choices)
        self.stride, self.padding, self.groups = stride, kernel_size // 2, groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.bias = None if batch_norm else nn.Parameter(torch.zeros(out_channels))
        self.norm = PerChoiceBatchNorm(out_channels, len(self.choices)) if batch_norm else None
        self.weight_quantizer = WeightQuantizer([weight_bits for weight_bits, _ in self.choices])
        self.input_quantizer = ActivationQuantizer([bits for _, bits in self.choices], signed=signed_input)

    def forward(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'], image b at bit choice `choice[b]`; `choice` [B] is unused where K = 1."""
        if len(self.choices) == 1:
            choice = None
        x, input_step = self.input_quantizer(x, choice)
        weight, weight_step = self.weight_quantizer(self.weight)
        if choice is None:
            y = F.conv2d(x, weight[0], stride=self.stride, padding=self.padding, groups=self.groups)
        else:
            y = per_image_conv2d(x, weight.index_select(0, choice), self.stride, self.padding, self.groups)
            weight_step = None if weight_step is None else weight_step[choice]
        factor = _product(input_step, weight_step)
        if self.norm is not None:
            return self.norm(y, factor, choice)
        if factor is not None:
            y = y * factor.view(-1, 1, 1, 1)
        return y + self.bias[:, None, None]

    def initialize_steps(self, x: Tensor) -> None:
        """Takes the first step sizes from the weight and from an input `x` [B, in, H, W]."""
        self.weight_quantizer.initialize(self.weight)
        self.input_quantizer.initialize(x)


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
