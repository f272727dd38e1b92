"""Initial logits of a policy: from one bit configuration, or from measured losses and one price of GBitOps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from instaqnas.policy.budget import budget_price

START_PROBABILITY = 0.7  # of each choice of the configuration that `start_logits` starts from
# Mean probability of the most likely choices after `start_at_price`. It is high because there are dozens of positions,
# and some choices are expensive.
MEAN_TOP_PROBABILITY = 0.99
BISECTIONS = 60


def start_logits(configuration: Sequence[int], choices: int) -> Tensor:
    """Logits [L, K] under which each choice of a configuration [L] has the probability `START_PROBABILITY`.

    The other K - 1 = `choices` - 1 share the rest equally.
    """
    odds = START_PROBABILITY * max(1, choices - 1) / (1 - START_PROBABILITY)
    return math.log(odds) * F.one_hot(torch.tensor(configuration), choices).float()


def start_at_price(
    losses: Tensor, costs: Tensor, fixed: float, target: float, efforts: Tensor, alike: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Initial logits: the most likely choices of an image minimise (1 + effort) * loss + price * GBitOps.

    The minimum is taken at each position, as if the losses of positions added up (Lagrange relaxation, as in
    `budget_price`). The price is the same for all images and positions: the one at which their mean cost is the
    target, or 0 if the cost is below the target even so.

    Args:
        losses: mean loss with each choice at each position, [L, K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps that do not depend on the choices, policy included.
        target: mean GBitOps.
        efforts: of N images, [N]; -1 if fewer bits do not raise the loss of the image, 0 if they raise it by the mean.
        alike: bool [L], positions at which effort has no influence, so that all images get the same choice.

    Returns: logits [L, K] at effort 0, change of the logits per unit of effort [L, K], and price in loss per GBitOps.
    """
    losses, costs = losses.double(), costs.double()
    saved = losses[:, :1] - losses  # loss saved by each choice, compared with the first one
    of_effort = saved * ~alike[:, None]
    worth = saved + efforts.double()[:, None, None] * of_effort
    price = max(0.0, budget_price(worth, costs, fixed, target))
    offset = -price * costs
    sharpness = _sharpness(worth + offset)
    return sharpness * (saved + offset), sharpness * of_effort, price


def _sharpness(logits: Tensor) -> float:
    """The factor at which the mean top probability of `logits` [N, L, K] is `MEAN_TOP_PROBABILITY`."""
    low, high = 0.0, 1.0
    while _mean_top_probability(high * logits) < MEAN_TOP_PROBABILITY and high < 2.0**BISECTIONS:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_flat = _mean_top_probability(middle * logits) < MEAN_TOP_PROBABILITY
        low, high = (middle, high) if too_flat else (low, middle)
    return high


def _mean_top_probability(logits: Tensor) -> float:
    return logits.softmax(-1).amax(-1).mean().item()
