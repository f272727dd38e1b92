"""One step of the detector: clipped gradients, parts of a batch, a teacher, and values that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from instaqnas.bits import QuantizerName
from instaqnas.data.loader import Batch
from instaqnas.detector.distillation import distillation_loss
from instaqnas.detector.ssd import DetectorBits, SSDOutput, SwitchableSSD
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import ChooseBits, fixed
from instaqnas.quant.switchable import calibrate
from instaqnas.seeds import SampleKey
from instaqnas.training.detector_step import DistillLoss, Parameters, Teacher, detector_step
from instaqnas.training.state import EpochSums

CONFIG = [0, 1] * 6 + [0]
KEYS = [SampleKey(0, 0), SampleKey(0, 1)]


def random_batch() -> Batch:
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[5.0, 5, 40, 40]], [[20.0, 10, 60, 50]]])
    return Batch(images, boxes, torch.tensor([[1], [2]]), torch.zeros(2, 1, dtype=torch.bool), ["a", "b"], KEYS)


def train_one_step(
    clip_grad_norm: float,
    teacher: Teacher | None = None,
    batch: Batch | None = None,
    accumulate: int = 1,
    quantizer: QuantizerName = "lsq_plus",
    step: int = 0,
    choose_student: ChooseBits | None = None,
) -> tuple[dict[str, Tensor], EpochSums]:
    """How far every parameter moves in one step of SGD at learning rate 1, and what the epoch measures."""
    torch.manual_seed(0)
    bits = DetectorBits([(2, 2), (4, 4)], (8, 8), (8, 8), (4, 4), (8, 8), quantizer=quantizer)
    detector = SwitchableSSD(3, bits, image_size=64, width=0.125)
    first = random_batch()
    calibrate(detector, lambda: detector(first.images, fixed(CONFIG)(first.images, KEYS)))
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.endswith("log_alpha"):
                parameter -= 4  # PACT learns where it clips
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    optimizer = torch.optim.SGD(detector.parameters(), lr=1.0)
    sums = EpochSums()
    detector.train()
    result = detector_step(
        detector,
        batch or first,
        fixed(CONFIG),
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        parameters=Parameters.of(detector),
        accumulate=accumulate,
        clip_grad_norm=clip_grad_norm,
        teacher=teacher,
        choose_student=choose_student,
        step=step,
    )
    sums.add(result.losses, result.images, result.choices)
    return {name: p.detach() - before[name] for name, p in detector.named_parameters()}, sums


@pytest.mark.parametrize("quantizer", ["lsq_plus", "pact"])  # the end that PACT learns has a sum for its gradient
def test_gradients_of_quantizers_are_clipped_on_their_own(quantizer: QuantizerName) -> None:
    free, clipped = (train_one_step(norm, quantizer=quantizer)[0] for norm in (0.0, 0.01))
    for in_group in (lambda name: "quantizer" in name, lambda name: "quantizer" not in name):
        names = [name for name in free if in_group(name)]
        norms = [torch.cat([moves[name].flatten() for name in names]).norm().item() for moves in (free, clipped)]
        assert norms[0] > 0.1
        assert norms[1] == pytest.approx(0.01, rel=1e-3)
        for name in names:  # scaled, not bent
            torch.testing.assert_close(clipped[name], free[name] * 0.01 / norms[0], rtol=1e-2, atol=1e-6)


def test_parts_of_a_batch_have_the_gradients_of_the_whole() -> None:
    """Parts of the same images, so that BatchNorm is not to be seen; of other objects, so that positives differ."""
    pair = random_batch()
    boxes = torch.tensor([[[5.0, 5, 40, 40]], [[20, 10, 60, 50]], [[2, 30, 50, 60]], [[0, 0, 0, 0]]])
    labels, difficult = torch.tensor([[1], [2], [2], [0]]), torch.zeros(4, 1, dtype=torch.bool)
    batch = Batch(pair.images.repeat(2, 1, 1, 1), boxes, labels, difficult, list("abcd"), KEYS * 2)
    (whole, whole_sums), (parts, sums) = (train_one_step(0.0, None, batch, accumulate) for accumulate in (1, 2))
    assert sums.means() == pytest.approx(whole_sums.means(), rel=1e-5)
    assert (sums.steps, sums.images) == (1, 4)
    assert torch.equal(sums.choices, whole_sums.choices)
    for name, move in whole.items():
        # Some are what is left of sums of tens of thousands of terms of both signs.
        torch.testing.assert_close(parts[name], move, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert max(move.abs().max() for move in whole.values()) > 1


def test_a_further_loss_is_added_logged_and_learned_from() -> None:
    class Three:
        def losses(self, parts: Sequence[Tensor]) -> list[DistillLoss]:
            assert [images.shape for images in parts] == [(2, 3, 64, 64)]
            return [lambda output: 3 + (output.box_offsets - output.box_offsets.detach()).sum()]

    (plain, plain_sums), (moves, sums) = train_one_step(0.0), train_one_step(0.0, Three())
    losses = plain_sums.means()
    assert set(losses) == {"loss", "loss_box", "loss_class"}
    assert sums.means() == {**losses, "loss": pytest.approx(losses["loss"] + 3), "loss_distill": 3}
    assert (sums.steps, sums.images) == (1, 2)
    assert sums.choices.tolist() == [[2, 0], [0, 2]] * 6 + [[2, 0]]
    bias = "box_heads.5.bias"  # one cell, six boxes: its gradient is the number of images
    torch.testing.assert_close(moves[bias], plain[bias] - 2)


def test_a_gradient_that_is_not_finite_is_named_with_the_step_of_the_stage_and_changes_nothing() -> None:
    class Root:
        """A loss of 0 with an infinite gradient."""

        def losses(self, _parts: Sequence[Tensor]) -> list[DistillLoss]:
            return [lambda output: (output.box_offsets - output.box_offsets.detach()).sum().sqrt()]

    message = r"step 7: a gradient is not finite, though the loss is \d.*; a lower lr or clip_grad_norm .*batch: a, b$"
    with pytest.raises(TrainingError, match=message):
        train_one_step(0.0, Root(), step=7)


def test_a_student_learns_from_the_outputs_of_the_same_network_at_other_bits() -> None:
    student = [1 - choice for choice in CONFIG]
    moved, sums = train_one_step(0.0, choose_student=fixed(student))
    torch.manual_seed(0)
    bits = DetectorBits([(2, 2), (4, 4)], (8, 8), (8, 8), (4, 4), (8, 8))
    detector, batch = SwitchableSSD(3, bits, image_size=64, width=0.125), random_batch()
    calibrate(detector, lambda: detector(batch.images, fixed(CONFIG)(batch.images, KEYS)))
    detector.train()
    first, second = (detector(batch.images, fixed(choices)(batch.images, KEYS)) for choices in (CONFIG, student))
    losses = detector.loss(first, batch.boxes_xyxy, batch.labels)
    kept = SSDOutput(first.box_offsets.detach(), first.class_logits.detach())
    distilled = distillation_loss(second, kept)
    (sum(losses.values()) + distilled).backward()
    for name, parameter in detector.named_parameters():
        torch.testing.assert_close(moved[name], -parameter.grad, rtol=2e-3, atol=2e-5)
    assert sums.means()["loss_student"] == pytest.approx(distilled.item(), rel=1e-5)
    assert sums.choices.sum(1).tolist() == [2 * len(batch.image_ids)] * 13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_waits_for_the_device_once() -> None:
    detector = SwitchableSSD(3, DetectorBits.full_precision(), image_size=64, width=0.125).cuda()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    batch = random_batch().to("cuda")
    configuration = torch.zeros(2, 13, dtype=torch.int64, device="cuda")

    def step() -> None:
        detector_step(
            detector, batch, lambda *_: configuration, optimizer,
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0), parameters=Parameters.of(detector),
            accumulate=1, clip_grad_norm=5.0, teacher=None, step=0,
        )  # fmt: skip

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as found:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in found if "synchroniz" in str(warning.message)]) == 1
