"""Initialises the policy of a search, as `search.start` says.

With `search.start: sensitivity`, an image gets the more bits, the higher its loss is under the cheapest ones; the
formula is in `instaqnas.policy.start`.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from instaqnas import distributed
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs
from instaqnas.evaluation.baselines import fixed_within
from instaqnas.evaluation.sensitivity import cheapest_and_most_expensive, pretrained_loss, sensitivity_of
from instaqnas.evaluation.survey import survey
from instaqnas.experiment.handover import Checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import FULL_PRECISION_KINDS, PRETRAIN_QUANT
from instaqnas.policy.bit_config import ChooseBits, fixed, shifted_greedy_by
from instaqnas.policy.budget import Multiplier, budget_offset, greedy_gbitops
from instaqnas.policy.diagnostics import average_ranks, rank_correlation
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import start_at_price, start_logits
from instaqnas.seeds import uniform_numbers

log = logging.getLogger(__name__)
# For fitting the effort.
EPOCHS = 24
LR = 8e-3
SLOPE_STEP = 0.1  # relative distance of the two budgets that give the first price from the target


def begin_policy(
    experiment: Experiment, source: Checkpoint, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> Multiplier:
    """Initialises the logits of a calibrated policy, as `search.start` says.

    Args:
        experiment: parts of the config.
        source: checkpoint of the pretraining.
        detector: with the weights of `source`.
        policy: calibrated.
        own_gbitops: cost of the policy network per image.

    Returns: the initial multiplier of the reward `budget`.
    """
    start = experiment.config.search.start
    if start == "pretrained":
        source.load(experiment, policy, "policy", (PRETRAIN_QUANT.kind,))
        return _multiplier_at_target(experiment, detector.eval(), policy.eval(), own_gbitops)
    if start == "sensitivity":
        return begin_by_loss(experiment, source, detector.eval(), policy, own_gbitops)
    if start == "static":
        limit = experiment.config.reward.target_gbitops - own_gbitops
        best = fixed_within(experiment, pretrained_loss(experiment, source), limit)[0]
        policy.add_to_logits(start_logits(best.configuration, len(detector.choice_names)))
        log.info("search: starts from a fixed configuration of %.4g GBitOps, policy not counted", best.gbitops)
    return Multiplier()


def begin_by_loss(
    experiment: Experiment, source: Checkpoint, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> Multiplier:
    """Initialises a policy by `start_at_price`: its mean cost is the target, harder images get more bits.

    The effort of an image is fitted to the rank of its loss under the cheapest configuration, scaled to -1 to 1. The
    gain of an image from more bits is modelled as (1 + effort) times the mean gain. The measured gain is a difference
    of two losses, and too noisy to be learned from so few images. Every process fits all images.

    Args:
        experiment: parts of the config.
        source: checkpoint of the pretraining.
        detector: with the weights of `source`, in eval mode.
        policy: calibrated, with effort.
        own_gbitops: cost of the policy network per image.

    Returns: the multiplier of the reward `budget`: price x target, as that reward counts cost in units of the target.
    """
    costs = detector_costs(detector)
    target = experiment.config.reward.target_gbitops
    sensitivity = sensitivity_of(experiment, pretrained_loss(experiment, source))
    with distributed.alone():
        losses = losses_under(experiment, detector, fixed(cheapest_and_most_expensive(costs).cheapest))
        _fit_effort(experiment, detector, policy, losses)
        efforts = efforts_of(experiment, detector, policy).cpu()
    fixed_gbitops = costs.fixed / 1e9 + own_gbitops
    # The bits of the stem change the input of every other layer, so all images get the same.
    alike = torch.tensor([name == "backbone.stem" for name in costs.positions])
    table = costs.gbitops_table().cpu()
    logits, of_effort, price = start_at_price(
        torch.tensor(sensitivity.mean), table, fixed_gbitops, target, efforts, alike
    )
    policy.begin(logits.to(losses), of_effort.to(losses))
    log.info(
        "search: starts at a price of %.4g of loss per GBitOps; rank correlation of effort and loss %.2f",
        price,
        rank_correlation(efforts.double(), losses.double().cpu()),
    )
    return Multiplier(integral=price * target)


def begin_by_effort(
    experiment: Experiment, source: Checkpoint, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> None:
    """Initialises the first policy of a quantized pretraining, before the detector has run at few bits.

    The effort of an image is fitted to the rank of its loss in full precision, scaled to -1 to 1. Every doubling of bit
    operations is assumed to be worth 1 + effort, so that the cost of an image grows in proportion to 1 + effort, as far
    as the choices go; see `start_at_price`. Every process fits all images.

    Args:
        experiment: parts of the config.
        source: checkpoint of the full-precision training.
        detector: computes the input of the policy.
        policy: calibrated, with effort.
        own_gbitops: cost of the policy network per image.
    """
    full = experiment.detector(DetectorBits.full_precision()).eval()
    source.load(experiment, full, "detector", FULL_PRECISION_KINDS)
    with distributed.alone():
        losses = losses_under(experiment, full, experiment.choose_fixed(full))
        _fit_effort(experiment, detector, policy, losses)
        efforts = efforts_of(experiment, detector, policy).cpu()
    costs = detector_costs(detector)
    table, fixed_gbitops = costs.gbitops_table().cpu(), costs.fixed / 1e9 + own_gbitops
    target = experiment.config.reward.target_gbitops
    alike = torch.zeros(len(table), dtype=torch.bool)
    logits, of_effort, _ = start_at_price(-table.log2(), table, fixed_gbitops, target, efforts, alike)
    policy.begin(logits.to(losses), of_effort.to(losses))
    log.info(
        "pretrain_quant: a first policy at %.4g GBitOps; rank correlation of effort and loss %.2f",
        target,
        rank_correlation(efforts.double(), losses.double().cpu()),
    )


def _multiplier_at_target(
    experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> Multiplier:
    """The initial multiplier of the reward `budget` for a policy that meets its target.

    The price is the loss saved per GBitOps between two budgets around the target, `SLOPE_STEP` below and above, each
    met by a shift of the policy's logits as in `budget_offset`.

    Args:
        experiment: parts of the config.
        detector, policy: in eval mode.
        own_gbitops: cost of the policy network per image.
    """
    costs, target = detector_costs(detector), experiment.config.reward.target_gbitops
    table, fixed_gbitops = costs.gbitops_table().cpu(), costs.fixed / 1e9 + own_gbitops
    with distributed.alone():
        logits = survey(policy, detector, experiment.policy_images(), experiment.device).logits
        measured = []
        for budget in ((1 - SLOPE_STEP) * target, (1 + SLOPE_STEP) * target):
            offset = budget_offset(logits, table, fixed_gbitops, budget)
            losses = losses_under(experiment, detector, shifted_greedy_by(policy, offset))
            measured.append((greedy_gbitops(logits + offset, table, fixed_gbitops), losses.double().mean().item()))
    (low_cost, low_loss), (high_cost, high_loss) = measured
    price = max(0.0, (low_loss - high_loss) / (high_cost - low_cost)) if high_cost > low_cost else 0.0
    log.info("search: starts at a price of %.4g of loss per GBitOps", price)
    return Multiplier(integral=price * target)


@torch.no_grad()
def losses_under(experiment: Experiment, detector: SwitchableSSD, choose_bits: ChooseBits) -> Tensor:
    """Multibox loss [N] of each training image of the policy, in dataset order; `detector` is in eval mode."""
    losses = []
    for batch in distributed.progress_bar(experiment.policy_images(), "losses"):
        batch = batch.to(experiment.device)
        output = detector(batch.images, choose_bits(batch.images, batch.keys))
        losses.append(detector.image_losses(output, batch.boxes_xyxy, batch.labels, batch.difficult))
    return torch.cat(losses)


@torch.no_grad()
def efforts_of(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet) -> Tensor:
    """Effort [N] of each training image of the policy, in dataset order."""
    efforts = []
    for batch in experiment.policy_images():
        observation = detector.observe(batch.images.to(experiment.device))
        efforts.append(policy.efforts(observation.input))
    return torch.cat(efforts)


def _fit_effort(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, losses: Tensor) -> None:
    """Fits the effort of each image to the rank of its loss, scaled to -1 to 1, by least squares.

    Images are flipped at random as for the detector's training. A flip is assumed not to change the loss.

    Args:
        experiment: parts of the config.
        detector: in eval mode.
        policy: is trained, and left in eval mode.
        losses: of all training images of the policy, [N].
    """
    ranks = (average_ranks(losses) - 1) / max(1, len(losses) - 1)  # 0 to 1, equal for equal losses
    target = (2 * ranks - 1).to(losses)
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
            loss = (effort - target[[key.index for key in batch.keys]]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    policy.eval()


def _flipped(images: Tensor, numbers: Tensor, *, vertical: bool) -> Tensor:
    """Flips each image left to right with probability 1/2 and, if `vertical`, upside down with probability 1/2.

    Args:
        images: [B, 3, S, S].
        numbers: uniform random numbers [B, 2], 0 to 1, for the two flips.
        vertical: whether images are also flipped upside down.
    """
    images = _flip_where(numbers[:, 0] < 1 / 2, images, axis=-1)
    if vertical:
        images = _flip_where(numbers[:, 1] < 1 / 2, images, axis=-2)
    return images


def _flip_where(flip: Tensor, images: Tensor, *, axis: int) -> Tensor:
    """Flips the images with `flip`, bool [B], along one axis."""
    return torch.where(flip.to(images.device)[:, None, None, None], images.flip(axis), images)
