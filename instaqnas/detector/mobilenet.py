"""MobileNetV1 of switchable convolutions (Howard et al., 2017, table 1), without its classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.quant.switchable import BitChoice, SwitchableConv2d

# (output channels, stride) of the 13 depthwise-separable blocks
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
STEM_CHANNELS = 32


def scaled_channels(channels: int, width: float) -> int:
    """Channels under a width multiplier, a multiple of 8 and at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


class SeparableBlock(nn.Module):
    """Depthwise 3x3 at fixed bits, then pointwise at the bits chosen per image, each with BatchNorm and ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, depthwise: BitChoice, choices: Sequence[BitChoice]
    ) -> None:
        super().__init__()
        self.depthwise = SwitchableConv2d(in_channels, in_channels, 3, [depthwise], stride=stride, groups=in_channels)
        self.pointwise = SwitchableConv2d(in_channels, out_channels, 1, choices)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]; `choice` [B] picks the pointwise bits."""
        x = F.relu_(self.depthwise(x))
        return F.relu_(self.pointwise(x, choice))


class MobileNet(nn.Module):
    """Stem and 13 blocks.

    Args:
        width: width multiplier.
        choices: bit choices of the pointwise convolutions.
        stem, depthwise: fixed bits.
    """

    def __init__(self, width: float, choices: Sequence[BitChoice], stem: BitChoice, depthwise: BitChoice) -> None:
        super().__init__()
        self.channels = [scaled_channels(out, width) for out, _ in BLOCKS]
        in_channels = scaled_channels(STEM_CHANNELS, width)
        self.stem = SwitchableConv2d(3, in_channels, 3, [stem], stride=2, signed_input=True)
        self.blocks = nn.ModuleList()
        for out_channels, (_, stride) in zip(self.channels, BLOCKS, strict=True):
            self.blocks.append(SeparableBlock(in_channels, out_channels, stride, depthwise, choices))
            in_channels = out_channels

    def forward(self, x: Tensor, choices: Tensor) -> list[Tensor]:
        """Outputs of all blocks for normalised images [B, 3, S, S] under bit configurations `choices` [B, 13]."""
        x = F.relu_(self.stem(x))
        outputs = []
        for block, choice in zip(self.blocks, choices.unbind(1), strict=True):
            x = block(x, choice)
            outputs.append(x)
        return outputs
