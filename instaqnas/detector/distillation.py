"""Distillation: a quantized detector learns the outputs of the full-precision one (Hinton et al., 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from instaqnas.detector.ssd import SSDOutput


def distillation_loss(student: SSDOutput, teacher: SSDOutput) -> Tensor:
    """KL(teacher || student) of the class distributions and smooth-L1 between the box offsets, a scalar.

    The offsets of a default box count as much as the teacher takes it for foreground. Both sums are divided by
    max(1, foreground probabilities of the batch summed): the teacher's count of positives, where the multibox loss has
    the true one.

    Args:
        student, teacher: outputs for the same images, the teacher's without gradient.
    """
    teacher_log = teacher.class_logits.float().log_softmax(-1)
    student_log = student.class_logits.float().log_softmax(-1)
    foreground = 1 - teacher_log[..., 0].exp()  # [B, P], class 0 is background
    kl = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    distance = F.smooth_l1_loss(student.box_offsets.float(), teacher.box_offsets.float(), reduction="none").sum(-1)
    return (kl + (foreground * distance).sum()) / foreground.sum().clamp(min=1)
