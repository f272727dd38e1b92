"""The SSD loss (Liu et al., ECCV 2016, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEGATIVES_PER_POSITIVE = 3


def hard_negatives(background_loss: Tensor, positive: Tensor) -> Tensor:
    """The three negatives per positive of each image with the highest loss, bool [B, P].

    Args:
        background_loss: cross-entropy of each default box against class 0, [B, P].
        positive: bool [B, P].
    """
    loss = background_loss.masked_fill(positive, -torch.inf)
    rank = loss.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < NEGATIVES_PER_POSITIVE * positive.sum(1, keepdim=True)) & ~positive


def multibox_loss(
    box_offsets: Tensor, class_logits: Tensor, targets: Tensor, labels: Tensor, positives: Tensor | None = None
) -> dict[str, Tensor]:
    """Smooth-L1 over positives and cross-entropy over positives and hard negatives; the sum is to be minimised.

    Both are divided by max(1, positives in the batch), not by B. An image without objects has no positives and
    thereby no negatives either.

    Args:
        box_offsets: predicted offsets [B, P, 4].
        class_logits: [B, P, C], class 0 is background.
        targets: offsets of the matched objects [B, P, 4], arbitrary (even not finite) where the label is 0.
        labels: [B, P], 0 is background.
        positives: those of the whole batch, a scalar, where these images are a part of it; None counts those here.

    Returns: scalars `box` and `class`.
    """
    positive = labels > 0
    cross_entropy, chosen = _class_loss(class_logits, labels)
    positives = (positive.sum() if positives is None else positives).clamp(min=1)
    box_loss = F.smooth_l1_loss(box_offsets[positive].float(), targets[positive], reduction="sum")
    return {"box": box_loss / positives, "class": cross_entropy[chosen].sum() / positives}


@torch.no_grad()
def image_losses(box_offsets: Tensor, class_logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """What each image adds to the sum that `multibox_loss` divides by the positives of the batch, float32 [B].

    It grows with the objects of the image, as mAP does with what is found of them; 0 without any, whatever is predicted
    there. Arguments as those of `multibox_loss`.
    """
    positive = labels > 0
    cross_entropy, chosen = _class_loss(class_logits, labels)
    targets = torch.where(positive[..., None], targets, box_offsets)  # elsewhere they may not even be finite
    box_loss = F.smooth_l1_loss(box_offsets.float(), targets.float(), reduction="none").sum((1, 2))
    class_loss = torch.where(chosen, cross_entropy, 0.0).sum(1)
    return box_loss + class_loss


def _class_loss(class_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every default box, and which of them count: positives and hard negatives; both [B, P]."""
    positive = labels > 0
    cross_entropy = F.cross_entropy(class_logits.transpose(1, 2).float(), labels, reduction="none")
    return cross_entropy, positive | hard_negatives(cross_entropy.detach(), positive)
