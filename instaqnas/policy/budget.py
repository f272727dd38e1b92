"""How the reward `budget` comes to its target: the price of GBitOps during the search, and the last step after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMOOTHING = 0.3  # weight of the newest batch in the moving average of the excess
TOLERANCE = 1e-3  # of the target: a mean cost closer than this has met it
BISECTIONS = 100


@dataclass(frozen=True)
class Multiplier:
    """The price of GBitOps: dual ascent, and a proportional term that damps its swings.

    Ascent alone integrates the excess while the policy, which answers late, integrates the price: together they swing
    about the target. The proportional term takes effect at once, and gives way at once when the target is reached.

    integral: sum of the steps of dual ascent, never below 0.
    excess: moving average of mean cost / target - 1.

    Source: Stooke et al., "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", ICML 2020,
    algorithm 2, without a derivative term.
    """

    integral: float = 0.0
    excess: float = 0.0

    def value(self, gain: float) -> float:
        """The multiplier, never below 0; `gain` weighs the proportional term."""
        return max(0.0, self.integral + gain * self.excess)

    def updated(self, mean_gbitops: float, target: float, lr: float) -> Multiplier:
        """After a policy step whose images cost `mean_gbitops`; `lr` is the step of dual ascent."""
        excess = mean_gbitops / target - 1
        return Multiplier(max(0.0, self.integral + lr * excess), self.excess + SMOOTHING * (excess - self.excess))


def greedy_gbitops(logits: Tensor, costs: Tensor, fixed: float) -> float:
    """Mean GBitOps of the most likely choices of N images.

    Args:
        logits: [N, L, K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps of all that is not chosen.
    """
    return fixed + costs.expand_as(logits).gather(-1, logits.argmax(-1, keepdim=True)).sum().item() / len(logits)


def budget_offset(logits: Tensor, costs: Tensor, fixed: float, target: float) -> Tensor:
    """What to add to a policy's logits, [L, K], so that the most likely choices of N images cost `target` on average.

    It is -price * costs, with one price for all images and positions. The choices become those that maximise
    sum log p(choice) - price * GBitOps: of all with their mean cost, the likeliest by the policy itself (Lagrange
    relaxation; Everett, Operations Research 1963). Where the policy is least decided per GBitOps, they change first.
    The mean cost falls with the price in steps of one position of one image, so bisection finds it; where images with
    equal logits make a step too wide for `TOLERANCE`, the end that is nearer to the target is taken.

    Args:
        logits: of the policy in evaluation, [N, L, K].
        costs: GBitOps of each choice at each position, [L, K].
        fixed: GBitOps of all that is not chosen, policy included.
        target: mean GBitOps, from that of the cheapest configuration to that of the dearest.
    """
    logits, costs = logits.double(), costs.double()

    def mean_gbitops(price: float) -> float:
        return greedy_gbitops(logits - price * costs, costs, fixed)

    differences = (costs[:, :, None] - costs[:, None, :]).abs()
    if not differences.any():  # nothing to choose from, or all at the same cost
        return torch.zeros_like(costs)
    smallest = differences[differences > 0].min().item()
    highest = 1 + 2 * (logits.amax() - logits.amin()).item() / smallest  # here cost alone decides
    low, high = -highest, highest
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        cost = mean_gbitops(price)
        if abs(cost / target - 1) < TOLERANCE:
            return -price * costs
        low, high = (price, high) if cost > target else (low, price)
    return -min(low, high, key=lambda price: abs(mean_gbitops(price) - target)) * costs
