"""Networks that the benchmark compares the detector with: a plain full-precision one, and the published strategy.

The plain network is the full-precision detector in torch's own modules. The published strategy runs all K branches of
every switchable layer on every image, then masks them; its rollouts decode, suppress and match image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, nms

from instaqnas.bits import BitChoice
from instaqnas.config.settings import EvalConfig
from instaqnas.data.loader import Batch
from instaqnas.detector import ssd
from instaqnas.detector.default_boxes import decode, encode, match
from instaqnas.detector.mobilenet import SeparableBlock
from instaqnas.detector.multibox_loss import multibox_loss
from instaqnas.detector.ssd import ExtraLayer, SSDOutput, SwitchableSSD
from instaqnas.metrics.matching import VOC_IOU_THRESHOLD
from instaqnas.pixels import normalized
from instaqnas.quant.quantizers import level_range
from instaqnas.quant.switchable import SwitchableConv2d

EVAL = EvalConfig()


class TorchConv(nn.Module):
    """A layer of the full-precision detector in torch's own modules: convolution, then BatchNorm or a bias.

    Args:
        layer: gives shape and weights.
        bits: quantizes weight and input by LSQ; None quantizes nothing.
    """

    def __init__(self, layer: SwitchableConv2d, bits: BitChoice | None = None) -> None:
        super().__init__()
        out, inputs, kernel, _ = layer.weight.shape
        self.conv = nn.Conv2d(
            inputs * layer.groups,
            out,
            kernel,
            layer.stride,
            layer.padding,
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        self.conv.load_state_dict(layer.state_dict(), strict=False)
        self.norm: nn.Module = nn.Identity()
        if layer.norm is not None:
            self.norm = nn.BatchNorm2d(out)
            self.norm.load_state_dict({name: v[0] for name, v in layer.norm.state_dict().items()}, strict=False)
        self.bits = bits
        if bits is not None:
            self.levels = level_range(bits[0], signed=True), level_range(bits[1], signed=layer.input_quantizer.signed)
            # LSQ's initial step sizes, 2 mean|x| / sqrt(highest level); 0.4 is the mean of a unit normal behind a ReLU.
            magnitudes = layer.weight.detach().abs().mean().item(), 0.4
            steps = [2 * mean / math.sqrt(most) for mean, (_, most) in zip(magnitudes, self.levels, strict=True)]
            self.steps = nn.Parameter(torch.tensor(steps))  # of weight and input

    def forward(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; ignores `choice`."""
        conv = self.conv
        if self.bits is None:
            return self.norm(conv(x))
        weight_step, input_step = self.steps
        weight_levels, input_levels = self.levels
        weight = fake_quantize(conv.weight, weight_step, weight_levels)
        x = fake_quantize(x, input_step, input_levels)
        return self.norm(F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, groups=conv.groups))


def fake_quantize(x: Tensor, step: Tensor, levels: tuple[int, int]) -> Tensor:
    """step * round(clip(x / step, *levels)), with straight-through rounding and LSQ's scale on the gradient of `step`.

    Source: LSQ (Esser et al., ICLR 2020), sections 2.1 and 2.2.
    """
    scale = 1 / math.sqrt(x.numel() * levels[1])
    step = step * scale + (step * (1 - scale)).detach()
    position = (x / step).clamp(*levels)
    return (position + (position.round() - position).detach()) * step


