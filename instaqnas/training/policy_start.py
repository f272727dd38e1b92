"""The first policy of a search: an image gets the more bits the more loss the detector has on it with the fewest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instaqnas import ranks
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.diagnostics import rank_correlation
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import start_between
from instaqnas.seeds import uniform_numbers
from instaqnas.training import distributed
from instaqnas.training.experiment import Experiment
from instaqnas.training.rivals import fixed_within, sensitivity_of

log = logging.getLogger(__name__)
SHARES = (2 / 3, 1 / 2, 1 / 3)  # of the images that get the dearer configuration; the fewer, the dearer
EPOCHS = 24
LR = 8e-3


@dataclass(frozen=True)
class Split:
    """A share of the images at the configuration `high`, the others at the cheapest.

    gains: loss that `high` saves, [N] of each image.
    loss: sum over images, where those with most loss under the cheapest get `high`.
    """

    share: float
    high: list[int]
    gains: Tensor
    loss: float


def begin_between(
    experiment: Experiment, source: Path, detector: SwitchableSSD, policy: PolicyNet, policy_cost: float
) -> Multiplier:
    """Lets `policy` begin between the cheapest bit configuration and a dearer one, at the target's mean cost.

    The dearer one, for a share of the images, is the best of its cost (`fixed_within`). The effort for an image is
    fitted to the rank of its loss under the cheapest one: what it gains by the dearer one, a difference of two losses,
    is too noisy to be learned from so few images. Every process fits it to all images.

    Args:
        source: the checkpoint that `detector` is of, in eval mode.
        policy: calibrated, with effort.
        policy_cost: GBitOps of a decision.

    Returns: the first price of GBitOps, at which as large a share of the images gains more than it costs.
    """
    costs, target = detector_costs(detector), experiment.config.reward.target_gbitops
    table = costs.table.tolist()
    low = [min(range(len(row)), key=row.__getitem__) for row in table]
    room = target - policy_cost - costs.lowest()
    limits = [min(costs.lowest() + room / share, costs.highest()) for share in SHARES]
    highs = [fixed_within(experiment, source, limit)[0].configuration for limit in limits]
    losses = sensitivity_of(experiment, source).mean
    with ranks.alone():
        low_losses = loss_under(experiment, detector, low)
        splits = []
        for share, high in zip(SHARES, highs, strict=True):
            gains = low_losses - loss_under(experiment, detector, high)
            dearer = low_losses.argsort(descending=True)[: round(share * len(gains))]  # by gains would flatter
            splits.append(Split(share, high, gains, (low_losses.sum() - gains[dearer].sum()).item()))
        best = min(splits, key=lambda split: split.loss)
        worth = [
            (loss[a] - loss[b]) / max(1, row[b] - row[a])
            for loss, row, a, b in zip(losses, table, low, best.high, strict=True)
        ]
        policy.begin(*start_between(low, best.high, worth, len(detector.choices)))
        _teach_effort(experiment, detector, policy, low_losses, best.share)
        correlation = rank_correlation(efforts_of(experiment, detector, policy).double(), low_losses.double())
    gbitops = costs.gbitops(torch.tensor([low, best.high], device=costs.table.device)).tolist()
    difference = gbitops[1] - gbitops[0]  # 0 if the target leaves no room
    log.info(
        "search: starts between fixed configurations of %.4g and %.4g GBitOps, policy not counted; the second for %.0f "
        "%% of the images; rank correlation of effort and loss %.2f",
        *gbitops,
        100 * best.share,
        correlation,
    )
    gain = best.gains.quantile(1 - best.share).item()
    return Multiplier(integral=max(0.0, gain / difference * target) if difference else 0.0)


@torch.no_grad()
def loss_under(experiment: Experiment, detector: SwitchableSSD, configuration: Sequence[int]) -> Tensor:
    """Loss [N] of each image that the policy learns from, in their order, under one configuration."""
    choices, losses = torch.tensor(configuration, device=experiment.device), []
    for batch in distributed.progress_bar(experiment.policy_images(), "losses"):
        batch = batch.to(experiment.device)
        output = detector(batch.images, choices.expand(len(batch.images), -1))
        losses.append(detector.image_losses(output, batch.boxes_xyxy, batch.labels))
    return torch.cat(losses)


@torch.no_grad()
def efforts_of(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet) -> Tensor:
    """Effort [N] for each image that the policy learns from, in their order."""
    loader = experiment.policy_images()
    return torch.cat([policy.efforts(detector.look(batch.images.to(experiment.device)).seen) for batch in loader])


def _teach_effort(
    experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, losses: Tensor, share: float
) -> None:
    """Fits the effort for an image to the rank of its loss, from -1 to 1, moved to be 0 at the limit of the share.

    Images are flipped at random, as the detector's are in training: the loss is taken to be the same.
    """
    wanted = torch.empty_like(losses)
    wanted[losses.argsort()] = torch.linspace(-1, 1, len(losses), device=losses.device) + 2 * share - 1
    loader = experiment.policy_loader(experiment.config.search.policy_batch_size, "search start")
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    policy.train()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for batch in distributed.progress_bar(loader, f"effort {epoch + 1}/{EPOCHS}"):
            batch = batch.to(experiment.device)
            numbers = uniform_numbers(batch.keys, 2, experiment.config.seed, "effort")
            images = _flipped(batch.images, numbers, vertical=experiment.config.data.vertical_flip)
            effort = policy.efforts(detector.look(images).seen)
            loss = (effort - wanted[[key.index for key in batch.keys]]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    policy.eval()


def _flipped(images: Tensor, numbers: Tensor, *, vertical: bool) -> Tensor:
    """Images [B, 3, S, S], each flipped from side to side, and upside down if `vertical`, one time in two.

    `numbers` [B, 2] from 0 to 1 decide.
    """
    for axis, column in ((-1, 0), (-2, 1)) if vertical else ((-1, 0),):
        flip = (numbers[:, column] < 1 / 2).to(images.device)[:, None, None, None]
        images = torch.where(flip, images.flip(axis), images)
    return images
