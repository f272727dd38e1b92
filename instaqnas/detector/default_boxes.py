"""Default boxes of SSD: their places and sizes, the matching of objects to them, and the encoding of boxes.

Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

ASPECT_RATIOS = (2, 3)
BOXES_PER_CELL = 2 + 2 * len(ASPECT_RATIOS)
CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
MATCH_IOU = 0.5

# The published MobileNetV1-SSD, in pixels: strides of the six maps, and box sizes; map k takes sizes k and k + 1.
STRIDES = {300: (16, 32, 64, 100, 150, 300), 224: (16, 32, 56, 112, 224, 224), 112: (16, 28, 56, 112, 112, 112)}
RANGE_ENDS = {
    300: (60, 105, 150, 195, 240, 285, 330),
    224: (44, 78, 112, 145, 179, 212, 246),
    112: (22, 39, 56, 72, 89, 106, 123),
}


def size_ranges(image_size: int) -> list[tuple[int, int]]:
    """(smaller, larger) default-box size of each of the six maps in pixels, about 20 % to 110 % of the image."""
    ends = RANGE_ENDS.get(image_size) or [image_size * (20 + 15 * k) // 100 for k in range(7)]
    return list(zip(ends, ends[1:], strict=False))


def default_boxes(image_size: int, maps: Sequence[int], box_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """Default boxes as (centre x, centre y, width, height) in units of the image side, clamped to [0, 1].

    The six boxes of a cell, for a map of sizes s < t and aspect ratios r = 2, 3: s x s, sqrt(s t) x sqrt(s t), and
    (s sqrt r) x (s / sqrt r) with its transpose for each r. Maps follow each other, cells run row by row.

    Args:
        image_size: side of the image in pixels.
        maps: cells per side of the six feature maps.
        box_sizes: (smaller, larger) size of each map in pixels; None for `size_ranges(image_size)`.

    Returns: [P, 4], P = 6 * sum(maps ** 2).
    """
    box_sizes = box_sizes or size_ranges(image_size)
    strides = STRIDES.get(image_size) or [image_size / cells for cells in maps]
    boxes = []
    for cells, stride, (size, larger) in zip(maps, strides, box_sizes, strict=True):
        mean = math.sqrt(size * larger)
        shapes = [(size, size), (mean, mean)]
        for ratio in ASPECT_RATIOS:
            long, short = size * math.sqrt(ratio), size / math.sqrt(ratio)
            shapes += [(long, short), (short, long)]
        centers = (torch.arange(cells, dtype=torch.float64) + 0.5) * stride
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        grid = torch.stack([x, y], -1)[:, :, None].expand(-1, -1, len(shapes), -1)
        sizes = torch.tensor(shapes, dtype=torch.float64).expand(cells, cells, -1, -1)
        boxes.append(torch.cat([grid, sizes], -1).reshape(-1, 4))
    return (torch.cat(boxes) / image_size).clamp(0, 1).float()


def encode(boxes_xyxy: Tensor, defaults_cxcywh: Tensor) -> Tensor:
    """Offsets [..., P, 4] of boxes [..., P, 4] from the default boxes [P, 4], all in units of the image side."""
    boxes = box_convert(boxes_xyxy, "xyxy", "cxcywh")
    centers = (boxes[..., :2] - defaults_cxcywh[:, :2]) / defaults_cxcywh[:, 2:] / CENTER_VARIANCE
    sizes = torch.log(boxes[..., 2:] / defaults_cxcywh[:, 2:]) / SIZE_VARIANCE
    return torch.cat([centers, sizes], -1)


def decode(offsets: Tensor, defaults_cxcywh: Tensor) -> Tensor:
    """Boxes xyxy [..., P, 4] in units of the image side: the inverse of `encode`."""
    centers = offsets[..., :2] * CENTER_VARIANCE * defaults_cxcywh[:, 2:] + defaults_cxcywh[:, :2]
    sizes = torch.exp(offsets[..., 2:] * SIZE_VARIANCE) * defaults_cxcywh[:, 2:]
    return box_convert(torch.cat([centers, sizes], -1), "cxcywh", "xyxy")


def match(defaults_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Assigns objects to default boxes, batched.

    A default box takes the object with which it has the highest IoU, if that is 0.5 or more. In addition every object
    gets the default box with which it has the highest IoU, however low; if several objects share that box, the last one
    gets it.

    Args:
        defaults_xyxy: [P, 4].
        boxes_xyxy: [B, N, 4] in the same units.
        labels: [B, N], 0 for padding.

    Returns: labels [B, P], 0 for background, and boxes [B, P, 4], arbitrary where the label is 0.
    """
    images, objects = labels.shape
    if objects == 0:
        shape = (images, len(defaults_xyxy))
        return labels.new_zeros(shape), boxes_xyxy.new_zeros(*shape, 4)
    iou = box_iou(boxes_xyxy.reshape(-1, 4), defaults_xyxy).view(images, objects, -1)
    iou = iou.masked_fill((labels == 0)[..., None], -1.0)
    best_iou, best_object = iou.max(1)  # [B, P]
    forced = torch.full_like(best_object, -1)
    order = torch.arange(objects, device=labels.device).expand(images, -1).masked_fill(labels == 0, -1)
    forced.scatter_reduce_(1, iou.argmax(2), order, "amax")
    taken = torch.where(forced >= 0, forced, best_object)
    positive = (forced >= 0) | (best_iou >= MATCH_IOU)
    matched_labels = torch.where(positive, labels.gather(1, taken), 0)
    return matched_labels, boxes_xyxy.gather(1, taken[..., None].expand(-1, -1, 4))
