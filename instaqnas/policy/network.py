"""The policy network: a small quantized residual network that looks at the image (paper, section on the policy), or at
the features of the detector's stem, which the detector computes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.pixels import normalized
from instaqnas.quant.bitops import LayerCost, measure_layers
from instaqnas.quant.switchable import BitChoice, SwitchableConv2d

START_PROBABILITY = 0.7
BLOCKS = ((1, 1), (2, 2), (4, 2), (8, 2))  # (channels in units of the width, stride) of the residual blocks


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, around them the identity or a 1x1 convolution with BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bits: BitChoice) -> None:
        super().__init__()
        self.first = SwitchableConv2d(in_channels, out_channels, 3, [bits], stride=stride)
        self.second = SwitchableConv2d(out_channels, out_channels, 3, [bits])
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else SwitchableConv2d(in_channels, out_channels, 1, [bits], stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        inner = self.second(self.first(x)).value()  # the ReLU between the two is the quantizer's
        shortcut = x if self.shortcut is None else self.shortcut(x).value()
        return F.relu(inner + shortcut)


class PolicyNet(nn.Module):
    """Logits of the bit choices at every position, from the image or from the features of the detector's stem.

    The image is pooled, and goes through a 7x7 convolution and a max-pooling, both of stride 2. The features have half
    its size already: they are pooled only, and go through a 3x3 convolution of stride 1. That the stem has run before
    is no cost of the policy's: the detector goes on from the same features (`SwitchableSSD.look`).

    Args:
        positions: L.
        choices: K.
        pool: factor by which the image, or the features, are average-pooled first.
        width: channels of the first block; the paper has 16.
        bits: (weight bits, activation bits) at which the network runs and is counted.
        stem_channels: those of the detector's stem, to look at its features; None looks at the image.
        effort: what a unit of effort adds to the logits of the K choices, the same at all positions until `begin` says
            otherwise; the network then has one output more, the effort for the image. None has no such output.
    """

    def __init__(
        self,
        positions: int,
        choices: int,
        *,
        pool: int,
        width: int,
        bits: BitChoice,
        stem_channels: int | None = None,
        effort: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.positions, self.choices, self.pool, self.stem_channels = positions, choices, pool, stem_channels
        if stem_channels is None:
            self.stem = SwitchableConv2d(3, width, 7, [bits], stride=2, signed_input=True)
        else:
            self.stem = SwitchableConv2d(stem_channels, width, 3, [bits])
        self.blocks = nn.Sequential()
        in_channels = width
        for units, stride in BLOCKS:
            self.blocks.append(ResidualBlock(in_channels, units * width, stride, bits))
            in_channels = units * width
        outputs = positions * choices + (effort is not None)
        self.head = SwitchableConv2d(in_channels, outputs, 1, [bits], batch_norm=False)
        self.register_buffer("effort", None if effort is None else torch.tensor(effort).repeat(positions, 1))
        nn.init.normal_(self.head.weight, std=0.01)  # an almost uniform policy to start from

    def forward(self, seen: Tensor) -> Tensor:
        """Logits [B, L, K] for RGB images [B, 3, S, S], uint8 or float, 0 to 255.

        With `stem_channels`, for that many features [B, C, H, W] behind their ReLU.
        """
        logits, effort = self._outputs(seen)
        if self.effort is None:
            return logits
        shift = effort[:, None, None] * self.effort  # apart from the sum, which compiled code may round once
        return logits + shift

    def efforts(self, seen: Tensor) -> Tensor:
        """The efforts [B] for images, or features, as `forward` takes them."""
        return self._outputs(seen)[1]

    def _outputs(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, K] without effort, and the network's last output [B]."""
        x = self.blocks(self._from_image(seen) if self.stem_channels is None else self._from_stem(seen))
        x = self.head(F.adaptive_avg_pool2d(x, 1)).value().flatten(1)
        return x[:, : self.positions * self.choices].view(-1, self.positions, self.choices), x[:, -1]

    def example(self, image_size: int) -> Tensor:
        """Zeros of the shape of what it looks at, for one image of `image_size` pixels a side."""
        side = image_size if self.stem_channels is None else -(-image_size // 2)
        return torch.zeros(1, self.stem_channels or 3, side, side, device=self.head.weight.device)

    @torch.no_grad()
    def add_to_logits(self, offset: Tensor) -> None:
        """Adds `offset` [L, K] to the logits of all images, once and for all."""
        self.head.bias[: offset.numel()] += offset.flatten().to(self.head.bias)

    @torch.no_grad()
    def begin(self, logits: Tensor, effort: Tensor) -> None:
        """Adds `logits` [L, K] to those of all images, and has a unit of effort add `effort` [L, K] from now on."""
        self.add_to_logits(logits)
        self.effort.copy_(effort)

    def _from_image(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(normalized(images), self.pool, ceil_mode=True)  # no pixel left out
        return F.max_pool2d(F.relu(self.stem(x).value()), 3, stride=2, padding=1)

    def _from_stem(self, features: Tensor) -> Tensor:
        return F.relu(self.stem(F.avg_pool2d(features, self.pool, ceil_mode=True)).value())


def effort_of(choices: Sequence[BitChoice]) -> list[float]:
    """What a unit of effort adds to the logits of K choices: log2 of weight bits x activation bits, of mean 0 and
    standard deviation 1 over the choices (all 0 if they cost the same).

    An image that needs more of everything then needs one output of the policy to say so, not L x K.
    """
    logs = [math.log2(weight_bits * activation_bits) for weight_bits, activation_bits in choices]
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))
    return [(value - mean) / deviation if deviation else 0.0 for value in logs]


def start_logits(configuration: Sequence[int], choices: int) -> Tensor:
    """Logits [L, K] with the probability `START_PROBABILITY` for one configuration's choice at each position.

    The other K - 1 = `choices` - 1 share the rest.
    """
    odds = START_PROBABILITY * max(1, choices - 1) / (1 - START_PROBABILITY)
    return math.log(odds) * F.one_hot(torch.tensor(configuration), choices).float()


def policy_layers(policy: PolicyNet, image_size: int) -> list[LayerCost]:
    """MACs and bits of every layer of the policy for images of `image_size` pixels a side."""
    seen = policy.example(image_size)
    return measure_layers(policy, lambda: policy(seen))


def policy_gbitops(policy: PolicyNet, image_size: int) -> float:
    """GBitOps of one decision."""
    return sum(layer.bitops() for layer in policy_layers(policy, image_size)) / 1e9
