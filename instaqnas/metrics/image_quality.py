"""How well the objects of one image are detected, as one number an image: what the reward is made of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from instaqnas.metrics.matching import VOC_IOU_THRESHOLD, match_detections
from instaqnas.metrics.voc import average_precision_all_point, precision_recall

QualityKind = Literal["precision", "recall", "f1", "ap"]


def image_quality(
    kind: QualityKind,
    det_boxes_xyxy: Tensor,
    det_scores: Tensor,
    det_labels: Tensor,
    gt_boxes_xyxy: Tensor,
    gt_labels: Tensor,
    gt_difficult: Tensor,
    score_threshold: float,
    iou_threshold: float = VOC_IOU_THRESHOLD,
) -> Tensor:
    """Quality of the detections of each image: float32 [B] in [0, 1].

    Matches are those of `match_detections`, whose shapes these are: detections of a class that is not in the image are
    false positives, those of difficult objects count neither way. If no object counts, quality is 1 where no detection
    counts either, else 0; objects without any detection are 0.

    Args:
        kind: `precision`, true positives / detections; `recall`, true positives / objects; `f1`, their harmonic mean;
            `ap`, all-point average precision of the image, its classes pooled.
        score_threshold: detections below it do not count.
        iou_threshold: lowest IoU of a match.

    Raises:
        ValueError: unknown `kind`.
    """
    det_labels = torch.where(det_scores >= score_threshold, det_labels, 0)
    true_positive, ignored = match_detections(
        det_boxes_xyxy, det_scores, det_labels, gt_boxes_xyxy, gt_labels, gt_difficult, iou_threshold
    )
    counted = (det_labels > 0) & ~ignored
    found, detections = true_positive.sum(1), counted.sum(1)
    objects = ((gt_labels > 0) & ~gt_difficult).sum(1)
    some = objects.clamp(min=1)  # images without objects are set below
    if kind == "precision":
        quality = found / detections.clamp(min=1)
    elif kind == "recall":
        quality = found / some
    elif kind == "f1":
        quality = 2 * found / (detections + some)
    elif kind == "ap":
        quality = average_precision_all_point(*precision_recall(det_scores, true_positive, ~counted, some))
    else:
        raise ValueError(f"unknown quality {kind!r}")
    return torch.where(objects > 0, quality, detections == 0).float()
