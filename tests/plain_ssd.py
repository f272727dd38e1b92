"""MobileNetV1 and MobileNetV1-SSD of torch's own modules, under the names that other projects give them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (output channels, stride)
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
TIMM_STAGES = (slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 11), slice(11, 13))  # blocks of the same size of map


def _norm_relu(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]


def backbone(width: float = 1.0) -> nn.Sequential:
    """Stem and 13 blocks: modules 0 to 13, in each 0 is a convolution, 1 its BatchNorm, 3 and 4 the pointwise ones."""
    channels = int(32 * width)
    layers = [nn.Sequential(*_norm_relu(nn.Conv2d(3, channels, 3, 2, 1, bias=False)))]
    for full, stride in BLOCKS:
        out = int(full * width)
        depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, out, 1, bias=False)
        layers.append(nn.Sequential(*_norm_relu(depthwise), *_norm_relu(pointwise)))
        channels = out
    return nn.Sequential(*layers)


class PytorchSSD(nn.Module):
    """The names of qfgaohao/pytorch-ssd; `forward` gives class logits [B, P, C] and box offsets [B, P, 4]."""

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        self.classes = classes
        self.base_net = backbone(width)
        self.extras = nn.ModuleList()
        channels = [int(512 * width), int(1024 * width)]
        for inner, out in ((256, 512), (128, 256), (128, 256), (128, 256)):
            reduce = nn.Conv2d(channels[-1], int(inner * width), 1)
            down = nn.Conv2d(int(inner * width), int(out * width), 3, 2, 1)
            self.extras.append(nn.Sequential(reduce, nn.ReLU(), down, nn.ReLU()))
            channels.append(int(out * width))
        self.classification_headers = nn.ModuleList(nn.Conv2d(c, 6 * classes, 3, padding=1) for c in channels)
        self.regression_headers = nn.ModuleList(nn.Conv2d(c, 6 * 4, 3, padding=1) for c in channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sources = [self.base_net[:12](x)]
        sources.append(self.base_net[12:](sources[0]))
        for extra in self.extras:
            sources.append(extra(sources[-1]))
        maps = zip(sources, self.classification_headers, self.regression_headers, strict=True)
        heads = [(classes(source), boxes(source)) for source, classes, boxes in maps]
        logits, offsets = zip(*heads, strict=True)
        # [B, 6 * values, H, W]: a cell's channels are box by box, the values of a box side by side
        return tuple(
            torch.cat([y.permute(0, 2, 3, 1).reshape(len(x), -1, values) for y in maps], 1)
            for maps, values in ((logits, self.classes), (offsets, 4))
        )


class TimmMobileNet(nn.Module):
    """The names of timm's mobilenetv1_100; `forward` gives the last feature map, with ReLU for its ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        (self.conv_stem, self.bn1, _), *blocks = backbone()
        self.blocks = nn.Sequential()
        for stage in TIMM_STAGES:
            self.blocks.append(nn.Sequential(*(self._named(block) for block in blocks[stage])))
        self.classifier = nn.Linear(1024, 1000)

    @staticmethod
    def _named(block: nn.Sequential) -> nn.Module:
        named = nn.Module()
        named.conv_dw, named.bn1, _, named.conv_pw, named.bn2, _ = block
        return named

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv_stem(x)))
        for stage in self.blocks:
            for block in stage:
                x = F.relu(block.bn1(block.conv_dw(x)))
                x = F.relu(block.bn2(block.conv_pw(x)))
        return x


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """`network` in evaluation with random weights and BatchNorm statistics, under which signals keep their size."""
    random = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=random)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.5, generator=random)
        if isinstance(module, nn.BatchNorm2d):
            for value, center in ((module.running_var, 1.2), (module.weight.data, 1.0)):
                value.copy_(center + 0.4 * (torch.rand(len(value), generator=random) - 0.5))
            for value in (module.running_mean, module.bias.data):
                value.copy_(torch.randn(len(value), generator=random) / 2)
    return network.eval()
