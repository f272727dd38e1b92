"""MobileNetV1 of switchable convolutions (Howard et al., 2017, table 1), without its classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from instaqnas.quant.affine import Affine
from instaqnas.quant.switchable import SwitchableConv2d

# (output channels, stride) of the 13 depthwise-separable blocks
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
STEM_CHANNELS = 32

ChoiceOf = Mapping[nn.Module, Tensor]  # bit choices [B] of the layers that the policy controls


class MakeConv(Protocol):
    """Builds a convolution of a group: stem, depthwise, pointwise, extras or heads.

    Takes the arguments of `SwitchableConv2d`, whose bit choices and quantizer follow from the group.
    """

    def __call__(
        self,
        group: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        batch_norm: bool = True,
        signed_input: bool = False,
    ) -> SwitchableConv2d: ...


def scaled_channels(channels: int, width: float) -> int:
    """Channels under a width multiplier, a multiple of 8 and at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


def stem_channels(width: float) -> int:
    """Output channels of the stem under a width multiplier."""
    return scaled_channels(STEM_CHANNELS, width)


class SeparableBlock(nn.Module):
    """ReLU and depthwise 3x3, then ReLU and pointwise, each with BatchNorm.

    The ReLUs are applied to the inputs, by the quantizers; the output is still without one.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, make: MakeConv) -> None:
        super().__init__()
        self.depthwise = make("depthwise", in_channels, in_channels, 3, stride=stride, groups=in_channels)
        self.pointwise = make("pointwise", in_channels, out_channels, 1)

    def forward(self, x: Affine, choice_of: ChoiceOf) -> Affine:
        """[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        for layer in (self.depthwise, self.pointwise):
            x = layer(x, choice_of.get(layer))
        return x


class MobileNet(nn.Module):
    """Stem and 13 blocks.

    Args:
        width: width multiplier.
        make: builds the convolutions.
    """

    def __init__(self, width: float, make: MakeConv) -> None:
        super().__init__()
        self.channels = [scaled_channels(out, width) for out, _ in BLOCKS]
        in_channels = stem_channels(width)
        self.stem = make("stem", 3, in_channels, 3, stride=2, signed_input=True)
        self.blocks = nn.ModuleList()
        for out_channels, (_, stride) in zip(self.channels, BLOCKS, strict=True):
            self.blocks.append(SeparableBlock(in_channels, out_channels, stride, make))
            in_channels = out_channels

    def forward(self, x: Tensor, choice_of: ChoiceOf) -> list[Affine]:
        """Outputs of all blocks, before their ReLU, for normalised images [B, 3, S, S]."""
        return self.after_stem(self.stem(x, choice_of.get(self.stem)), choice_of)

    def after_stem(self, x: Affine, choice_of: ChoiceOf) -> list[Affine]:
        """Outputs of all blocks, before their ReLU, for an output of the stem."""
        outputs = []
        for block in self.blocks:
            x = block(x, choice_of)
            outputs.append(x)
        return outputs
