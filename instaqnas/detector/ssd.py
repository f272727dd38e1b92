"""MobileNetV1-SSD whose layers run at a bit choice picked per image."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from instaqnas.detector.default_boxes import BOXES_PER_CELL, default_boxes, encode, match
from instaqnas.detector.mobilenet import BLOCKS, ChoiceOf, MakeConv, MobileNet, scaled_channels
from instaqnas.detector.multibox_loss import image_losses, multibox_loss
from instaqnas.pixels import normalized
from instaqnas.quant.bitops import CostTable, LayerCost, measure_layers
from instaqnas.quant.quantizers import FULL_PRECISION, Affine, QuantizerName
from instaqnas.quant.switchable import BitChoice, SwitchableConv2d, WeightSharing

EXTRAS = ((256, 512), (128, 256), (128, 256), (128, 256))  # channels of the 1x1 and of the strided 3x3
SOURCE_BLOCKS = (10, 12)
Positions = Literal["pointwise", "backbone", "backbone+extras", "all"]
GROUPS_OF: dict[Positions, tuple[str, ...]] = {  # the layers that the policy controls
    "pointwise": ("pointwise",),
    "backbone": ("stem", "depthwise", "pointwise"),
    "backbone+extras": ("stem", "depthwise", "pointwise", "extras"),
    "all": ("stem", "depthwise", "pointwise", "extras", "heads"),
}
LAYERS_IN = {
    "stem": 1,
    "depthwise": len(BLOCKS),
    "pointwise": len(BLOCKS),
    "extras": 2 * len(EXTRAS),
    "heads": 2 * (len(SOURCE_BLOCKS) + len(EXTRAS)),
}
Amp = Literal["off", "bf16"]


def position_count(positions: Positions) -> int:
    """L, the number of layers that the policy controls."""
    return sum(LAYERS_IN[group] for group in GROUPS_OF[positions])


@dataclass(frozen=True)
class DetectorBits:
    """Bit choices of every layer, and how it is quantized.

    Args:
        choices: of the layers at `positions`.
        stem, depthwise, extras, heads: the one choice of these layers where they are not among `positions`.
        positions: which layers have `choices`.
        quantizer, weights, per_channel: see `SwitchableConv2d`.
    """

    choices: Sequence[BitChoice]
    stem: BitChoice
    depthwise: BitChoice
    extras: BitChoice
    heads: BitChoice
    positions: Positions = "pointwise"
    quantizer: QuantizerName = "lsq_plus"
    weights: WeightSharing = "shared"
    per_channel: bool = False

    def choices_of(self, group: str) -> Sequence[BitChoice]:
        """Bit choices of the layers of a group: stem, depthwise, pointwise, extras or heads."""
        return self.choices if group in GROUPS_OF[self.positions] else [getattr(self, group)]

    @property
    def quantize_nothing(self) -> bool:
        """Whether this is an ordinary full-precision network."""
        groups = (*self.choices, self.stem, self.depthwise, self.extras, self.heads)
        return all(bits == FULL_PRECISION for choice in groups for bits in choice)

    @staticmethod
    def uniform(bits: int) -> DetectorBits:
        """The same bits for weights and activations of all layers."""
        both = (bits, bits)
        return DetectorBits([both], both, both, both, both)

    @staticmethod
    def full_precision() -> DetectorBits:
        """Nothing quantized: an ordinary network of the same parts."""
        return DetectorBits.uniform(FULL_PRECISION)


@dataclass(frozen=True)
class SSDOutput:
    """Raw outputs: box_offsets [B, P, 4] and class_logits [B, P, C], class 0 is background."""

    box_offsets: Tensor
    class_logits: Tensor


class Look(NamedTuple):
    """What there is to see of B images before their bits are chosen.

    seen: what a policy looks at: the images, or the features of a frozen stem behind their ReLU, [B, C, ceil(S / 2),
        ceil(S / 2)].
    stem: the output of the frozen stem, from which `SwitchableSSD.forward` goes on; None where it is not frozen.
    """

    seen: Tensor
    stem: Affine | None


@dataclass(frozen=True)
class Targets:
    """What the default boxes of images are to become: offsets [B, P, 4], arbitrary where labels [B, P] are 0."""

    offsets: Tensor
    labels: Tensor

    @property
    def positives(self) -> Tensor:
        """Number of default boxes with an object, a scalar."""
        return (self.labels > 0).sum()

    def split(self, parts: int) -> list[Targets]:
        """Those of the images in so many equal parts."""
        size = len(self.labels) // parts
        return list(map(Targets, self.offsets.split(size), self.labels.split(size)))


class ExtraLayer(nn.Module):
    """ReLU and 1x1 convolution, then ReLU and 3x3 with stride 2."""

    def __init__(self, in_channels: int, channels: tuple[int, int], make: MakeConv, *, batch_norm: bool) -> None:
        super().__init__()
        self.reduce = make("extras", in_channels, channels[0], 1, batch_norm=batch_norm)
        self.down = make("extras", channels[0], channels[1], 3, stride=2, batch_norm=batch_norm)

    def forward(self, x: Affine, choice_of: ChoiceOf) -> Affine:
        """[B, in, H, W] -> [B, out, ceil(H / 2), ceil(W / 2)]."""
        for layer in (self.reduce, self.down):
            x = layer(x, choice_of.get(layer))
        return x


class SwitchableSSD(nn.Module):
    """The detector: backbone, extra feature layers and heads on six feature maps.

    `positions` names the L layers that the policy controls, in the order of the columns of bit configurations.

    Args:
        classes: C, background included.
        bits: bit choices of every layer.
        image_size: side of the square input in pixels.
        width: width multiplier of all channels but those of the heads.
        extras_batch_norm: BatchNorm instead of a bias in the extra layers.
        box_sizes: (smaller, larger) default-box size of each of the six maps in pixels; None takes those of the image
            size.
        amp: arithmetic of the convolutions, `off` for float32.
    """

    def __init__(
        self,
        classes: int,
        bits: DetectorBits,
        *,
        image_size: int = 300,
        width: float = 1.0,
        extras_batch_norm: bool = False,
        box_sizes: Sequence[tuple[int, int]] | None = None,
        amp: Amp = "off",
    ) -> None:
        super().__init__()
        self.classes, self.image_size, self.choices, self.amp = classes, image_size, tuple(bits.choices), amp
        self.stem_is_frozen = False
        layers_of: dict[str, list[SwitchableConv2d]] = {}

        def make(group: str, *shape: int, **settings: int | bool) -> SwitchableConv2d:
            settings |= {"quantizer": bits.quantizer, "weights": bits.weights, "per_channel": bits.per_channel}
            layer = SwitchableConv2d(*shape, bits.choices_of(group), **settings)
            layers_of.setdefault(group, []).append(layer)
            return layer

        self.backbone = MobileNet(width, make)
        source_channels = [self.backbone.channels[block] for block in SOURCE_BLOCKS]
        self.extras = nn.ModuleList()
        for channels in EXTRAS:
            inner, outer = (scaled_channels(c, width) for c in channels)
            self.extras.append(ExtraLayer(source_channels[-1], (inner, outer), make, batch_norm=extras_batch_norm))
            source_channels.append(outer)

        def heads(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(
                make("heads", c, BOXES_PER_CELL * outputs, 3, batch_norm=False) for c in source_channels
            )

        self.box_heads, self.class_heads = heads(4), heads(classes)
        for head in [*self.box_heads, *self.class_heads]:
            nn.init.xavier_uniform_(head.weight)
        controlled = {layer for group in GROUPS_OF[bits.positions] for layer in layers_of[group]}
        self.positions = tuple(name for name, module in self.named_modules() if module in controlled)
        boxes = default_boxes(image_size, self._map_sizes(), box_sizes)
        self.register_buffer("default_boxes_cxcywh", boxes, persistent=False)

    def freeze_stem(self) -> None:
        """Keeps the stem as it is from now on, without gradients and as in evaluation, so that `look` can show it.

        What a policy has learned to look at then stays what it is while the detector is trained on.

        Raises: ValueError if the policy controls the bits of the stem.
        """
        if "backbone.stem" in self.positions:
            raise ValueError("the stem has no bits before they are chosen")
        self.stem_is_frozen = True
        self.backbone.stem.requires_grad_(False).eval()  # noqa: FBT003

    def train(self, mode: bool = True) -> SwitchableSSD:  # noqa: FBT001, FBT002
        """As `torch.nn.Module.train`, but for a frozen stem."""
        super().train(mode)
        if self.stem_is_frozen:
            self.backbone.stem.eval()
        return self

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        """What a policy can see of RGB images [B, 3, S, S], uint8 or float, 0 to 255.

        The stem computed here is the detector's own: hand it to `forward`, and it is not computed again.
        """
        if not self.stem_is_frozen:
            return Look(images, None)
        with self._arithmetic(images):
            stem = self.backbone.stem(normalized(images))
        return Look(F.relu(stem.value()), stem)

    def forward(self, images: Tensor, choices: Tensor, stem: Affine | None = None) -> SSDOutput:
        """Runs every image once, image b at bit configuration `choices[b]`.

        Args:
            images: RGB [B, 3, S, S], uint8 or float, 0 to 255.
            choices: [B, L] indices of the K bit choices, in the order of `positions`.
            stem: what `look` has made of the images, if anybody has looked.
        """
        choice_of = dict(zip(map(self.get_submodule, self.positions), choices.unbind(1), strict=True))

        def predict(heads: nn.ModuleList, values: int) -> Tensor:
            maps = [head(x, choice_of.get(head)).value() for head, x in zip(heads, sources, strict=True)]
            return torch.cat([_per_box(y, values) for y in maps], 1)

        with self._arithmetic(images):
            if stem is None:
                blocks = self.backbone(normalized(images), choice_of)
            else:
                blocks = self.backbone.after_stem(stem, choice_of)
            sources = self._sources(blocks, choice_of)
            return SSDOutput(predict(self.box_heads, 4), predict(self.class_heads, self.classes))

    def loss(self, output: SSDOutput, boxes_xyxy: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Multibox loss against objects in pixels: boxes_xyxy [B, N, 4], labels [B, N], 0 where there is none."""
        targets = self.targets(boxes_xyxy, labels)
        return multibox_loss(output.box_offsets, output.class_logits, targets.offsets, targets.labels)

    def image_losses(self, output: SSDOutput, boxes_xyxy: Tensor, labels: Tensor) -> Tensor:
        """Multibox loss of each image alone, a sum over its objects, [B], without gradient; objects as in `loss`."""
        targets = self.targets(boxes_xyxy, labels)
        return image_losses(output.box_offsets, output.class_logits, targets.offsets, targets.labels)

    def targets(self, boxes_xyxy: Tensor, labels: Tensor) -> Targets:
        """What the default boxes are to become, for objects as in `loss`."""
        defaults = self.default_boxes_cxcywh
        matched_labels, boxes = match(box_convert(defaults, "cxcywh", "xyxy"), boxes_xyxy / self.image_size, labels)
        return Targets(encode(boxes, defaults), matched_labels)

    def _arithmetic(self, images: Tensor) -> contextlib.AbstractContextManager:
        """That of the convolutions, as `amp` says."""
        bf16 = self.amp == "bf16"
        return torch.autocast(images.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _sources(self, blocks: Sequence[Affine], choice_of: ChoiceOf) -> list[Affine]:
        """The six feature maps that the heads look at, before their ReLU, from those of all blocks."""
        sources = [blocks[block] for block in SOURCE_BLOCKS]
        for layer in self.extras:
            sources.append(layer(sources[-1], choice_of))
        return sources

    def _map_sizes(self) -> list[int]:
        """Cells per side of the six feature maps: every strided 3x3 with padding 1 halves, rounding up."""
        side, sides = -(-self.image_size // 2), []
        for block, (_, stride) in enumerate(BLOCKS):
            side = -(-side // stride)
            if block in SOURCE_BLOCKS:
                sides.append(side)
        for _ in EXTRAS:
            sides.append(-(-sides[-1] // 2))
        return sides


def _per_box(x: Tensor, values: int) -> Tensor:
    """[B, boxes * values, H, W] -> [B, H * W * boxes, values], the order of the default boxes."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, values)


def detector_layers(detector: SwitchableSSD) -> list[LayerCost]:
    """MACs and bit choices of every convolution, from the shapes of one image."""
    weight = detector.backbone.stem.weight
    image = weight.new_zeros(1, 3, detector.image_size, detector.image_size)
    choices = torch.zeros(1, len(detector.positions), dtype=torch.int64, device=weight.device)
    return measure_layers(detector, lambda: detector(image, choices))


def detector_costs(detector: SwitchableSSD) -> CostTable:
    """GBitOps of any bit configuration of the detector."""
    return CostTable(detector_layers(detector), detector.positions)


@torch.no_grad()
def copy_weights(source: SwitchableSSD, target: SwitchableSSD) -> None:
    """Weights, biases and BatchNorm of a network with one bit choice into every choice of another of the same shape.

    Step sizes are left alone: they belong to bit-widths and come from calibration.
    """
    for a, b in zip(source.modules(), target.modules(), strict=True):
        if isinstance(a, SwitchableConv2d):
            b.weight.copy_(a.weight)
            if a.norm is None:
                b.bias.copy_(a.bias)
            else:
                for name, value in a.norm.state_dict(keep_vars=True).items():
                    getattr(b.norm, name).copy_(value)  # [1, C] spreads over [K, C]
