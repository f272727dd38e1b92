"""The distillation loss against a naive loop and hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch

from instaqnas.detector.distillation import distillation_loss
from instaqnas.detector.ssd import SSDOutput


def random_output(seed: int, *, images: int = 3, boxes: int = 20) -> SSDOutput:
    random = torch.Generator().manual_seed(seed)
    return SSDOutput(
        2 * torch.randn(images, boxes, 4, generator=random), 3 * torch.randn(images, boxes, 5, generator=random)
    )


def probabilities(logits: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def naive_loss(student: SSDOutput, teacher: SSDOutput) -> float:
    total = mass = 0.0
    for image in range(len(teacher.class_logits)):
        for box in range(teacher.class_logits.shape[1]):
            wanted, got = (probabilities(o.class_logits[image, box].tolist()) for o in (teacher, student))
            total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(wanted, got, strict=True))
            pairs = zip(*(o.box_offsets[image, box].tolist() for o in (teacher, student)), strict=True)
            distances = [abs(a - b) for a, b in pairs]
            total += (1 - wanted[0]) * sum(0.5 * d * d if d < 1 else d - 0.5 for d in distances)
            mass += 1 - wanted[0]
    return total / max(1.0, mass)


def test_loss_equals_a_naive_loop() -> None:
    student, teacher = random_output(0), random_output(1)
    assert distillation_loss(student, teacher).item() == pytest.approx(naive_loss(student, teacher), rel=1e-5)


def test_one_box_by_hand_is_divided_by_one_at_least() -> None:
    # Teacher: background 3/4, class 1/4. Student: 1/2 each. Offsets differ by 0.5 and 2.
    teacher = SSDOutput(torch.tensor([[[0.0, 0, 0, 0]]]), torch.tensor([[[math.log(3.0), 0.0]]]))
    student = SSDOutput(torch.tensor([[[0.5, -2.0, 0, 0]]]), torch.zeros(1, 1, 2))
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_loss(student, teacher).item() == pytest.approx(kl + 0.25 * (0.125 + 1.5), rel=1e-5)


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    teacher = random_output(2)
    shifted = SSDOutput(teacher.box_offsets, teacher.class_logits + 7)  # the same distributions
    assert distillation_loss(shifted, teacher).item() == pytest.approx(0, abs=1e-5)


def test_box_offsets_count_only_where_the_teacher_has_foreground() -> None:
    logits = torch.tensor([[[200.0, 0.0], [0.0, 200.0]]])  # certain background, certain object
    teacher = SSDOutput(torch.zeros(1, 2, 4), logits)
    offsets = torch.full((1, 2, 4), 3.0, requires_grad=True)
    distillation_loss(SSDOutput(offsets, logits), teacher).backward()
    assert offsets.grad.tolist() == [[[0.0] * 4, [1.0] * 4]]


def test_a_batch_twice_as_large_has_the_same_loss() -> None:
    student, teacher = random_output(3), random_output(4)
    twice = (SSDOutput(o.box_offsets.repeat(2, 1, 1), o.class_logits.repeat(2, 1, 1)) for o in (student, teacher))
    torch.testing.assert_close(distillation_loss(*twice), distillation_loss(student, teacher))
