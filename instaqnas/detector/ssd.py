"""MobileNetV1-SSD in which every layer runs at a bit choice picked per image."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from instaqnas.bits import FULL_PRECISION, Amp, BitChoice, Positions, QuantizerName, WeightSharing, choice_names
from instaqnas.detector.default_boxes import BOXES_PER_CELL, default_boxes, encode, match
from instaqnas.detector.mobilenet import BLOCKS, ChoiceOf, MakeConv, MobileNet, scaled_channels
from instaqnas.detector.multibox_loss import image_losses, multibox_loss
from instaqnas.pixels import normalized
from instaqnas.quant.affine import Affine
from instaqnas.quant.bitops import CostTable, LayerCost, measure_layers
from instaqnas.quant.switchable import SwitchableConv2d

EXTRAS = ((256, 512), (128, 256), (128, 256), (128, 256))  # output channels of the 1x1 and of the strided 3x3
SOURCE_BLOCKS = (10, 12)  # blocks of the backbone that heads read
GROUPS_OF: dict[Positions, tuple[str, ...]] = {  # the layers that the policy controls
    "pointwise": ("pointwise",),
    "backbone": ("stem", "depthwise", "pointwise"),
    "backbone+extras": ("stem", "depthwise", "pointwise", "extras"),
    "all": ("stem", "depthwise", "pointwise", "extras", "heads"),
    "network": ("stem", "depthwise", "pointwise", "extras", "heads"),
}
LAYERS_IN = {
    "stem": 1,
    "depthwise": len(BLOCKS),
    "pointwise": len(BLOCKS),
    "extras": 2 * len(EXTRAS),
    "heads": 2 * (len(SOURCE_BLOCKS) + len(EXTRAS)),
}

LAYERS = sum(LAYERS_IN.values())


def position_count(positions: Positions) -> int:
    """L, the number of choices that the policy makes for an image."""
    return 1 if positions == "network" else sum(LAYERS_IN[group] for group in GROUPS_OF[positions])


@dataclass(frozen=True)
class DetectorBits:
    """Bit choices and quantizer of every layer.

    Args:
        choices: the K choices of the layers at `positions`, unless there are `levels`.
        stem, depthwise, extras, heads: the single choice of these layers where they are not among `positions`.
        positions: the layers that have `choices`, and whether they share one choice per image (`network`).
        levels: for positions `network`, the bits of every layer at each of K levels, [K][layers]; pairs may repeat.
            None: every choice is a level, with the same bits in all layers.
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
    levels: Sequence[Sequence[BitChoice]] | None = None

    def choices_of(self, group: str, layer: int) -> Sequence[BitChoice]:
        """Bit choices of one layer.

        The stem has 2 bits where its choice says 1: the image is not behind a ReLU, and its grid is signed.

        Args:
            group: stem, depthwise, pointwise, extras or heads.
            layer: its number in the network, from 0.
        """
        if self.levels is not None:
            return [level[layer] for level in self.levels]
        if group not in GROUPS_OF[self.positions]:
            return [getattr(self, group)]
        if group == "stem":
            return [(weight_bits, max(activation_bits, 2)) for weight_bits, activation_bits in self.choices]
        return self.choices

    @property
    def names(self) -> list[str]:
        """Names of the K choices, see `choice_names`."""
        return choice_names(self.choices, self.levels)

    @property
    def bit_products(self) -> list[float]:
        """Weight bits x activation bits of each of the K choices; of a level, the mean over its layers."""
        levels = [[choice] for choice in self.choices] if self.levels is None else self.levels
        return [sum(weight * activation for weight, activation in level) / len(level) for level in levels]

    @property
    def quantize_nothing(self) -> bool:
        """Whether the network is an ordinary full-precision one."""
        if self.levels is not None:
            return all(bits == FULL_PRECISION for level in self.levels for choice in level for bits in choice)
        groups = (*self.choices, self.stem, self.depthwise, self.extras, self.heads)
        return all(bits == FULL_PRECISION for choice in groups for bits in choice)

    @staticmethod
    def uniform(bits: int) -> DetectorBits:
        """The same bit-width for weights and activations of all layers, and no other choice."""
        both = (bits, bits)
        return DetectorBits([both], both, both, both, both)

    @staticmethod
    def full_precision() -> DetectorBits:
        """No layer is quantized: an ordinary full-precision network."""
        return DetectorBits.uniform(FULL_PRECISION)


@dataclass(frozen=True)
class SSDOutput:
    """Raw outputs: box_offsets [B, P, 4] and class_logits [B, P, C], class 0 is background."""

    box_offsets: Tensor
    class_logits: Tensor


class Observation(NamedTuple):
    """Input of a policy for B images, with the output of the part of the detector that computed it.

    input: the images, or the features of a frozen stem after their ReLU, [B, C, ceil(S / 2), ceil(S / 2)].
    stem: output of the frozen stem, from which `SwitchableSSD.forward` continues; None if the stem is not frozen.
    """

    input: Tensor
    stem: Affine | None


