"""Detection quality of each image as one number, the basis of the reward."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas.bits import QualityKind
from instaqnas.metrics.matching import VOC_IOU_THRESHOLD, match_detections
from instaqnas.metrics.voc import average_precision_all_point, precision_recall


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

    Difficult objects, and detections matched with them, are ignored. A detection of a class that is not in the image is
    a false positive. If all objects are ignored or there are none, the quality is 1 if no detection remains, else 0.
    An image with objects but no detections has quality 0.

    Args:
        kind: `precision`, true positives / detections; `recall`, true positives / objects; `f1`, their harmonic mean;
            `ap`, all-point average precision of the image over the pooled detections of all classes.
        det_boxes_xyxy, det_scores, det_labels: [B, D, 4], [B, D] and int64 [B, D]; label 0 is padding.
        gt_boxes_xyxy, gt_labels, gt_difficult: [B, N, 4], int64 [B, N] and bool [B, N]; label 0 is padding.
        score_threshold: detections with a lower score are ignored.
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
    positives = objects.clamp(min=1)  # avoids 0 / 0; the last line sets images without objects
    if kind == "precision":
        quality = found / detections.clamp(min=1)
    elif kind == "recall":
        quality = found / positives
    elif kind == "f1":
        quality = 2 * found / (detections + positives)
    elif kind == "ap":
        quality = average_precision_all_point(*precision_recall(det_scores, true_positive, ~counted, positives))
    else:
        raise ValueError(f"unknown quality {kind!r}")
    return torch.where(objects > 0, quality, detections == 0).float()
