"""One training step of the detector, the same in pretraining, search and finetuning."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas import distributed
from instaqnas.data.loader import Batch
from instaqnas.detector.distillation import distillation_loss, foreground
from instaqnas.detector.multibox_loss import multibox_loss
from instaqnas.detector.ssd import SSDOutput, SwitchableSSD
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.quantizers import Quantizer

DistillLoss = Callable[[SSDOutput], Tensor]  # of the detector's outputs for one part of a batch, already weighted


@dataclass(frozen=True)
class Teacher:
    """The full-precision network that a quantized detector is distilled from.

    Args:
        network: in eval mode.
        choose_bits: its only configuration.
        weight: of the distillation loss, above 0.
    """

    network: SwitchableSSD
    choose_bits: ChooseBits
    weight: float

    @torch.no_grad()
    def losses(self, parts: Sequence[Tensor]) -> list[DistillLoss]:
        """The distillation loss for each part of a batch.

        Args:
            parts: images [b, 3, S, S] of each part.
        """
        outputs = [self.network(images, self.choose_bits(images, ())) for images in parts]
        positives = distributed.total(torch.stack([foreground(output).sum() for output in outputs]).sum())
        return [self._loss(output, positives) for output in outputs]

    def _loss(self, teacher: SSDOutput, positives: Tensor) -> DistillLoss:
        return lambda output: self.weight * distillation_loss(output, teacher, positives)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a detector by how their gradients are clipped.

    Step sizes have few but large gradients: clipped together with the others, they would leave nothing of them.

    Args:
        quantizers: parameters of the quantizers.
        others: all other parameters.
    """

    quantizers: list[nn.Parameter]
    others: list[nn.Parameter]

    @staticmethod
    def of(detector: nn.Module) -> Parameters:
        """Parameters of a detector."""
        quantizers = [p for module in detector.modules() if isinstance(module, Quantizer) for p in module.parameters()]
        own = set(quantizers)
        return Parameters(quantizers, [p for p in detector.parameters() if p not in own])


@dataclass(frozen=True)
class StepResult:
    """Measurements of one step.

    Args:
        losses: `loss`, and its terms as `loss_box`, `loss_class`, `loss_distill` and `loss_student`; means over all
            processes.
        grad_norm: norm of the gradients before clipping, without quantizers.
        images: number of images of all processes.
        choices: how many of these images had each choice at each position, int64 [L, K] on the CPU.
    """

    losses: dict[str, float]
    grad_norm: float
    images: int
    choices: Tensor