@dataclass(frozen=True)
class Targets:
    """Training targets of the default boxes: offsets [B, P, 4], arbitrary where labels [B, P] are 0."""

    offsets: Tensor
    labels: Tensor

    @property
    def positives(self) -> Tensor:
        """Number of default boxes that are matched with an object, a scalar."""
        return (self.labels > 0).sum()

    def split(self, parts: int) -> list[Targets]:
        """The targets of consecutive equal parts of the batch."""
        size = len(self.labels) // parts
        pairs = zip(self.offsets.split(size), self.labels.split(size), strict=True)
        return [Targets(offsets, labels) for offsets, labels in pairs]


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
    """The detector: backbone, extra feature layers, and heads on six feature maps.

    `layers_at` names the layers with the same choice at each of the L positions, in the order of the columns of bit
    configurations: one layer at each, or all layers at the only position `network`. `positions` are its keys.
    `layer_names` are all layers in the order in which levels list their bits.

    Args:
        classes: C, background included.
        bits: bit choices of every layer.
        image_size: side of the square input in pixels.
        width: width multiplier of all channels except the outputs of the heads.
        extras_batch_norm: BatchNorm instead of a bias in the extra layers.
        box_sizes: (smaller, larger) default-box size of each of the six maps in pixels; None for the sizes that
            `default_boxes` derives from the image size.
        min_negatives: least number of hard negatives of each image in the loss.
        amp: arithmetic of the convolutions, `off` for float32.
    """

    default_boxes_cxcywh: Tensor

    def __init__(
        self,
        classes: int,
        bits: DetectorBits,
        *,
        image_size: int = 300,
        width: float = 1.0,
        extras_batch_norm: bool = False,
        box_sizes: Sequence[tuple[int, int]] | None = None,
        min_negatives: int = 0,
        amp: Amp = "off",
    ) -> None:
        super().__init__()
        self.classes, self.image_size, self.amp = classes, image_size, amp
        self.choice_names = tuple(bits.names)
        self.min_negatives = min_negatives
        self.stem_is_frozen = False
        layers_of: dict[str, list[SwitchableConv2d]] = {group: [] for group in LAYERS_IN}

        def make(
            group: str,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            *,
            stride: int = 1,
            groups: int = 1,
            batch_norm: bool = True,
            signed_input: bool = False,
        ) -> SwitchableConv2d:
            layer = SwitchableConv2d(
                in_channels,
                out_channels,
                kernel_size,
                bits.choices_of(group, sum(map(len, layers_of.values()))),
                stride=stride,
                groups=groups,
                batch_norm=batch_norm,
                signed_input=signed_input,
                quantizer=bits.quantizer,
                weights=bits.weights,
                per_channel=bits.per_channel,
            )
            layers_of[group].append(layer)
            return layer

        self.backbone = MobileNet(width, make)
        source_channels = [self.backbone.channels[block] for block in SOURCE_BLOCKS]
        self.extras = nn.ModuleList()
        for inner, outer in EXTRAS:
            channels = scaled_channels(inner, width), scaled_channels(outer, width)
            self.extras.append(ExtraLayer(source_channels[-1], channels, make, batch_norm=extras_batch_norm))
            source_channels.append(channels[1])

        def heads(values_per_box: int) -> nn.ModuleList:
            outputs = BOXES_PER_CELL * values_per_box
            return nn.ModuleList([make("heads", inputs, outputs, 3, batch_norm=False) for inputs in source_channels])

        self.box_heads, self.class_heads = heads(4), heads(classes)
        for head in layers_of["heads"]:
            nn.init.xavier_uniform_(head.weight)
        controlled = {layer for group in GROUPS_OF[bits.positions] for layer in layers_of[group]}
        names = [name for name, module in self.named_modules() if module in controlled]
        self.layer_names = tuple(name for name, module in self.named_modules() if isinstance(module, SwitchableConv2d))
        self.layers_at = {"network": names} if bits.positions == "network" else {name: [name] for name in names}
        self.positions = tuple(self.layers_at)
        boxes = default_boxes(image_size, self.map_sizes(), box_sizes)
        self.register_buffer("default_boxes_cxcywh", boxes, persistent=False)

    def freeze_stem(self) -> None:
        """Freezes the stem, without gradients and always in eval mode, so that `observe` can return its features.

        The input of a policy then stays the same while the rest of the detector is trained.

        Raises: ValueError if the policy controls the bits of the stem.
        """
        if any("backbone.stem" in names for names in self.layers_at.values()):
            raise ValueError("cannot freeze the stem: its bits are chosen by the policy, which runs after it")
        self.stem_is_frozen = True
        self.backbone.stem.requires_grad_(False).eval()  # noqa: FBT003

    def train(self, mode: bool = True) -> SwitchableSSD:  # noqa: FBT001, FBT002
        """Sets the training mode of all modules except a frozen stem."""
        super().train(mode)
        if self.stem_is_frozen:
            self.backbone.stem.eval()
        return self

    @torch.no_grad()
    def observe(self, images: Tensor) -> Observation:
        """The input of a policy for RGB images [B, 3, S, S], uint8 or float, 0 to 255.

        A frozen stem runs here: hand its output to `forward`, which then does not compute it again.
        """
        if not self.stem_is_frozen:
            return Observation(images, None)
        with self._autocast(images):
            stem = self.backbone.stem(normalized(images))
        return Observation(F.relu(stem.value()), stem)

    def forward(self, images: Tensor, choices: Tensor, stem: Affine | None = None) -> SSDOutput:
        """Runs every image once, image b at bit configuration `choices[b]`.

        Args:
            images: RGB [B, 3, S, S], uint8 or float, 0 to 255.
            choices: [B, L] indices of the K bit choices, in the order of `positions`.
            stem: output of the frozen stem for these images, as `observe` returns it; None to compute it.
        """
        choice_of: dict[nn.Module, Tensor] = {}
        for names, choice in zip(self.layers_at.values(), choices.unbind(1), strict=True):
            choice_of |= {self.get_submodule(name): choice for name in names}

        def predict(heads: nn.ModuleList, values: int) -> Tensor:
            maps = [head(x, choice_of.get(head)).value() for head, x in zip(heads, sources, strict=True)]
            return torch.cat([_per_box(y, values) for y in maps], 1)

        with self._autocast(images):
            if stem is None:
                blocks = self.backbone(normalized(images), choice_of)
            else:
                blocks = self.backbone.after_stem(stem, choice_of)
            sources = self._sources(blocks, choice_of)
            return SSDOutput(predict(self.box_heads, 4), predict(self.class_heads, self.classes))

    def loss(self, output: SSDOutput, boxes_xyxy: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Multibox loss against objects in pixels: boxes_xyxy [B, N, 4] and labels [B, N], 0 for padding."""
        targets = self.targets(boxes_xyxy, labels)
        return multibox_loss(
            output.box_offsets, output.class_logits, targets.offsets, targets.labels, min_negatives=self.min_negatives
        )

    def image_losses(self, output: SSDOutput, boxes_xyxy: Tensor, labels: Tensor, difficult: Tensor) -> Tensor:
        """Multibox loss of each image, summed over its objects, [B], without gradient; objects as in `loss`.

        Objects that are `difficult`, bool [B, N], are dropped, as `transforms.drop_difficult` does for training: they
        count as background.
        """
        targets = self.targets(boxes_xyxy, labels.masked_fill(difficult, 0))
        return image_losses(
            output.box_offsets, output.class_logits, targets.offsets, targets.labels, min_negatives=self.min_negatives
        )

    def targets(self, boxes_xyxy: Tensor, labels: Tensor) -> Targets:
        """Matches objects, as in `loss`, with the default boxes."""
        defaults = self.default_boxes_cxcywh
        matched_labels, boxes = match(box_convert(defaults, "cxcywh", "xyxy"), boxes_xyxy / self.image_size, labels)
        return Targets(encode(boxes, defaults), matched_labels)

    def _autocast(self, images: Tensor) -> contextlib.AbstractContextManager:
        """The arithmetic of the convolutions, as `amp` says."""
        bf16 = self.amp == "bf16"
        return torch.autocast(images.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _sources(self, blocks: Sequence[Affine], choice_of: ChoiceOf) -> list[Affine]:
        """The six feature maps that the heads read, before their ReLU, from the outputs of all blocks."""
        sources = [blocks[block] for block in SOURCE_BLOCKS]
        for layer in self.extras:
            sources.append(layer(sources[-1], choice_of))
        return sources

    def map_sizes(self) -> list[int]:
        """Cells per side of the six feature maps: a strided 3x3 with padding 1 halves the side, rounding up."""
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
    """MACs per image and bit choices of every convolution."""
    weight = detector.backbone.stem.weight
    image = weight.new_zeros(1, 3, detector.image_size, detector.image_size)
    choices = torch.zeros(1, len(detector.positions), dtype=torch.int64, device=weight.device)
    return measure_layers(detector, lambda: detector(image, choices))


def detector_costs(detector: SwitchableSSD) -> CostTable:
    """GBitOps of any bit configuration of the detector."""
    return CostTable(detector_layers(detector), detector.layers_at)


@torch.no_grad()
def copy_weights(source: SwitchableSSD, target: SwitchableSSD) -> None:
    """Copies weights, biases and BatchNorm of a network with one bit choice into every choice of another one.

    Both have the same architecture. Step sizes are not copied: they belong to bit-widths and come from calibration.
    """
    for ours, theirs in zip(target.modules(), source.modules(), strict=True):
        if not isinstance(theirs, SwitchableConv2d):
            continue
        assert isinstance(ours, SwitchableConv2d), "the two networks have the same architecture"
        ours.weight.copy_(theirs.weight)
        if theirs.norm is not None:
            for name, value in theirs.norm.state_dict(keep_vars=True).items():
                getattr(ours.norm, name).copy_(value)  # [1, C] broadcasts to [K, C]
        elif theirs.bias is not None and ours.bias is not None:
            ours.bias.copy_(theirs.bias)
