"""The SSD loss (Liu et al., ECCV 2016, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEGATIVES_PER_POSITIVE = 3


def hard_negatives(background_loss: Tensor, positive: Tensor, min_negatives: int = 0) -> Tensor:
    """The negatives with the highest loss, three for each positive of the same image, bool [B, P].

    Args:
        background_loss: cross-entropy of each default box against class 0, [B, P].
        positive: bool [B, P].
        min_negatives: least number of negatives of an image, also of one without positives.
    """
    loss = background_loss.masked_fill(positive, -torch.inf)
    rank = loss.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = (NEGATIVES_PER_POSITIVE * positive.sum(1, keepdim=True)).clamp(min=min_negatives)
    return (rank < count) & ~positive


def multibox_loss(
    box_offsets: Tensor,
    class_logits: Tensor,
    targets: Tensor,
    labels: Tensor,
    positives: Tensor | None = None,
    *,
    min_negatives: int = 0,
) -> dict[str, Tensor]:
    """Smooth-L1 over positives, and cross-entropy over positives and hard negatives; their sum is minimised.

    Both are divided by max(1, positives in the batch), not by B. An image without objects has no positives, hence no
    negatives either unless `min_negatives` gives it some; otherwise it teaches nothing.

    Args:
        box_offsets: predicted offsets [B, P, 4].
        class_logits: [B, P, C], class 0 is background.
        targets: offsets of the matched objects [B, P, 4], arbitrary (even not finite) where the label is 0.
        labels: [B, P], 0 is background.
        positives: number of positives in the whole batch, a scalar, if these images are only a part of it; None to
            count them here.
        min_negatives: see `hard_negatives`.

    Returns: scalars `box` and `class`.
    """
    positives = ((labels > 0).sum() if positives is None else positives).clamp(min=1)
    box_sums, class_sums = _image_sums(box_offsets, class_logits, targets, labels, min_negatives)
    return {"box": box_sums.sum() / positives, "class": class_sums.sum() / positives}


@torch.no_grad()
def image_losses(
    box_offsets: Tensor, class_logits: Tensor, targets: Tensor, labels: Tensor, *, min_negatives: int = 0
) -> Tensor:
    """Multibox loss of each image, not divided by its positives, float32 [B]; arguments as in `multibox_loss`.

    The sum over objects makes an image with many objects count more, as it does in mAP. Without objects and
    `min_negatives` it is 0, whatever is predicted.
    """
    box_sums, class_sums = _image_sums(box_offsets, class_logits, targets, labels, min_negatives)
    return box_sums + class_sums


def _image_sums(
    box_offsets: Tensor, class_logits: Tensor, targets: Tensor, labels: Tensor, min_negatives: int
) -> tuple[Tensor, Tensor]:
    """Smooth-L1 over positives, and cross-entropy over positives and hard negatives of each image, float32 [B] each.

    Masks instead of indices: picking boxes by index would wait for a GPU.
    """
    positive = labels > 0
    targets = torch.where(positive[..., None], targets, box_offsets.detach())  # background targets may not be finite
    distances = F.smooth_l1_loss(box_offsets.float(), targets.float(), reduction="none")
    cross_entropy = F.cross_entropy(class_logits.transpose(1, 2).float(), labels, reduction="none")
    chosen = positive | hard_negatives(cross_entropy.detach(), positive, min_negatives)
    return distances.sum((1, 2)), torch.where(chosen, cross_entropy, 0.0).sum(1)
