"""Distillation: a quantized detector learns the outputs of the full-precision one (Hinton et al., 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from instaqnas.detector.ssd import SSDOutput


def foreground(teacher: SSDOutput) -> Tensor:
    """How far the teacher takes each default box for an object, 0 to 1, [B, P]."""
    return 1 - teacher.class_logits.float().log_softmax(-1)[..., 0].exp()  # class 0 is background


def distillation_loss(student: SSDOutput, teacher: SSDOutput, positives: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the class distributions and smooth-L1 between the box offsets, a scalar.

    The offsets of a default box count as much as the teacher takes it for foreground. Both sums are divided by
    max(1, foreground probabilities of the batch summed): the teacher's count of positives, where the multibox loss has
    the true one.

    Args:
        student, teacher: outputs for the same images, the teacher's without gradient.
        positives: foreground probabilities of the whole batch summed, a scalar, where these images are a part of it;
            None sums up those here.
    """
    teacher_log = teacher.class_logits.float().log_softmax(-1)
    student_log = student.class_logits.float().log_softmax(-1)
    weight = foreground(teacher)
    positives = (weight.sum() if positives is None else positives).clamp(min=1)
    kl = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    distance = F.smooth_l1_loss(student.box_offsets.float(), teacher.box_offsets.float(), reduction="none").sum(-1)
    return (kl + (weight * distance).sum()) / positives
