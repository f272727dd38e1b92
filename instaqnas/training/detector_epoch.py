"""One epoch of the detector, whatever chooses the bits: the one loop of pretraining, search and finetuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import SSDOutput, SwitchableSSD
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.quantizers import Quantizer

Distill = Callable[[Tensor, SSDOutput], Tensor]  # images [B, 3, S, S] and the outputs for them -> loss


@dataclass(frozen=True)
class DetectorEpoch:
    """Mean losses of an epoch, and the bit configurations [n, L] it ran."""

    losses: dict[str, float]
    choices: Tensor


def check_finite(loss: Tensor, step: int, image_ids: list[str]) -> None:
    """Raises TrainingError, naming step and images, if the loss is NaN or infinite."""
    if not math.isfinite(loss.item()):
        raise TrainingError(f"step {step}: loss is {loss.item()}; images of the batch: {', '.join(image_ids)}")


def train_detector_epoch(
    detector: SwitchableSSD,
    batches: Iterable[Batch],
    choose_bits: ChooseBits,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    clip_grad_norm: float,
    device: torch.device,
    on_step: Callable[[int, dict[str, float]], None],
    distill: Distill | None = None,
) -> DetectorEpoch:
    """Trains on every batch once.

    Args:
        batches: training batches, on the CPU.
        choose_bits: bit configurations of a batch's images.
        scheduler: stepped once a batch.
        clip_grad_norm: largest gradient norm; 0 does not clip.
        on_step: called after every step with its number in the epoch, from 0, and its losses.
        distill: a further loss, `distill`, already weighted.

    Raises: TrainingError at a loss or gradient that is not finite, before it reaches the weights.
    """
    detector.train()
    of_quantizers = [p for m in detector.modules() if isinstance(m, Quantizer) for p in m.parameters()]
    own = set(of_quantizers)
    others = [p for p in detector.parameters() if p not in own]
    sums: dict[str, float] = {}
    chosen, images_seen = [], 0
    for step, batch in enumerate(batches):
        batch = batch.to(device)
        choices = choose_bits(batch.images)
        output = detector(batch.images, choices)
        losses = detector.loss(output, batch.boxes_xyxy, batch.labels)
        if distill is not None:
            losses["distill"] = distill(batch.images, output)
        loss = sum(losses.values())
        check_finite(loss, step, batch.image_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = _clip_gradients(others, of_quantizers, clip_grad_norm)
        check_finite(norm, step, batch.image_ids)
        optimizer.step()
        scheduler.step()

        scalars = {"loss": loss.item(), **{f"loss_{name}": value.item() for name, value in losses.items()}}
        on_step(step, {**scalars, "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]})
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0.0) + value * len(batch.image_ids)
        images_seen += len(batch.image_ids)
        chosen.append(choices.cpu())
    return DetectorEpoch({name: value / images_seen for name, value in sums.items()}, torch.cat(chosen))


def _clip_gradients(parameters: list[nn.Parameter], of_quantizers: list[nn.Parameter], largest_norm: float) -> Tensor:
    """Scales the gradients of `parameters` down to `largest_norm` (0: not at all), not those of quantizers, whose scale
    is their own.

    Returns: the norm before, NaN or infinite where any gradient is, those of quantizers included.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest_norm or math.inf)
    quantizer_norm = torch.nn.utils.get_total_norm([p.grad for p in of_quantizers if p.grad is not None])
    return norm + 0 * quantizer_norm
