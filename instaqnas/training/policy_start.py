"""The first policy of a search: an image gets the more bits the more they lower the detector's loss on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from instaqnas import ranks
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import start_between
from instaqnas.training import distributed
from instaqnas.training.experiment import Experiment
from instaqnas.training.rivals import fixed_within, sensitivity_of

log = logging.getLogger(__name__)
EPOCHS = 8
LR = 8e-3


def begin_between(
    experiment: Experiment, source: Path, detector: SwitchableSSD, policy: PolicyNet, policy_cost: float
) -> Multiplier:
    """Lets `policy` begin between two fixed configurations, of which each has half the images at the target's cost.

    The cheaper is the cheapest there is, the other the best that costs as much above the target as that one costs below
    it (`fixed_within`). The effort for an image is fitted to the rank of what it gains from one to the other. Every
    process does all of it.

    Args:
        source: the checkpoint that `detector` is of, in eval mode.
        policy: calibrated, with effort.
        policy_cost: GBitOps of a decision.

    Returns: the price of GBitOps at which the image in the middle gains as much as it costs.
    """
    costs, target = detector_costs(detector), experiment.config.reward.target_gbitops
    table = costs.table.tolist()
    low = [min(range(len(row)), key=row.__getitem__) for row in table]
    high = fixed_within(experiment, source, 2 * (target - policy_cost) - costs.lowest())[0].configuration
    losses = sensitivity_of(experiment, source).mean
    worth = [
        (loss[a] - loss[b]) / max(1, row[b] - row[a]) for loss, row, a, b in zip(losses, table, low, high, strict=True)
    ]
    policy.begin(*start_between(low, high, worth, len(detector.choices)))
    with ranks.alone():
        gains = loss_under(experiment, detector, low) - loss_under(experiment, detector, high)
        _teach_effort(experiment, detector, policy, gains)
    gbitops = costs.gbitops(torch.tensor([low, high], device=costs.table.device)).tolist()
    price = gains.median().item() / (gbitops[1] - gbitops[0])
    log.info(
        "search: starts between fixed configurations of %.4g and %.4g GBitOps, policy not counted; an image gains %.3g "
        "of loss by the second, and half of them more than %.3g",
        *gbitops,
        gains.mean().item(),
        gains.median().item(),
    )
    return Multiplier(integral=max(0.0, price * target))


@torch.no_grad()
def loss_under(experiment: Experiment, detector: SwitchableSSD, configuration: Sequence[int]) -> Tensor:
    """Loss [N] of each image that the policy learns from, in their order, under one configuration."""
    choices, losses = torch.tensor(configuration, device=experiment.device), []
    for batch in distributed.progress_bar(experiment.policy_images(), "losses"):
        batch = batch.to(experiment.device)
        output = detector(batch.images, choices.expand(len(batch.images), -1))
        losses.append(detector.image_losses(output, batch.boxes_xyxy, batch.labels))
    return torch.cat(losses)


def _teach_effort(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, gains: Tensor) -> None:
    """Fits the effort for an image to the rank of its gain: -1 for the smallest, 1 for the largest."""
    wanted = torch.empty_like(gains)
    wanted[gains.argsort()] = torch.linspace(-1, 1, len(gains), device=gains.device)
    loader = experiment.policy_loader(experiment.config.search.policy_batch_size, "search start")
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    policy.train()
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for batch in distributed.progress_bar(loader, f"effort {epoch + 1}/{EPOCHS}"):
            batch = batch.to(experiment.device)
            effort = policy.efforts(detector.look(batch.images).seen)
            loss = (effort - wanted[[key.index for key in batch.keys]]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    policy.eval()
