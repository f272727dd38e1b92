"""Distillation: the quantized detector learns from the outputs of the full-precision one (Hinton et al., 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from instaqnas.detector.ssd import SSDOutput


def foreground(teacher: SSDOutput) -> Tensor:
    """The teacher's probability that a default box holds an object, 1 - p(background), [B, P]."""
    return 1 - teacher.class_logits.float().log_softmax(-1)[..., 0].exp()  # class 0 is background


def distillation_loss(student: SSDOutput, teacher: SSDOutput, positives: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the class distributions plus smooth-L1 between the box offsets, a scalar.

    The offsets of a default box are weighted by `foreground(teacher)`. Both sums are divided by
    max(1, sum of `foreground` over the batch): the soft counterpart of the number of positives in the multibox loss.

    Args:
        student, teacher: outputs for the same images, the teacher's without gradient.
        positives: sum of `foreground` over the whole batch, a scalar, if these images are only a part of it; None for
            the sum over these images.
    """
    teacher_log = teacher.class_logits.float().log_softmax(-1)
    student_log = student.class_logits.float().log_softmax(-1)
    weight = foreground(teacher)
    positives = (weight.sum() if positives is None else positives).clamp(min=1)
    kl = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    distance = F.smooth_l1_loss(student.box_offsets.float(), teacher.box_offsets.float(), reduction="none").sum(-1)
    return (kl + (weight * distance).sum()) / positives
