"""How the reward `budget` meets its target: the price of GBitOps during the search, and a final shift of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from instaqnas.errors import InputError

SMOOTHING = 0.3  # weight of the newest batch in the moving average of the excess
TOLERANCE = 1e-3  # relative: a mean cost this close to the target has met it
BISECTIONS = 100
EDGE_BISECTIONS = 40
STEP_INTO = 0.01  # how far a price may lie from where bisection ends, as a share of the highest one
TABLE_POINTS = 257


@dataclass(frozen=True)
class Multiplier:
    """The Lagrange multiplier, that is the price of GBitOps: dual ascent plus a proportional term against overshoot.

    Dual ascent integrates the excess, and the policy, which reacts with a delay, integrates the price: together they
    oscillate about the target. The proportional term acts at once and vanishes as soon as the target is met.

    integral: sum of the steps of dual ascent, never below 0.
    excess: moving average of mean cost / target - 1.

    Source: Stooke et al., "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", ICML 2020,
    algorithm 2, without a derivative term.
    """

    integral: float = 0.0
    excess: float = 0.0

    def value(self, gain: float) -> float:
        """max(0, integral + gain * excess)."""
        return max(0.0, self.integral + gain * self.excess)

    def updated(self, mean_gbitops: float, target: float, lr: float) -> Multiplier:
        """The multiplier after a policy step with the mean cost `mean_gbitops`; `lr` is the step of dual ascent."""
        excess = mean_gbitops / target - 1
        return Multiplier(max(0.0, self.integral + lr * excess), self.excess + SMOOTHING * (excess - self.excess))


def greedy_gbitops(logits: Tensor, costs: Tensor, fixed: float) -> float:
    """Mean GBitOps of the most likely choices of N images.

    Args:
        logits: [N, L, K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps that do not depend on the choices.
    """
    return fixed + costs.expand_as(logits).gather(-1, logits.argmax(-1, keepdim=True)).sum().item() / len(logits)


def budget_offset(logits: Tensor, costs: Tensor, fixed: float, target: float) -> Tensor:
    """Offset [L, K] to the logits of a policy, -price * costs, for the price of `budget_price`."""
    return -budget_price(logits, costs, fixed, target) * costs.double()


def budget_price(logits: Tensor, costs: Tensor, fixed: float, target: float) -> float:
    """The price of GBitOps at which the most likely choices of N images cost `target` on average.

    There is one price for all images and positions. The policy shifted by -price * costs chooses the maximum of
    sum log p(choice) - price * GBitOps: among all choices with the same mean cost, the ones that the policy itself
    finds most likely (Lagrange relaxation; Everett, Operations Research 1963). Positions where the policy is least
    decided per GBitOps change first. The mean cost is a step function of the price, one step per position and image,
    and bisection finds the price. If images with equal logits make a step wider than `TOLERANCE`, the side closer to
    the target is taken, at a distance from the step, so that rounding cannot change sides.

    Args:
        logits: of the policy in eval mode, [N, L, K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps that do not depend on the choices, policy included.
        target: mean GBitOps, between the costs of the cheapest and the most expensive configuration.
    """
    logits, costs = logits.double(), costs.double()

    def mean_gbitops(price: float) -> float:
        return greedy_gbitops(logits - price * costs, costs, fixed)

    differences = (costs[:, :, None] - costs[:, None, :]).abs()
    if not differences.any():  # a single choice, or all choices cost the same
        return 0.0
    smallest = differences[differences > 0].min().item()
    highest = 1 + 2 * (logits.amax() - logits.amin()).item() / smallest  # beyond this price the cost alone decides
    price = _bisected(mean_gbitops, target, highest)
    middle = _middle_of_step(mean_gbitops, price, highest)
    return min(max(middle, price - STEP_INTO * highest), price + STEP_INTO * highest)


def _bisected(mean_gbitops: Callable[[float], float], target: float, highest: float) -> float:
    """A price between -`highest` and `highest` at which a falling function of the price comes closest to `target`."""
    low, high = -highest, highest
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        cost = mean_gbitops(price)
        if abs(cost / target - 1) < TOLERANCE:
            return price
        low, high = (price, high) if cost > target else (low, price)
    return min(low, high, key=lambda price: abs(mean_gbitops(price) - target))


def _middle_of_step(mean_gbitops: Callable[[float], float], price: float, highest: float) -> float:
    """The middle of the prices around `price` with the same mean cost.

    At an end of a step, rounding would decide: a coarse policy gives many images equal logits, which change together.
    """
    cost, ends = mean_gbitops(price), []
    for bound in (-highest, highest):
        inside, outside = price, bound
        for _ in range(EDGE_BISECTIONS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if mean_gbitops(middle) == cost else (inside, middle)
        ends.append(inside)
    return sum(ends) / 2


class PricePoint(NamedTuple):
    """Mean GBitOps of a policy, its own cost included, after its logits were shifted by -price * costs."""

    price: float
    gbitops: float


def price_table(logits: Tensor, costs: Tensor, fixed: float) -> list[PricePoint]:
    """Prices for `TABLE_POINTS` mean costs, evenly from the cheapest to the most expensive configuration.

    Args as in `budget_price`. Returns: points of different mean costs, the lowest first.
    """
    lowest, highest = (fixed + total.item() for total in (costs.amin(1).sum(), costs.amax(1).sum()))
    points: dict[float, PricePoint] = {}
    for step in range(TABLE_POINTS):
        target = lowest + (highest - lowest) * step / (TABLE_POINTS - 1)
        price = budget_price(logits, costs, fixed, target)
        gbitops = greedy_gbitops(logits.double() - price * costs.double(), costs.double(), fixed)
        points.setdefault(gbitops, PricePoint(price, gbitops))
    return [points[gbitops] for gbitops in sorted(points)]


def price_of(table: Sequence[PricePoint], gbitops: float) -> float:
    """The price for a mean cost, linear between the points of a table.

    Raises: InputError if the cost is outside the table.
    """
    costs = [point.gbitops for point in table]
    if not costs[0] <= gbitops <= costs[-1]:
        raise InputError(f"a budget of {gbitops:g} GBitOps: expected {costs[0]:.4g} to {costs[-1]:.4g}")
    return float(np.interp(gbitops, costs, [point.price for point in table]))
