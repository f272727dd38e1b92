"""Where a policy may begin: with the best bits for an image of some hardness, at one price of GBitOps for all."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas.policy.budget import budget_offset

PROBABILITY = 0.99  # of the likeliest choice, on average: there are dozens of positions, and some choices are dear
BISECTIONS = 60


def start_at_price(
    losses: Tensor, costs: Tensor, fixed: float, target: float, efforts: Tensor, alike: Tensor
) -> tuple[Tensor, Tensor, float]:
    """A policy's first logits [L, K], what a unit of effort adds to them [L, K], and the price in loss per GBitOps.

    The likeliest choices of an image with effort e minimise (1 + e) * loss + price * GBitOps at each position, where
    losses of positions are taken to add up (Lagrange relaxation, as in `budget_offset`). The price is the one at which
    all images together cost the target, 0 where they do not come to it.

    Args:
        losses: mean loss with each choice at each position, [L, K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps of all that is not chosen, policy included.
        target: mean GBitOps.
        efforts: of N images, [N], -1 for those that lose nothing by fewer bits, 0 for those that lose as the mean does.
        alike: bool [L], positions at which all images get the same choice, that of effort 0.
    """
    losses, costs = losses.double(), costs.double()
    saved = losses[:, :1] - losses  # what a choice saves, up to a constant of the position
    of_effort = saved * ~alike[:, None]
    worth = saved + efforts.double()[:, None, None] * of_effort
    offset = budget_offset(worth, costs, fixed, target)
    price = -(offset.sum() / costs.sum()).item()
    if price <= 0:
        offset, price = torch.zeros_like(offset), 0.0
    sharpness = _sharpness(worth + offset)
    return sharpness * (saved + offset), sharpness * of_effort, price


def _sharpness(logits: Tensor) -> float:
    """The factor by which the likeliest of `logits` [N, L, K] get `PROBABILITY` on average."""
    low, high = 0.0, 1.0
    while _top_probability(high * logits) < PROBABILITY and high < 2.0**BISECTIONS:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _top_probability(middle * logits) < PROBABILITY else (low, middle)
    return high


def _top_probability(logits: Tensor) -> float:
    return logits.softmax(-1).amax(-1).mean().item()
