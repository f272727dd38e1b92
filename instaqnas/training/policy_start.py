"""The first policy of a search: the more loss an image has at the cheapest bits, the more bits it gets.

With `search.start: sensitivity`; the formula is in `instaqnas.policy.start`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from instaqnas import distributed
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.evaluation.baselines import fixed_within
from instaqnas.evaluation.sensitivity import cheapest_and_most_expensive, pretrained_loss, sensitivity_of
from instaqnas.experiment.handover import Checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.diagnostics import average_ranks, rank_correlation
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import start_at_price, start_logits
from instaqnas.seeds import uniform_numbers

log = logging.getLogger(__name__)
EPOCHS = 24  # of fitting the effort
LR = 8e-3


def begin_policy(
    experiment: Experiment, source: Checkpoint, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> Multiplier:
    """Gives a calibrated policy the first distribution that `search.start` names.

    Args:
        experiment: parts of the config.
        source: checkpoint of the pretraining.
        detector: with the weights of `source`.
        policy: calibrated.
        own_gbitops: cost of one decision of the policy.

    Returns: the first multiplier of the reward `budget`.
    """
    start = experiment.config.search.start
    if start == "sensitivity":
        return begin_by_loss(experiment, source, detector.eval(), policy, own_gbitops)
    if start == "static":
        limit = experiment.config.reward.target_gbitops - own_gbitops
        best = fixed_within(experiment, pretrained_loss(experiment, source), limit)[0]
        policy.add_to_logits(start_logits(best.configuration, len(detector.choices)))
        log.info("search: starts from a fixed configuration of %.4g GBitOps, policy not counted", best.gbitops)
    return Multiplier()


def begin_by_loss(
    experiment: Experiment, source: Checkpoint, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> Multiplier:
    """Gives a policy the logits of `start_at_price` for the detector's sensitivity, at the target's mean cost.

    The effort of an image is fitted to the rank, scaled to -1 to 1, of its loss under the cheapest configuration. An
    image's gain from more bits is modelled as linear in that rank, from nothing to twice the mean gain. The measured
    gain, a difference of two losses, is too noisy to be learned from so few images. Every process fits all images.

    Args:
        experiment: parts of the config.
        source: checkpoint of the pretraining.
        detector: with the weights of `source`, in eval mode.
        policy: calibrated, with effort.
        own_gbitops: cost of one decision of the policy.

    Returns: the price as a multiplier of the reward `budget`, that is, per share of the target.
    """
    costs, target = detector_costs(detector), experiment.config.reward.target_gbitops
    sensitivity = sensitivity_of(experiment, pretrained_loss(experiment, source))
    with distributed.alone():
        losses = losses_under(experiment, detector, cheapest_and_most_expensive(costs).cheapest)
        _fit_effort(experiment, detector, policy, losses)
        efforts = efforts_of(experiment, detector, policy).cpu()
    fixed = costs.fixed / 1e9 + own_gbitops
    alike = torch.tensor([name == "backbone.stem" for name in costs.positions])
    table = costs.gbitops_table().cpu()
    logits, of_effort, price = start_at_price(torch.tensor(sensitivity.mean), table, fixed, target, efforts, alike)
    policy.begin(logits.to(losses), of_effort.to(losses))
    log.info(
        "search: starts at a price of %.4g of loss per GBitOps; rank correlation of effort and loss %.2f",
        price,
        rank_correlation(efforts.double(), losses.double().cpu()),
    )
    return Multiplier(integral=price * target)


@torch.no_grad()
def losses_under(experiment: Experiment, detector: SwitchableSSD, configuration: Sequence[int]) -> Tensor:
    """Loss [N] of each training image of the policy, in their order, under one configuration."""
    choices, losses = torch.tensor(configuration, device=experiment.device), []
    for batch in distributed.progress_bar(experiment.policy_images(), "losses"):
        batch = batch.to(experiment.device)
        output = detector(batch.images, choices.expand(len(batch.images), -1))
        losses.append(detector.image_losses(output, batch.boxes_xyxy, batch.labels, batch.difficult))
    return torch.cat(losses)


@torch.no_grad()
def efforts_of(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet) -> Tensor:
    """Effort [N] of each training image of the policy, in their order."""
    loader = experiment.policy_images()
    return torch.cat([policy.efforts(detector.observe(batch.images.to(experiment.device)).input) for batch in loader])


def _fit_effort(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, losses: Tensor) -> None:
    """Fits the effort of each image to the rank of its loss, scaled to -1 to 1.

    Images are flipped at random as in the detector's training; their loss is taken to stay the same.
    """
    places = (average_ranks(losses) - 1) / max(1, len(losses) - 1)  # equal losses get equal ranks
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
            effort = policy.efforts(detector.observe(images).input)
            loss = (effort - wanted[[key.index for key in batch.keys]]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    policy.eval()


def _flipped(images: Tensor, numbers: Tensor, *, vertical: bool) -> Tensor:
    """Images [B, 3, S, S], each flipped left to right, and upside down if `vertical`, with probability 1/2.

    Args:
        images: of a batch.
        numbers: uniform random numbers [B, 2] that decide.
        vertical: whether images are also flipped upside down.
    """
    for axis, column in ((-1, 0), (-2, 1)) if vertical else ((-1, 0),):
        flip = (numbers[:, column] < 1 / 2).to(images.device)[:, None, None, None]
        images = torch.where(flip, images.flip(axis), images)
    return images
