"""Where a policy may begin: with the same choice at all positions of an image, by its hardness, at one price."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas.policy.budget import budget_offset

PROBABILITY = 0.99  # of the likeliest choice, on average: there are dozens of positions, and some choices are dear
BISECTIONS = 60


def start_at_price(
    losses: Tensor, costs: Tensor, fixed: float, target: float, efforts: Tensor
) -> tuple[Tensor, Tensor, float]:
    """A policy's first logits [L, K], what a unit of effort adds to them [L, K], and the price in loss per GBitOps.

    The likeliest choice for an image with effort e is the same at all positions, the one that minimises
    (1 + e) * loss + price * GBitOps. The price is the one at which all images together cost the target, to within what
    one image more or less at a choice makes; 0 where they do not come to it.

    Args:
        losses: mean loss with each choice at all positions, [K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps of all that is not chosen, policy included.
        target: mean GBitOps.
        efforts: of N images, [N], -1 for those that lose nothing by fewer bits, 0 for those that lose as the mean does.
    """
    losses, costs = losses.double(), costs.double()
    saved = (losses[:1] - losses)[None]  # what a choice saves, up to a constant, [1, K]
    worth = saved + efforts.double()[:, None, None] * saved
    of_all = costs.sum(0, keepdim=True)
    offset = budget_offset(worth, of_all, fixed, target)
    price = -(offset.sum() / of_all.sum()).item()
    if price <= 0:
        offset, price = torch.zeros_like(offset), 0.0
    sharpness = _sharpness(worth + offset)
    logits, of_effort = sharpness * (saved + offset), sharpness * saved
    return logits.expand_as(costs), of_effort.expand_as(costs), price


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
