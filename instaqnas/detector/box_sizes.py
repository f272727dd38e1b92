"""How well default boxes fit objects, and default-box sizes that fit better.

An object without a default box at IoU 0.5 or more gets a single positive, its best default box, however poor
(`default_boxes.match`), so it is learned badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from instaqnas.config.ranges import BoxSizes
from instaqnas.detector.default_boxes import BOXES_PER_CELL, MATCH_IOU, default_boxes, size_ranges

SIZE_EDGES = (16, 32, 64, 128)  # pixels of the network's input
CHUNK = 256  # objects whose IoUs are held in memory at once
SEARCH_OBJECTS, SEARCH_OBJECTS_OF_CLASS = 400, 10  # at least
QUANTILES = 16
LARGER = (1.2, 1.6, 2.5, 4)  # larger / smaller size of a map
MAX_ROUNDS = 20


class SizeCoverage(NamedTuple):
    """Objects whose side, the square root of their area, is at least `lower` and below `upper` pixels.

    `covered` of these `objects` have a default box at IoU 0.5 or more.
    """

    lower: float
    upper: float
    objects: int
    covered: int


def best_ious(defaults_cxcywh: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """The highest IoU of each box with a default box, float32 [N].

    Args:
        defaults_cxcywh: [P, 4] in units of the image side.
        boxes_xyxy: [N, 4] in the same units.
    """
    defaults_xyxy = box_convert(defaults_cxcywh, "cxcywh", "xyxy")
    parts = [box_iou(part, defaults_xyxy).amax(1) for part in boxes_xyxy.split(CHUNK) if len(part)]
    return torch.cat(parts) if parts else boxes_xyxy.new_zeros(0)


def coverage_by_size(best_iou: Tensor, boxes_xyxy: Tensor) -> list[SizeCoverage]:
    """Number of objects, and of those that default boxes cover, by size.

    Args:
        best_iou: of each object with a default box, [N].
        boxes_xyxy: [N, 4] in pixels of the network's input.
    """
    side = _sides(boxes_xyxy)
    rows = []
    for lower, upper in zip((0, *SIZE_EDGES), (*SIZE_EDGES, torch.inf), strict=True):
        chosen = (side >= lower) & (side < upper)
        rows.append(SizeCoverage(lower, upper, int(chosen.sum()), int((best_iou[chosen] >= MATCH_IOU).sum())))
    return rows


def class_coverage(best_iou: Tensor, labels: Tensor) -> float:
    """Share of the objects with a default box at IoU 0.5 or more, the mean over the classes that have objects.

    A mean over objects would hide a rare class of small objects, which counts in mAP as much as any other.

    Args:
        best_iou: of each object with a default box, [N].
        labels: [N], N > 0.
    """
    return _coverage(best_iou, _class_weights(labels)).item()


def fitting_box_sizes(
    boxes_xyxy: Tensor, labels: Tensor, image_size: int, maps: Sequence[int], current: Sequence[BoxSizes] | None
) -> list[BoxSizes]:
    """Default-box sizes with a high `class_coverage`, from a local search on the real grid.

    Candidates are quantiles of the objects' sides. From the current sizes, from the unset ones and from spread
    candidates, the sizes of one map after the other are replaced by the best candidate until none is better. Smaller
    sizes stay on finer maps.

    Args:
        boxes_xyxy: [N, 4] in pixels of the network's input, N > 0.
        labels: [N].
        image_size: side of the network's input in pixels.
        maps: cells per side of the feature maps, fine to coarse.
        current: sizes in use; None for `size_ranges(image_size)`.

    Returns: a pair (smaller, larger) for each map, in whole pixels, for the setting `detector.box_sizes`.
    """
    sampled = _sample(labels)
    boxes_xyxy, weights = boxes_xyxy[sampled], _class_weights(labels[sampled])
    own, unset = [*(current or size_ranges(image_size))], size_ranges(image_size)
    candidates = sorted({*_candidates(boxes_xyxy, image_size), *own, *unset})
    iou = torch.stack([_ious_by_map(pair, boxes_xyxy, image_size, maps) for pair in candidates])  # [pairs, maps, N]
    spread = torch.linspace(0, len(candidates) - 1, len(maps)).round().long().tolist()
    starts = [spread, *([candidates.index(pair) for pair in pairs] for pairs in (own, unset))]
    found = [_ascend(iou, weights, start) for start in starts if start == sorted(start)]
    best = max(found, key=lambda chosen: _quality(iou, weights, chosen))
    return [candidates[index] for index in best]


def _sides(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1).sqrt()


def _sample(labels: Tensor) -> Tensor:
    """Indices of evenly spaced objects, equally many of each class where there are enough."""
    classes = labels.unique().tolist()
    most = max(SEARCH_OBJECTS_OF_CLASS, SEARCH_OBJECTS // len(classes))
    indices = [(labels == label).nonzero().flatten() for label in classes]
    return torch.cat([of_class[:: max(1, len(of_class) // most)][:most] for of_class in indices])


def _class_weights(labels: Tensor) -> Tensor:
    """Weights of the objects [N] with the same sum for each class; all together they are 1."""
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    return 1 / (counts.double() * len(counts))[place]


def _candidates(boxes_xyxy: Tensor, image_size: int) -> list[BoxSizes]:
    sides = _sides(boxes_xyxy).quantile(torch.linspace(0.01, 0.99, QUANTILES)).clamp(min=2, max=image_size)
    smaller = {round(side) for side in sides.tolist()}
    return [(size, max(size + 1, round(size * ratio))) for size in smaller for ratio in LARGER]


def _ious_by_map(pair: BoxSizes, boxes_xyxy: Tensor, image_size: int, maps: Sequence[int]) -> Tensor:
    """The highest IoU of each object with a default box of each map if that has the sizes `pair`, [maps, N]."""
    defaults = default_boxes(image_size, maps, [pair] * len(maps))
    counts = [BOXES_PER_CELL * cells**2 for cells in maps]
    return torch.stack([best_ious(part, boxes_xyxy / image_size) for part in defaults.split(counts)])


def _coverage(best_iou: Tensor, weights: Tensor) -> Tensor:
    return ((best_iou >= MATCH_IOU) * weights).sum()


def _quality(iou: Tensor, weights: Tensor, chosen: Sequence[int]) -> float:
    """Class coverage of one candidate for each map; the mean IoU decides between equals."""
    best = iou[list(chosen), range(len(chosen))].amax(0)
    return (_coverage(best, weights) + 1e-3 * (best * weights).sum()).item()


def _ascend(iou: Tensor, weights: Tensor, chosen: Sequence[int]) -> list[int]:
    """Candidate of each map after coordinate ascent from `chosen`; candidates are sorted and stay so over the maps."""
    best = list(chosen)
    for _ in range(MAX_ROUNDS):
        before = list(best)
        for level in range(len(best)):
            lowest = best[level - 1] if level else 0
            highest = best[level + 1] if level + 1 < len(best) else len(iou) - 1
            tried = [[*best[:level], index, *best[level + 1 :]] for index in range(lowest, highest + 1)]
            best = max([best, *tried], key=lambda sizes: _quality(iou, weights, sizes))
        if best == before:
            break
    return best
