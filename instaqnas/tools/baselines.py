"""What the benchmark compares the detector with: a plain network, and the published strategy.

The plain network is the full-precision detector in torch's own modules. The published strategy runs all K branches of
every switchable layer on every image and masks them; its rollout decodes, suppresses and matches image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from instaqnas.config import EvalConfig
from instaqnas.data.loader import Batch
from instaqnas.detector import ssd
from instaqnas.detector.default_boxes import decode
from instaqnas.detector.ssd import SSDOutput, SwitchableSSD
from instaqnas.metrics.matching import VOC_IOU_THRESHOLD
from instaqnas.pixels import normalized
from instaqnas.quant.quantizers import level_range
from instaqnas.quant.switchable import BitChoice, SwitchableConv2d

EVAL = EvalConfig()


class TorchConv(nn.Module):
    """A layer of the full-precision detector in torch's own modules: convolution, then BatchNorm or a bias.

    Args:
        layer: the layer, for shape and weights.
        bits: quantizes weight and input as LSQ does; None leaves them as they are.
    """

    def __init__(self, layer: SwitchableConv2d, bits: BitChoice | None = None) -> None:
        super().__init__()
        out, inputs, kernel, _ = layer.weight.shape
        settings = {"groups": layer.groups, "bias": layer.bias is not None}
        self.conv = nn.Conv2d(inputs * layer.groups, out, kernel, layer.stride, layer.padding, **settings)
        self.conv.load_state_dict(layer.state_dict(), strict=False)
        self.norm = nn.Identity()
        if layer.norm is not None:
            self.norm = nn.BatchNorm2d(out)
            self.norm.load_state_dict({name: v[0] for name, v in layer.norm.state_dict().items()}, strict=False)
        self.bits = bits
        if bits is not None:
            self.levels = level_range(bits[0], signed=True), level_range(bits[1], signed=layer.input_quantizer.signed)
            # LSQ's first step sizes; 0.4 is the mean of unit normal values behind a ReLU.
            magnitudes = layer.weight.detach().abs().mean().item(), 0.4
            steps = [2 * mean / math.sqrt(most) for mean, (_, most) in zip(magnitudes, self.levels, strict=True)]
            self.steps = nn.Parameter(torch.tensor(steps))

    def forward(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'], whatever the choice."""
        conv = self.conv
        if self.bits is None:
            return self.norm(conv(x))
        pairs = zip((conv.weight, x), self.steps, self.levels, strict=True)
        weight, x = (fake_quantize(*pair) for pair in pairs)
        return self.norm(F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, groups=conv.groups))


def fake_quantize(x: Tensor, step: Tensor, levels: tuple[int, int]) -> Tensor:
    """step * round(clip(x / step)) in torch operations: straight-through rounding, gradient of `step` scaled (LSQ)."""
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
        source: the detector in full precision, for shapes and weights.
        convert: builds a layer from the name of its group and the layer of `source`.
    """

    # They read nothing but the default boxes and the image size.
    loss, targets = SwitchableSSD.loss, SwitchableSSD.targets

    def __init__(self, source: SwitchableSSD, convert: Callable[[str, SwitchableConv2d], nn.Module]) -> None:
        super().__init__()
        self.classes, self.image_size = source.classes, source.image_size
        self.register_buffer("default_boxes_cxcywh", source.default_boxes_cxcywh, persistent=False)

        def modules(group: str, layers: Iterable[SwitchableConv2d]) -> nn.ModuleList:
            return nn.ModuleList(convert(group, layer) for layer in layers)

        blocks = source.backbone.blocks
        self.stem, self.relu = convert("stem", source.backbone.stem), nn.ReLU(inplace=True)
        self.depthwise = modules("depthwise", (block.depthwise for block in blocks))
        self.pointwise = modules("pointwise", (block.pointwise for block in blocks))
        self.reduce = modules("extras", (extra.reduce for extra in source.extras))
        self.down = modules("extras", (extra.down for extra in source.extras))
        self.box_heads, self.class_heads = modules("heads", source.box_heads), modules("heads", source.class_heads)

    def forward(self, images: Tensor, choices: Tensor) -> SSDOutput:
        """As `SwitchableSSD.forward` with the pointwise layers as positions."""
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


def detections_of_image(
    box_offsets: Tensor, class_logits: Tensor, defaults_cxcywh: Tensor, image_size: int
) -> tuple[Tensor, Tensor]:
    """Boxes xyxy [D, 4] in pixels and labels [D] of one image, best first, by a loop over classes."""
    boxes = clip_boxes_to_image(decode(box_offsets, defaults_cxcywh) * image_size, (image_size, image_size))
    scores, found = class_logits.softmax(-1), []
    for label in range(1, scores.shape[1]):
        own = (scores[:, label] >= EVAL.score_threshold).nonzero().squeeze(1)
        own = own[scores[own, label].topk(min(EVAL.candidates_per_class, len(own))).indices]
        own = own[nms(boxes[own], scores[own, label], EVAL.nms_iou)]
        found.append((boxes[own], scores[own, label], torch.full_like(own, label)))
    boxes, scores, labels = map(torch.cat, zip(*found, strict=True))
    best = scores.argsort(descending=True)[: EVAL.max_detections]
    return boxes[best], labels[best]


def f1_of_image(boxes_xyxy: Tensor, labels: Tensor, gt_boxes_xyxy: Tensor, gt_labels: Tensor) -> float:
    """F1 of the detections of one image with objects, none of them difficult, by a loop over detections."""
    found = set()
    for box, label in zip(boxes_xyxy, labels, strict=True):
        overlap, index = torch.where(gt_labels == label, box_iou(box[None], gt_boxes_xyxy)[0], 0).max(0)
        if overlap >= VOC_IOU_THRESHOLD:
            found.add(int(index))
    return 2 * len(found) / (len(labels) + len(gt_labels))


def judge_in_loops(network: BaselineSSD, batch: Batch, choices: Tensor) -> Tensor:
    """Quality [B] under bit configurations [B, L], image by image."""
    output, qualities = network(batch.images, choices), []
    for offsets, logits, *objects in zip(
        output.box_offsets, output.class_logits, batch.boxes_xyxy, batch.labels, strict=True
    ):
        found = detections_of_image(offsets, logits, network.default_boxes_cxcywh, network.image_size)
        qualities.append(f1_of_image(*found, *objects))
    return torch.tensor(qualities)