class MaskedBranches(nn.Module):
    """K convolutions with their own weights, step sizes and BatchNorm."""

    def __init__(self, layer: SwitchableConv2d, choices: Sequence[BitChoice]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(TorchConv(layer, bits) for bits in choices)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']: all branches on every image, times the one-hot choice [B], summed."""
        mask = F.one_hot(choice, len(self.branches)).to(x.dtype)[:, :, None, None, None]  # [B, K, 1, 1, 1]
        return reduce(torch.add, (mask[:, k] * branch(x) for k, branch in enumerate(self.branches)))


class BaselineSSD(nn.Module):
    """MobileNetV1-SSD in torch's own modules.

    Args:
        source: full-precision detector, gives shapes and weights.
        convert: builds a layer from the name of its group and the layer of `source`.
    """

    default_boxes_cxcywh: Tensor

    def __init__(self, source: SwitchableSSD, convert: Callable[[str, SwitchableConv2d], nn.Module]) -> None:
        super().__init__()
        self.classes, self.image_size = source.classes, source.image_size
        self.register_buffer("default_boxes_cxcywh", source.default_boxes_cxcywh, persistent=False)

        def modules(group: str, layers: Iterable[SwitchableConv2d]) -> nn.ModuleList:
            return nn.ModuleList(convert(group, layer) for layer in layers)

        # A ModuleList does not know the type of its modules.
        blocks = cast("Sequence[SeparableBlock]", source.backbone.blocks)
        extras = cast("Sequence[ExtraLayer]", source.extras)
        box_heads = cast("Sequence[SwitchableConv2d]", source.box_heads)
        class_heads = cast("Sequence[SwitchableConv2d]", source.class_heads)
        self.stem, self.relu = convert("stem", source.backbone.stem), nn.ReLU(inplace=True)
        self.depthwise = modules("depthwise", (block.depthwise for block in blocks))
        self.pointwise = modules("pointwise", (block.pointwise for block in blocks))
        self.reduce = modules("extras", (extra.reduce for extra in extras))
        self.down = modules("extras", (extra.down for extra in extras))
        self.box_heads, self.class_heads = modules("heads", box_heads), modules("heads", class_heads)

    def forward(self, images: Tensor, choices: Tensor) -> SSDOutput:
        """As `SwitchableSSD.forward`, with the pointwise layers as positions."""
        x, sources = self.relu(self.stem(normalized(images))), []
        blocks = zip(self.depthwise, self.pointwise, choices.unbind(1), strict=True)
        for index, (depthwise, pointwise, choice) in enumerate(blocks):
            x = self.relu(pointwise(self.relu(depthwise(x)), choice))
            if index in ssd.SOURCE_BLOCKS:
                sources.append(x)
        for reduce_channels, down in zip(self.reduce, self.down, strict=True):
            x = self.relu(down(self.relu(reduce_channels(x))))
            sources.append(x)

        def predict(heads: nn.ModuleList, values: int) -> Tensor:
            maps = (head(x).permute(0, 2, 3, 1) for head, x in zip(heads, sources, strict=True))
            return torch.cat([y.reshape(len(y), -1, values) for y in maps], 1)

        return SSDOutput(predict(self.box_heads, 4), predict(self.class_heads, self.classes))

    def loss(self, output: SSDOutput, boxes_xyxy: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Multibox loss, as `SwitchableSSD.loss`."""
        defaults = self.default_boxes_cxcywh
        matched_labels, boxes = match(box_convert(defaults, "cxcywh", "xyxy"), boxes_xyxy / self.image_size, labels)
        return multibox_loss(output.box_offsets, output.class_logits, encode(boxes, defaults), matched_labels)


def detections_of_image(
    box_offsets: Tensor, class_logits: Tensor, defaults_cxcywh: Tensor, image_size: int
) -> tuple[Tensor, Tensor]:
    """Detections of one image by a loop over classes, best first: boxes xyxy [D, 4] in pixels, labels [D].

    Args:
        box_offsets: [P, 4].
        class_logits: [P, C], class 0 is background.
        defaults_cxcywh: [P, 4] in units of the image side.
        image_size: side of the image in pixels.
    """
    boxes = clip_boxes_to_image(decode(box_offsets, defaults_cxcywh) * image_size, (image_size, image_size))
    scores = class_logits.softmax(-1)
    kept_boxes, kept_scores, kept_labels = [], [], []
    for label in range(1, scores.shape[1]):
        own = (scores[:, label] >= EVAL.score_threshold).nonzero().squeeze(1)
        own = own[scores[own, label].topk(min(EVAL.candidates_per_class, len(own))).indices]
        own = own[nms(boxes[own], scores[own, label], EVAL.nms_iou)]
        kept_boxes.append(boxes[own])
        kept_scores.append(scores[own, label])
        kept_labels.append(torch.full_like(own, label))
    best = torch.cat(kept_scores).argsort(descending=True)[: EVAL.max_detections]
    return torch.cat(kept_boxes)[best], torch.cat(kept_labels)[best]


def f1_of_image(boxes_xyxy: Tensor, labels: Tensor, gt_boxes_xyxy: Tensor, gt_labels: Tensor) -> float:
    """F1 of one image's detections by a loop; the image has objects [N], none of them difficult."""
    found = set()
    for box, label in zip(boxes_xyxy, labels, strict=True):
        overlap, index = torch.where(gt_labels == label, box_iou(box[None], gt_boxes_xyxy)[0], 0).max(0)
        if overlap >= VOC_IOU_THRESHOLD:
            found.add(int(index))
    return 2 * len(found) / (len(labels) + len(gt_labels))


def judge_in_loops(network: BaselineSSD, batch: Batch, choices: Tensor) -> Tensor:
    """Quality (F1) [B] under bit configurations [B, L], image by image."""
    output = network(batch.images, choices)
    qualities = []
    for index in range(len(batch.images)):
        boxes, labels = detections_of_image(
            output.box_offsets[index], output.class_logits[index], network.default_boxes_cxcywh, network.image_size
        )
        qualities.append(f1_of_image(boxes, labels, batch.boxes_xyxy[index], batch.labels[index]))
    return torch.tensor(qualities)
