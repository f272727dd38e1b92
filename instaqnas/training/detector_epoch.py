"""One epoch of the detector, whatever chooses the bits: the one loop of pretraining, search and finetuning."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas import ranks
from instaqnas.data.loader import Batch
from instaqnas.detector.multibox_loss import multibox_loss
from instaqnas.detector.ssd import SSDOutput
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.quantizers import Quantizer
from instaqnas.training import distributed
from instaqnas.training.epoch_sums import EpochSums

# The images [b, 3, S, S] of each part of a batch -> for each part, the loss of the detector's outputs for it.
Distill = Callable[[Sequence[Tensor]], list[Callable[[SSDOutput], Tensor]]]


def check_finite(loss: Tensor, step: int, image_ids: list[str]) -> None:
    """Raises TrainingError, naming step and images, if the loss is NaN or infinite."""
    if not math.isfinite(loss.item()):
        raise TrainingError(f"step {step}: loss is {loss.item()}; images of the batch: {', '.join(image_ids)}")


def train_detector_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    choose_bits: ChooseBits,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    sums: EpochSums,
    accumulate: int,
    clip_grad_norm: float,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None],
    distill: Distill | None = None,
) -> None:
    """Trains on every batch once.

    Args:
        network: a `SwitchableSSD`, as `distributed.parallel` returns it.
        batches: training batches, on the CPU: this process's shares of them.
        choose_bits: bit configurations of a batch's images.
        scheduler: stepped once a batch.
        sums: what is measured is added here, step by step; its steps are the number of the first one.
        accumulate: parts of a batch that are computed one after the other; each has BatchNorm statistics of its own.
        clip_grad_norm: largest norm of the gradients, of those of quantizers and of all others; 0 does not clip.
        on_step: called after every step with its losses.
        distill: a further loss, `distill`, already weighted.

    Raises: TrainingError at a loss or gradient that is not finite, before it reaches the weights.
    """
    detector = distributed.own(network)
    detector.train()
    of_quantizers = [p for m in detector.modules() if isinstance(m, Quantizer) for p in m.parameters()]
    own = set(of_quantizers)
    others = [p for p in detector.parameters() if p not in own]
    for batch in batches:
        batch = batch.to(device)
        optimizer.zero_grad(set_to_none=True)
        losses, choices = _backward(network, batch, choose_bits, accumulate, distill, sums.steps)
        norm = _clip_gradients(others, of_quantizers, clip_grad_norm)
        check_finite(norm, sums.steps, batch.image_ids)
        optimizer.step()
        scheduler.step()

        counts = F.one_hot(choices, len(detector.choices)).sum(0)
        scalars, images, counts = _of_all_processes(losses, len(batch.image_ids), counts)
        sums.add(scalars, images, counts)
        on_step({**scalars, "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]})


def _backward(
    network: nn.Module,
    batch: Batch,
    choose_bits: ChooseBits,
    parts: int,
    distill: Distill | None,
    step: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Adds the gradients of a batch; returns its losses, of which the sum is minimised, and its choices [B, L].

    With several processes the losses and choices are those of this one's images, the gradients those of all.
    """
    detector = distributed.own(network)
    targets = detector.targets(batch.boxes_xyxy, batch.labels)
    positives = ranks.total(targets.positives)
    batches = batch.split(parts)
    further = [None] * parts if distill is None else distill([part.images for part in batches])
    losses, choices = {}, []
    for number, (part, target, distill_loss) in enumerate(zip(batches, targets.split(parts), further, strict=True)):
        is_last = number == parts - 1
        with contextlib.nullcontext() if is_last else distributed.only_own_gradients(network):
            look = detector.look(part.images)
            choices.append(choose_bits(look.seen, part.keys))
            output = network(part.images, choices[-1], look.stem)
            own = multibox_loss(output.box_offsets, output.class_logits, target.offsets, target.labels, positives)
            if distill_loss is not None:
                own["distill"] = distill_loss(output)
            loss = sum(own.values())
            check_finite(loss, step, part.image_ids)
            # Gradients become the mean over processes, but the loss is a sum over all images.
            (ranks.world_size() * loss).backward()
        for name, value in own.items():
            losses[name] = losses.get(name, 0.0) + value.detach()
    return losses, torch.cat(choices)


def _of_all_processes(losses: dict[str, Tensor], images: int, counts: Tensor) -> tuple[dict[str, float], int, Tensor]:
    """Losses, `loss` as their sum, images and counts of choices [L, K] of all processes, on the CPU."""
    own = torch.stack([sum(losses.values()), *losses.values()]).double()
    values = ranks.total(torch.cat([own, own.new_tensor([images]), counts.flatten()])).cpu()
    values, of_all, counts_of_all = values.split([len(own), 1, counts.numel()])
    names = ["loss", *(f"loss_{name}" for name in losses)]
    return dict(zip(names, values.tolist(), strict=True)), int(of_all), counts_of_all.long().view_as(counts)


def _clip_gradients(parameters: list[nn.Parameter], of_quantizers: list[nn.Parameter], largest_norm: float) -> Tensor:
    """Scales the gradients of `parameters` down to `largest_norm` (0: not at all), those of quantizers on their own.

    Step sizes have few but large gradients: together, those would leave nothing of the others.

    Returns: the norm of the first before, NaN or infinite where any gradient is, those of quantizers included.
    """
    norm, of_steps = (
        torch.nn.utils.clip_grad_norm_(group, largest_norm or math.inf) for group in (parameters, of_quantizers)
    )
    return norm + 0 * of_steps
