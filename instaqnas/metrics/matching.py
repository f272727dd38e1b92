"""Matching of detections with objects by the rules of the PASCAL VOC devkit, for a whole batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

VOC_IOU_THRESHOLD = 0.5


class Matches(NamedTuple):
    """Outcome of each detection; a detection in neither mask is a false positive, unless it is padding.

    true_positive: bool [B, D].
    ignored: bool [B, D], matched with a difficult object: neither a true nor a false positive.
    """

    true_positive: Tensor
    ignored: Tensor


def match_detections(
    det_boxes_xyxy: Tensor,
    det_scores: Tensor,
    det_labels: Tensor,
    gt_boxes_xyxy: Tensor,
    gt_labels: Tensor,
    gt_difficult: Tensor,
    iou_threshold: float = VOC_IOU_THRESHOLD,
) -> Matches:
    """Matches detections one-to-one with objects of the same class and image.

    Each detection is assigned to the object with the highest IoU, difficult objects included, if that IoU reaches the
    threshold. A detection assigned to a difficult object is ignored. Of the detections assigned to any other object,
    the one with the highest score is the true positive. Ties go to the first object or detection.

    Args:
        det_boxes_xyxy: [B, D, 4], in any order.
        det_scores: [B, D].
        det_labels: int64 [B, D], 0 is padding.
        gt_boxes_xyxy: [B, N, 4], in the units of `det_boxes_xyxy`.
        gt_labels: int64 [B, N], 0 is padding.
        gt_difficult: bool [B, N].
        iou_threshold: lowest IoU of a match, above 0.

    Source: VOCevaldet.m of the VOC2007 devkit, which asks for overlap >= 0.5.
    """
    # vmap, because box_iou takes batches only since torchvision 0.24.
    iou = torch.vmap(box_iou)(det_boxes_xyxy, gt_boxes_xyxy)  # [B, D, N]
    same_class = (det_labels[:, :, None] == gt_labels[:, None, :]) & (det_labels > 0)[:, :, None]
    # Padded boxes have no area, so their IoU may be NaN, which max would return. The comparison turns it into -1.
    iou = torch.where(same_class & (iou >= iou_threshold), iou, -1.0)
    # One more object that nothing matches, so that max also works for N = 0.
    best_iou, best_gt = F.pad(iou, (0, 1), value=-1.0).max(dim=2)
    found = best_iou >= 0
    ignored = found & F.pad(gt_difficult, (0, 1)).gather(1, best_gt)
    claims = found & ~ignored

    lowest_rank = det_scores.shape[1]
    rank = det_scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    rank = torch.where(claims, rank, lowest_rank)
    objects = (len(gt_labels), gt_labels.shape[1] + 1)
    first_rank = rank.new_full(objects, lowest_rank).scatter_reduce(1, best_gt, rank, "amin")
    return Matches(claims & (rank == first_rank.gather(1, best_gt)), ignored)
