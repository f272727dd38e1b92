"""The best fixed bit configuration within a cost: candidates from sensitivities, the winner by measured loss.

A sensitivity changes one position while all others are random or the cheapest. Sensitivities of several positions do
not add up, so a handful of candidates is built from the tables and measured. Each candidate is raised until no position
fits a more expensive choice:

down       starts at the most expensive configuration and lowers the position with the least loss per GBitOps saved,
           by losses among random configurations
up         starts at the cheapest configuration and raises the position with the most gain per GBitOps added,
           by losses around the cheapest configuration
mean       as `down`, with the mean of both tables
knapsack   the smallest sum of losses, by the mean of both tables
uniform    the most expensive uniform configuration within the cost

The search is deterministic: costs are whole bit operations, and ties go to the first position and choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from instaqnas.evaluation.sensitivity import Configuration, Extremes, MeanLoss, Sensitivity, cheapest_and_most_expensive
from instaqnas.quant.bitops import CostTable

COST_STEPS = 4000  # of the knapsack: costs are rounded up to this fraction of the limit

Losses = Sequence[Sequence[float]]  # [L][K]
BitOps = Sequence[Sequence[int]]  # [L][K]


@dataclass(frozen=True)
class Candidate:
    """One configuration: how it was found, GBitOps of the detector, and mean loss."""

    found: str
    configuration: list[int]
    gbitops: float
    loss: float

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def best_within(
    limit_gbitops: float, costs: CostTable, sensitivity: Sensitivity, mean_loss: MeanLoss
) -> list[Candidate]:
    """Candidates, the one with the smallest measured loss first.

    Args:
        limit_gbitops: highest cost of the detector, at least the cost of its cheapest configuration.
        costs: of the detector.
        sensitivity: of the detector.
        mean_loss: measures a candidate.
    """
    limit = round(limit_gbitops * 1e9) - costs.fixed
    found = candidates(limit, costs.table.tolist(), sensitivity, cheapest_and_most_expensive(costs))
    measured = []
    for name, configuration in found.items():
        total = costs.fixed + bitops(configuration, costs.table.tolist())
        measured.append(Candidate(name, configuration, total / 1e9, mean_loss(configuration)))
    return sorted(measured, key=lambda candidate: candidate.loss)


def candidates(limit: int, table: BitOps, sensitivity: Sensitivity, extremes: Extremes) -> dict[str, list[int]]:
    """Different configurations of at most `limit` bit operations at the positions, by how they were found."""
    cheapest, most_expensive = extremes
    down, up, mean = sensitivity.among_random, sensitivity.from_cheapest, sensitivity.mean
    uniform = [[choice] * len(table) for choice in range(len(table[0]))]
    start = max((c for c in uniform if bitops(c, table) <= limit), key=lambda c: bitops(c, table), default=cheapest)
    found = {
        "down": raised(lowered(most_expensive, down, table, limit), down, table, limit),
        "up": raised(cheapest, up, table, limit),
        "mean": raised(lowered(most_expensive, mean, table, limit), mean, table, limit),
        "knapsack": raised(knapsack(mean, table, limit) or cheapest, mean, table, limit),
        "uniform": raised(start, mean, table, limit),
    }
    return {name: c for i, (name, c) in enumerate(found.items()) if c not in list(found.values())[:i]}


def bitops(configuration: Configuration, table: BitOps) -> int:
    """Bit operations of the positions."""
    return sum(row[choice] for row, choice in zip(table, configuration, strict=True))


def lowered(configuration: Configuration, losses: Losses, table: BitOps, limit: int) -> list[int]:
    """Lowers the position with the least loss per bit operation saved, step by step, down to `limit`."""
    result = list(configuration)
    while bitops(result, table) > limit:
        steps = [
            ((losses[position][choice] - losses[position][now]) / (row[now] - cost), position, choice)
            for position, (now, row) in enumerate(zip(result, table, strict=True))
            for choice, cost in enumerate(row)
            if cost < row[now]
        ]
        _, position, choice = min(steps)
        result[position] = choice
    return result


def raised(configuration: Configuration, losses: Losses, table: BitOps, limit: int) -> list[int]:
    """Raises the position with the most gain per bit operation added, step by step, as long as `limit` allows."""
    result = list(configuration)
    while True:
        room = limit - bitops(result, table)
        steps = [
            ((losses[position][choice] - losses[position][now]) / (cost - row[now]), position, choice)
            for position, (now, row) in enumerate(zip(result, table, strict=True))
            for choice, cost in enumerate(row)
            if 0 < cost - row[now] <= room
        ]
        if not steps:
            return result
        _, position, choice = min(steps)
        result[position] = choice


def knapsack(losses: Losses, table: BitOps, limit: int) -> list[int]:
    """The configuration with the smallest sum of losses within `limit`, its costs rounded up to limit / `COST_STEPS`.

    Returns: an empty list if no configuration is left within the limit after rounding.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by rounded cost, of the positions so far
    for row, costs in zip(losses, table, strict=True):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (loss, chosen) in best.items():
            for choice, cost in enumerate(costs):
                total, extended = used - (-cost * COST_STEPS // limit), (loss + row[choice], (*chosen, choice))
                if total <= COST_STEPS and (total not in following or extended < following[total]):
                    following[total] = extended
        best = following
    return list(min(best.values(), default=(0.0, ()))[1])
