"""PASCAL VOC mean average precision: records -> matches -> precision and recall -> AP -> mAP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from instaqnas.metrics.matching import match_detections

LEARNED = 0.01  # mAP, 0 to 1; a detector that never rises above it has learned nothing


class RecordBatch(NamedTuple):
    """Detections and objects of B images on the CPU, padded with label 0: the arguments of `match_detections`."""

    det_boxes_xyxy: Tensor
    det_scores: Tensor
    det_labels: Tensor
    gt_boxes_xyxy: Tensor
    gt_labels: Tensor
    gt_difficult: Tensor


class DetectionRecords:
    """Detections and objects of a split, collected batch by batch for `voc_map` and `coco_ap`.

    image_ids: of all images, in the order of `batches`.
    batches: the `RecordBatch` of each call of `add`.
    """

    def __init__(self) -> None:
        self.image_ids: list[str] = []
        self.batches: list[RecordBatch] = []

    def add(
        self,
        image_ids: Sequence[str],
        det_boxes_xyxy: Tensor,
        det_scores: Tensor,
        det_labels: Tensor,
        gt_boxes_xyxy: Tensor,
        gt_labels: Tensor,
        gt_difficult: Tensor,
    ) -> None:
        """Adds B images; shapes as in `match_detections`, on any device, all boxes of an image in the same units.

        Raises:
            ValueError: a tensor has another number of images than `image_ids`.
        """
        batch = (det_boxes_xyxy, det_scores, det_labels, gt_boxes_xyxy, gt_labels, gt_difficult)
        if any(len(tensor) != len(image_ids) for tensor in batch):
            raise ValueError(f"{len(image_ids)} image ids for batches of {[len(tensor) for tensor in batch]}")
        self.image_ids += image_ids
        self.batches.append(RecordBatch(*(tensor.detach().cpu() for tensor in batch)))


class MatchedDetections(NamedTuple):
    """The D detections of a split, each matched within its image.

    scores: float32 [D].
    labels: int64 [D], 1 for the first class.
    true_positive: bool [D].
    ignored: bool [D], detections that do not count.
    images: int64 [D], the number of the image.
    """

    scores: Tensor
    labels: Tensor
    true_positive: Tensor
    ignored: Tensor
    images: Tensor


@dataclass(frozen=True)
class VocResult:
    """mAP, and AP by class name, in [0, 1].

    AP is NaN for a class without objects that count (none, or all difficult), and the mean leaves it out. mAP is NaN if
    that holds for all classes.
    """

    map_11pt: float
    map_all_point: float
    ap_11pt: dict[str, float]
    ap_all_point: dict[str, float]


def precision_recall(
    scores: Tensor, true_positive: Tensor, ignored: Tensor, positives: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Precision and recall after each detection, in the order of descending scores (of equals the first comes first).

    An ignored detection keeps its place and repeats the values before it, 0 and 0 at the beginning.

    Args:
        scores: [..., D].
        true_positive: bool [..., D].
        ignored: bool [..., D], detections that do not count, padding included.
        positives: number of objects that count, at least 1: a number or a tensor [...].

    Returns:
        Precision and recall, float64 [..., D].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    found = true_positive.gather(-1, order).double().cumsum(-1)
    counted = (~ignored).gather(-1, order).double().cumsum(-1)
    return found / counted.clamp(min=1), found / torch.as_tensor(positives, device=scores.device)[..., None]


def average_precision_11_point(precision: Tensor, recall: Tensor) -> Tensor:
    """Mean over the recalls r = 0, 0.1, ..., 1 of the highest precision at a recall >= r: float64 [...] in [0, 1].

    `precision` and `recall` [..., D] as `precision_recall` returns them. Source: VOC2007 (Everingham et al., IJCV 2010,
    section 4.2).
    """
    # Not linspace or steps of 0.1: their 0.3 is slightly more than 3 / 10, so 3 of 10 objects would not reach it.
    points = torch.arange(11, dtype=recall.dtype, device=recall.device) / 10
    first = torch.searchsorted(recall.contiguous(), points.expand(*recall.shape[:-1], 11).contiguous())
    return F.pad(_envelope(precision), (0, 1)).gather(-1, first).mean(-1)


def average_precision_all_point(precision: Tensor, recall: Tensor) -> Tensor:
    """Area under the precision-recall curve, with the highest precision at a recall >= r: float64 [...] in [0, 1].

    `precision` and `recall` [..., D] as `precision_recall` returns them. Source: VOC2010 and later devkits.
    """
    return (F.pad(recall, (1, 0)).diff(dim=-1) * _envelope(precision)).sum(-1)


def voc_map(records: DetectionRecords, class_names: Sequence[str]) -> VocResult:
    """VOC mAP at IoU 0.5, with both kinds of AP.

    Args:
        records: all images of the split.
        class_names: without background; label k is `class_names[k - 1]`.
    """
    scores, labels, true_positive, ignored, _ = match_all(records)
    counts = count_objects(records, len(class_names)).sum(0).tolist()
    ap_11pt, ap_all_point = {}, {}
    for label, (name, positives) in enumerate(zip(class_names, counts, strict=True), start=1):
        ap_11pt[name] = ap_all_point[name] = math.nan
        if positives:
            own = labels == label
            precision, recall = precision_recall(scores[own], true_positive[own], ignored[own], positives)
            ap_11pt[name] = average_precision_11_point(precision, recall).item()
            ap_all_point[name] = average_precision_all_point(precision, recall).item()
    return VocResult(_mean_of_known(ap_11pt), _mean_of_known(ap_all_point), ap_11pt, ap_all_point)


def _envelope(precision: Tensor) -> Tensor:
    """The highest precision from each detection on, [..., D]."""
    return precision.flip(-1).cummax(-1).values.flip(-1)


def match_all(records: DetectionRecords) -> MatchedDetections:
    """Matches the detections of all images, in their order."""
    none = torch.zeros(0, dtype=torch.bool)
    parts = [MatchedDetections(torch.zeros(0), none.long(), none, none, none.long())]  # for a split without batches
    first_image = 0
    for batch in records.batches:
        matches, valid = match_detections(*batch), batch.det_labels > 0
        images = first_image + valid.nonzero()[:, 0]
        first_image += len(valid)
        parts.append(
            MatchedDetections(
                batch.det_scores[valid],
                batch.det_labels[valid],
                matches.true_positive[valid],
                matches.ignored[valid],
                images,
            )
        )
    return MatchedDetections(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def count_objects(records: DetectionRecords, classes: int) -> Tensor:
    """Objects of each image and class that are not difficult, int64 [N, C] without background."""
    counts = [torch.zeros(0, classes, dtype=torch.int64)]
    for batch in records.batches:
        labels = batch.gt_labels.masked_fill(batch.gt_difficult, 0)  # 0: padding
        counts.append(F.one_hot(labels, classes + 1).sum(1)[:, 1:])
    return torch.cat(counts)


def _mean_of_known(ap: dict[str, float]) -> float:
    return torch.tensor(list(ap.values()), dtype=torch.float64).nanmean().item()
