"""The best fixed bit configuration within a cost: candidates from sensitivities, the winner by measured loss.

Sensitivities change one position, all others being random or the cheapest. They do not add up, so a handful of
candidates comes from either table, and from the mean of both; each is filled up until no position fits a dearer choice:

down       from the dearest configuration, lowers what rises least per GBitOps saved; losses among random ones
up         from the cheapest configuration, raises what gains most per GBitOps added; losses around the cheapest
mean       as `down`, with the mean of both tables
knapsack   the smallest sum of the mean of both tables
uniform    the dearest uniform configuration within the cost

Everything is deterministic: costs are whole bit operations, and ties go to the first position and choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from instaqnas.quant.bitops import CostTable
from instaqnas.training.sensitivity import Configuration, MeanLoss, Sensitivity, ends

COST_STEPS = 4000  # that the knapsack rounds costs up to, of the limit

Losses = Sequence[Sequence[float]]  # [L][K]
BitOps = Sequence[Sequence[int]]  # [L][K]


@dataclass(frozen=True)
class Candidate:
    """One configuration: how it was found, what the detector costs with it, and its mean loss."""

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
    """The candidates, best first.

    Args:
        limit_gbitops: most that the detector may cost, at least that of its cheapest configuration.
        costs: of the detector.
        sensitivity: losses among its random configurations and around its cheapest.
        mean_loss: measures the candidates.
    """
    limit = round(limit_gbitops * 1e9) - costs.fixed
    found = candidates(limit, costs.table.tolist(), sensitivity, *ends(costs))
    measured = []
    for name, configuration in found.items():
        total = costs.fixed + bitops(configuration, costs.table.tolist())
        measured.append(Candidate(name, configuration, total / 1e9, mean_loss(configuration)))
    return sorted(measured, key=lambda candidate: candidate.loss)


def candidates(
    limit: int, table: BitOps, sensitivity: Sensitivity, dearest: Configuration, cheapest: Configuration
) -> dict[str, list[int]]:
    """Different configurations of at most `limit` bit operations at the positions, by how they were found."""
    down, up, mean = sensitivity.among_random, sensitivity.from_cheapest, sensitivity.mean
    uniform = [[choice] * len(table) for choice in range(len(table[0]))]
    start = max((c for c in uniform if bitops(c, table) <= limit), key=lambda c: bitops(c, table), default=cheapest)
    found = {
        "down": raised(lowered(dearest, down, table, limit), down, table, limit),
        "up": raised(cheapest, up, table, limit),
        "mean": raised(lowered(dearest, mean, table, limit), mean, table, limit),
        "knapsack": raised(knapsack(mean, table, limit) or cheapest, mean, table, limit),
        "uniform": raised(start, mean, table, limit),
    }
    return {name: c for i, (name, c) in enumerate(found.items()) if c not in list(found.values())[:i]}


def bitops(configuration: Configuration, table: BitOps) -> int:
    """Bit operations of the positions."""
    return sum(row[choice] for row, choice in zip(table, configuration, strict=True))


def lowered(configuration: Configuration, losses: Losses, table: BitOps, limit: int) -> list[int]:
    """Lowers step by step what rises least per bit operation saved, until the cost is at most `limit`."""
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
    """Raises step by step what gains most per bit operation added, as long as anything fits into `limit`."""
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
    """The configuration with the smallest sum of losses of at most `limit`, but for rounding costs up.

    Empty if rounding leaves none.
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