def detector_step(
    network: nn.Module,
    batch: Batch,
    choose_bits: ChooseBits,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    parameters: Parameters,
    accumulate: int,
    clip_grad_norm: float,
    teacher: Teacher | None,
    choose_student: ChooseBits | None = None,
    step: int,
) -> StepResult:
    """Trains on one batch.

    Args:
        network: a `SwitchableSSD` in training mode, as `distributed.parallel` returns it.
        batch: this process's share, on the device.
        choose_bits: bit configurations of the images.
        optimizer: of the detector.
        scheduler: stepped once.
        parameters: of the detector.
        accumulate: number of equal parts of the batch, run one after the other, each with its own BatchNorm statistics.
        clip_grad_norm: largest norm of the gradients, separately for quantizers and others; 0 does not clip.
        teacher: to distill from, or None.
        choose_student: configurations at which the batch runs once more, distilled from its own outputs under
            `choose_bits`; needs `accumulate` 1.
        step: number in the stage, for messages.

    Raises: TrainingError at a loss or gradient that is not finite, before it reaches the weights.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, choices = _backward(network, batch, choose_bits, accumulate, teacher, choose_student)
    norms = [_clipped_norm(group, clip_grad_norm) for group in (parameters.others, parameters.quantizers)]

    counts = F.one_hot(choices, len(distributed.own(network).choice_names)).sum(0)
    own = torch.stack([sum_of(losses), *losses.values()]).double()
    totals = distributed.total(torch.cat([own, own.new_tensor([len(batch.image_ids)]), counts.flatten()]))
    # The one transfer from the device in a step. Gradients are those of all processes already.
    values = torch.cat([totals, torch.stack([norm.to(totals) for norm in norms])]).cpu()
    of_losses, of_images, of_counts, of_norms = values.split([len(own), 1, counts.numel(), len(norms)])
    _check_finite(of_losses[0].item(), of_norms.tolist(), step, batch.image_ids)

    optimizer.step()
    scheduler.step()
    names = ["loss", *(f"loss_{name}" for name in losses)]
    return StepResult(
        losses=dict(zip(names, of_losses.tolist(), strict=True)),
        grad_norm=of_norms[0].item(),
        images=int(of_images),
        choices=of_counts.long().view_as(counts),
    )


def _backward(
    network: nn.Module,
    batch: Batch,
    choose_bits: ChooseBits,
    parts: int,
    teacher: Teacher | None,
    choose_student: ChooseBits | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Adds the gradients of a batch; returns its losses, whose sum is minimised, and its choices [B or 2 B, L].

    With several processes losses and choices belong to the images of this process, gradients to all images.
    """
    detector = distributed.own(network)
    targets = detector.targets(batch.boxes_xyxy, batch.labels)
    positives = distributed.total(targets.positives)
    batches = batch.split(parts)
    distill: Sequence[DistillLoss | None] = [None] * parts
    if teacher is not None:
        distill = teacher.losses([part.images for part in batches])
    losses: dict[str, Tensor] = {}
    choices = []
    for number, (part, target, distill_loss) in enumerate(zip(batches, targets.split(parts), distill, strict=True)):
        is_last = number == parts - 1 and choose_student is None
        with contextlib.nullcontext() if is_last else distributed.only_own_gradients(network):
            observation = detector.observe(part.images)
            choices.append(choose_bits(observation.input, part.keys))
            output = network(part.images, choices[-1], observation.stem)
            own = multibox_loss(
                output.box_offsets,
                output.class_logits,
                target.offsets,
                target.labels,
                positives,
                min_negatives=detector.min_negatives,
            )
            if distill_loss is not None:
                own["distill"] = distill_loss(output)
            # Gradients become the mean over processes, but the loss is a sum over all images.
            (distributed.world_size() * sum_of(own)).backward()
        for name, value in own.items():
            losses[name] = losses.get(name, 0.0) + value.detach()
    if choose_student is not None:
        choices.append(choose_student(observation.input, batch.keys))
        student = network(batch.images, choices[-1], observation.stem)
        losses["student"] = _distill(student, output)
    return losses, torch.cat(choices)


def _distill(student: SSDOutput, output: SSDOutput) -> Tensor:
    """Adds the gradients of the distillation of `student` from `output`; returns its loss."""
    target = SSDOutput(output.box_offsets.detach(), output.class_logits.detach())
    loss = distillation_loss(student, target, distributed.total(foreground(target).sum()))
    (distributed.world_size() * loss).backward()
    return loss.detach()


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    """The loss that is minimised: the sum of its terms."""
    first, *others = losses.values()
    total = first
    for term in others:
        total = total + term
    return total


def _clipped_norm(parameters: list[nn.Parameter], largest_norm: float) -> Tensor:
    """Scales the gradients of `parameters` down to `largest_norm` (0: not at all); returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, largest_norm or math.inf)


def _check_finite(loss: float, norms: Sequence[float], step: int, image_ids: list[str]) -> None:
    """Raises TrainingError, naming the step and the images, if the loss or a norm of gradients is NaN or infinite."""
    images = f"images of the batch: {', '.join(image_ids)}"
    if not math.isfinite(loss):
        raise TrainingError(f"step {step}: the loss is {loss}; a lower lr may help; {images}")
    if not all(map(math.isfinite, norms)):
        raise TrainingError(
            f"step {step}: a gradient is not finite, though the loss is {loss:.4g}; a lower lr or clip_grad_norm may "
            f"help; {images}"
        )
