"""The policy network: a small quantized residual network (paper, section on the policy).

Its input is the image, or the features of the detector's frozen stem, which the detector computes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.bits import BitChoice
from instaqnas.errors import InputError
from instaqnas.pixels import normalized
from instaqnas.policy.budget import PricePoint, price_of
from instaqnas.quant.bitops import CostTable, LayerCost, measure_layers
from instaqnas.quant.switchable import SwitchableConv2d

BLOCKS = ((1, 1), (2, 2), (4, 2), (8, 2))  # (channels in units of the width, stride) of the residual blocks
LEAST_HEAD_BITS = 8  # at fewer, many images have equal logits, and a budget between them cannot be met


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut: the identity or a 1x1 convolution with BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bits: BitChoice) -> None:
        super().__init__()
        self.first = SwitchableConv2d(in_channels, out_channels, 3, [bits], stride=stride)
        self.second = SwitchableConv2d(out_channels, out_channels, 3, [bits])
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else SwitchableConv2d(in_channels, out_channels, 1, [bits], stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        inner = self.second(self.first(x)).value()  # the second layer's quantizer applies the ReLU in between
        shortcut = x if self.shortcut is None else self.shortcut(x).value()
        return F.relu(inner + shortcut)


class PolicyNet(nn.Module):
    """Logits of the bit choices at every position, from the image or from the features of the detector's stem.

    An image is pooled, then passes a 7x7 convolution and a max-pooling, both of stride 2. Features have half the
    resolution already: they are pooled, then pass a 3x3 convolution of stride 1. The stem is not part of the policy's
    cost, because the detector continues from the same features (`SwitchableSSD.observe`).

    Args:
        positions: L.
        choices: K.
        pool: factor of the average-pooling of the input.
        width: channels of the first block, 16 in the paper.
        bits: (weight bits, activation bits) of all layers; the last has at least 8 of each.
        stem_channels: channels of the detector's stem if its features are the input; None if the image is.
        effort: change of the logits of the K choices per unit of effort, the same at all positions until `begin` sets
            it. The network then has one more output, the effort of the image. None for a network without effort.
    """

    effort: Tensor | None

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
        head_bits = (max(bits[0], LEAST_HEAD_BITS), max(bits[1], LEAST_HEAD_BITS))
        self.head = SwitchableConv2d(in_channels, outputs, 1, [head_bits], batch_norm=False)
        self.register_buffer("effort", None if effort is None else torch.tensor(effort).repeat(positions, 1))
        nn.init.normal_(self.head.weight, std=0.01)  # a new policy is almost uniform

    def forward(self, observed: Tensor) -> Tensor:
        """Logits [B, L, K] for RGB images [B, 3, S, S], uint8 or float, 0 to 255.

        With `stem_channels`, for features [B, C, H, W] after their ReLU.
        """
        logits, effort = self._outputs(observed)
        if self.effort is None:
            return logits
        return logits + effort[:, None, None] * self.effort  # not addcmul, which may round only once

    def efforts(self, observed: Tensor) -> Tensor:
        """The efforts [B] for the same input as `forward` takes."""
        return self._outputs(observed)[1]

    def _outputs(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, K] without effort, and the network's last output [B]."""
        x = self.blocks(self._from_image(observed) if self.stem_channels is None else self._from_stem(observed))
        # Means in float64 do not depend on the order of their sum, which differs between machines and runtimes.
        mean = x.double().mean((2, 3), keepdim=True).to(x.dtype)
        x = self.head(mean).value().flatten(1)
        return x[:, : self.positions * self.choices].view(-1, self.positions, self.choices), x[:, -1]

    def example(self, image_size: int) -> Tensor:
        """An input of zeros for one image of `image_size` pixels a side."""
        side = image_size if self.stem_channels is None else -(-image_size // 2)
        return torch.zeros(1, self.stem_channels or 3, side, side, device=self.head.weight.device)

    @torch.no_grad()
    def add_to_logits(self, offset: Tensor) -> None:
        """Adds `offset` [L, K] to the logits of all images from now on."""
        change = F.pad(offset.flatten(), (0, self.head.out_channels - offset.numel()))  # the effort stays
        self.head.add_to_output(change)

    @torch.no_grad()
    def shift_to_budget(self, prices: Sequence[PricePoint], costs: CostTable, gbitops: float) -> None:
        """Shifts the logits so that images cost `gbitops` on average, as far as they are like the ones of `prices`.

        Args:
            prices: of this policy as it was trained.
            costs: of its detector.
            gbitops: the mean cost, policy included.

        Raises: InputError if there are no prices, or the cost is outside them.
        """
        if not prices:
            raise InputError("no prices for other budgets; a search or finetuning that has ended writes them")
        self.add_to_logits(-price_of(prices, gbitops) * costs.gbitops_table())

    @torch.no_grad()
    def begin(self, logits: Tensor, effort: Tensor) -> None:
        """Adds `logits` [L, K] to the logits of all images, and sets their change per unit of effort to [L, K]."""
        assert self.effort is not None, "the policy was built with effort"
        self.add_to_logits(logits)
        self.effort.copy_(effort)

    def _from_image(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(normalized(images), self.pool, ceil_mode=True)  # rounding down would drop pixels at the edge
        return F.max_pool2d(F.relu(self.stem(x).value()), 3, stride=2, padding=1)

    def _from_stem(self, features: Tensor) -> Tensor:
        pooled = F.avg_pool2d(features.double(), self.pool, ceil_mode=True)  # as the mean in `_outputs`
        return F.relu(self.stem(pooled.to(features.dtype)).value())


def effort_of(bit_products: Sequence[float]) -> list[float]:
    """Change of the logits of K choices per unit of effort: log2(weight bits x activation bits), standardised.

    Mean 0 and standard deviation 1 over the choices; all 0 if they cost the same. Raising the bits of all positions of
    an image then takes one output of the policy instead of L x K.
    """
    logs = [math.log2(product) for product in bit_products]
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))
    return [(value - mean) / deviation if deviation else 0.0 for value in logs]


def policy_layers(policy: PolicyNet, image_size: int) -> list[LayerCost]:
    """MACs and bits of every layer of the policy, for images of `image_size` pixels a side."""
    example = policy.example(image_size)
    return measure_layers(policy, lambda: policy(example))


def policy_gbitops(policy: PolicyNet, image_size: int) -> float:
    """GBitOps of one run of the policy."""
    return sum(layer.bitops() for layer in policy_layers(policy, image_size)) / 1e9
