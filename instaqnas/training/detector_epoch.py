"""One epoch of the detector, whatever chooses the bits: the one loop of pretraining, search and finetuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.quantizers import Quantizer


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
) -> DetectorEpoch:
    """Trains on every batch once.

    Args:
        batches: training batches, on the CPU.
        choose_bits: bit configurations of a batch's images.
        scheduler: stepped once a batch.
        clip_grad_norm: largest gradient norm; 0 does not clip.
        on_step: called after every step with its number in the epoch, from 0, and its losses.

    Raises: TrainingError at a loss or gradient that is not finite, before it reaches the weights.
    """
    detector.train()
    sums: dict[str, float] = {}
    chosen, images_seen = [], 0
    for step, batch in enumerate(batches):
        batch = batch.to(device)
        choices = choose_bits(batch.images)
        losses = detector.loss(detector(batch.images, choices), batch.boxes_xyxy, batch.labels)
        loss = sum(losses.values())
        check_finite(loss, step, batch.image_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = _clip_gradients(detector, clip_grad_norm)
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


def _clip_gradients(detector: SwitchableSSD, largest_norm: float) -> Tensor:
    """Scales the gradients down to `largest_norm` (0: not at all) but those of quantizers, whose scale is their own.

    Returns: the norm before, NaN or infinite where any gradient is.
    """
    quantizers = [p for m in detector.modules() if isinstance(m, Quantizer) for p in m.parameters()]
    own = set(quantizers)
    norm = torch.nn.utils.clip_grad_norm_([p for p in detector.parameters() if p not in own], largest_norm or math.inf)
    of_quantizers = torch.nn.utils.get_total_norm([p.grad for p in quantizers if p.grad is not None])
    return norm + 0 * of_quantizers
