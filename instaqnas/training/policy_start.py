"""The first policy of a search: an image gets the more bits the more loss the detector has on it with the fewest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from instaqnas import ranks
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.diagnostics import average_ranks, rank_correlation
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import start_at_price
from instaqnas.seeds import uniform_numbers
from instaqnas.training import distributed
from instaqnas.training.experiment import Experiment
from instaqnas.training.rivals import sensitivity_of
from instaqnas.training.sensitivity import ends

log = logging.getLogger(__name__)
EPOCHS = 24
LR = 8e-3


def begin_by_loss(
    experiment: Experiment, source: Path, detector: SwitchableSSD, policy: PolicyNet, policy_cost: float
) -> Multiplier:
    """Lets `policy` begin with what `start_at_price` makes of the detector's sensitivity, at the target's mean cost.

    The effort for an image is fitted to the rank, from -1 to 1, of its loss under the cheapest configuration. What an
    image gains by more bits is taken to grow with that rank in a straight line, from nothing to twice the mean; the
    gain itself, a difference of two losses, is too noisy to be learned from so few images. Every process fits it to all
    images.

    Args:
        source: the checkpoint that `detector` is of, in eval mode.
        policy: calibrated, with effort.
        policy_cost: GBitOps of a decision.

    Returns: the price, as what the reward multiplies the share of the target with.
    """
    costs, target = detector_costs(detector), experiment.config.reward.target_gbitops
    mean_losses = torch.tensor(sensitivity_of(experiment, source).mean)
    with ranks.alone():
        losses = losses_under(experiment, detector, ends(costs)[1])
        _teach_effort(experiment, detector, policy, losses)
        efforts = efforts_of(experiment, detector, policy).cpu()
    fixed = costs.fixed / 1e9 + policy_cost
    alike = torch.tensor([name == "backbone.stem" for name in costs.positions])
    table = costs.gbitops_table().cpu()
    logits, of_effort, price = start_at_price(mean_losses, table, fixed, target, efforts, alike)
    policy.begin(logits.to(losses), of_effort.to(losses))
    log.info(
        "search: starts at a price of %.4g of loss per GBitOps; rank correlation of effort and loss %.2f",
        price,
        rank_correlation(efforts.double(), losses.double().cpu()),
    )
    return Multiplier(integral=price * target)


@torch.no_grad()
def losses_under(experiment: Experiment, detector: SwitchableSSD, configuration: Sequence[int]) -> Tensor:
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


def _teach_effort(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, losses: Tensor) -> None:
    """Fits the effort for an image to the rank of its loss, from -1 to 1.

    Images are flipped at random, as the detector's are in training: the loss is taken to be the same.
    """
    places = (average_ranks(losses) - 1) / max(1, len(losses) - 1)  # equal losses, such as of empty images, alike
    wanted = (2 * places - 1).to(losses)
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
