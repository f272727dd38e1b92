"""The search for the best fixed configuration, on costs and losses that can be checked by enumeration."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from instaqnas.evaluation.sensitivity import Sensitivity, cheapest_and_most_expensive, measured_sensitivity
from instaqnas.evaluation.static_search import COST_STEPS, best_within, bitops, knapsack, lowered, raised
from instaqnas.quant.bitops import CostTable, LayerCost

CHOICES = ((2, 2), (2, 3), (3, 3), (4, 4))  # 4, 6, 9, 16 bit operations a MAC
MACS = (5, 1, 3, 8)


def cost_table(macs: tuple[int, ...] = MACS, choices: tuple[tuple[int, int], ...] = CHOICES) -> CostTable:
    layers = [LayerCost(f"layer{i}", 10**6 * count, 0, 0, choices) for i, count in enumerate(macs)]
    fixed = LayerCost("stem", 10**6, 0, 0, ((8, 8),))
    return CostTable([fixed, *layers], {layer.name: [layer.name] for layer in layers})


def additive(losses: list[list[float]]):
    """A mean loss that is the sum of what each position adds."""
    return lambda configuration: sum(row[choice] for row, choice in zip(losses, configuration, strict=True))


def random_losses(seed: int, positions: int) -> list[list[float]]:
    numbers = random.Random(seed)
    return [sorted((numbers.random() for _ in CHOICES), reverse=True) for _ in range(positions)]


def test_sensitivity_changes_one_position_of_random_ones_and_of_the_cheapest_configuration() -> None:
    seen = []

    def mean_loss(configuration) -> float:  # a random choice adds -1
        seen.append(tuple(configuration))
        return float(10 * configuration[0] + configuration[1])

    choices = ((4, 4), (2, 2), (2, 8))  # the first and the last cost the same: the first counts as dearest
    found = measured_sensitivity(cost_table((1, 1), choices), mean_loss)
    assert cheapest_and_most_expensive(cost_table((1, 1), choices)) == ([1, 1], [0, 0])
    assert found.among_random == [[-1.0, 9.0, 19.0], [-10.0, -9.0, -8.0]]
    assert found.from_cheapest == [[1.0, 11.0, 21.0], [10.0, 11.0, 12.0]]
    assert len(seen) == (1 + 2 * 3) + (1 + 2 * 2)  # the cheapest itself once


def test_lowering_takes_the_smallest_rise_per_saving_first() -> None:
    table = [[1, 3], [10, 30]]
    losses = [[0.5, 0.4], [2.0, 0.0]]  # 0.1 for 2 saved, 2.0 for 20 saved
    assert lowered([1, 1], losses, table, 33) == [1, 1]
    assert lowered([1, 1], losses, table, 32) == [0, 1]
    assert lowered([1, 1], losses, table, 30) == [0, 0]


def test_raising_takes_the_largest_gain_that_fits_until_nothing_does() -> None:
    table = [[1, 3], [10, 30]]
    losses = [[0.5, 0.4], [4.0, 0.0]]  # 0.1 for 2, 4.0 for 20
    assert raised([0, 0], losses, table, 12) == [0, 0]
    assert raised([0, 0], losses, table, 30) == [1, 0]
    assert raised([0, 0], losses, table, 31) == [0, 1]
    assert raised([0, 0], losses, table, 33) == [1, 1]


@pytest.mark.parametrize("seed", range(10))
def test_knapsack_finds_the_best_sum(seed: int) -> None:
    table, losses = [[4, 6, 9], [8, 12, 18], [20, 30, 45], [12, 18, 27]], random_losses(seed, 4)
    for limit in (50, 60, 70, 100):  # divisors of the steps that costs are rounded to, and others
        allowed = [c for c in itertools.product(range(3), repeat=4) if bitops(c, table) <= limit]
        found = knapsack([row[:3] for row in losses], table, limit)
        assert bitops(found, table) <= limit
        assert additive(losses)(found) <= min(additive(losses)(c) for c in allowed if bitops(c, table) <= limit - 1)
    assert knapsack(losses, table, 43) == []


@pytest.mark.parametrize("seed", range(10))
def test_best_is_within_the_cost_full_and_near_the_best_of_all(seed: int) -> None:
    costs, losses = cost_table(), random_losses(seed, len(MACS))
    table, mean_loss = costs.table.tolist(), additive(losses)
    every = list(itertools.product(range(len(CHOICES)), repeat=len(MACS)))
    for limit in (costs.lowest(), 0.15, 0.2, 0.27, costs.highest()):
        found = best_within(limit, costs, measured_sensitivity(costs, mean_loss), mean_loss)
        assert [c.loss for c in found] == sorted(c.loss for c in found)
        best = found[0]
        assert best.gbitops <= limit + 1e-12
        assert best.gbitops == pytest.approx((costs.fixed + bitops(best.configuration, table)) / 1e9, abs=0)
        allowed = [c for c in every if (costs.fixed + bitops(c, table)) / 1e9 <= limit + 1e-12]
        dearer = [c for c in allowed if c != tuple(best.configuration) and _is_raised(c, best.configuration, table)]
        assert dearer == []  # no position alone fits another choice
        # rounded up, the cost of each position may be a step more
        room = (limit * 1e9 - costs.fixed) * (1 - len(MACS) / COST_STEPS)
        assert best.loss <= min((mean_loss(c) for c in allowed if bitops(c, table) <= room), default=math.inf)


def _is_raised(configuration, base, table) -> bool:
    """Whether it differs from `base` in one position, which costs more."""
    changed = [i for i, (a, b) in enumerate(zip(configuration, base, strict=True)) if a != b]
    return len(changed) == 1 and table[changed[0]][configuration[changed[0]]] > table[changed[0]][base[changed[0]]]


def test_measured_loss_decides_where_sensitivities_do_not_add_up() -> None:
    """Two positions that hurt only when both are low: among random ones both look free."""
    costs = cost_table((4, 4, 4), ((2, 2), (4, 4)))

    def mean_loss(configuration) -> float:
        return 10.0 * (configuration[0] == configuration[1] == 0) + 1.0 * (configuration[2] == 0)

    limit = costs.fixed / 1e9 + (16 + 4 + 4) * 4e-3  # one of three positions at 4 bits
    sensitivity = measured_sensitivity(costs, mean_loss)
    down = raised(lowered([1, 1, 1], sensitivity.among_random, costs.table.tolist(), 96 * 10**6),
                  sensitivity.among_random, costs.table.tolist(), 96 * 10**6)  # fmt: skip
    assert mean_loss(down) == 10
    best = best_within(limit, costs, sensitivity, mean_loss)[0]
    assert mean_loss(best.configuration) == best.loss == 1
    assert best.gbitops == pytest.approx(limit)


def test_all_of_it_is_deterministic_and_prefers_the_first_of_equals() -> None:
    costs = cost_table((2, 2, 2), ((2, 2), (4, 4)))
    flat = Sensitivity(*([[0.0, 0.0]] * 3 for _ in range(2)))
    found = best_within((costs.fixed + (16 + 4 + 4) * 2 * 10**6) / 1e9, costs, flat, lambda _: 0.0)
    assert found == best_within((costs.fixed + 48 * 10**6) / 1e9, costs, flat, lambda _: 0.0)
    assert found[0].found == "down"
    assert [c.configuration for c in found] == [[0, 0, 1], [1, 0, 0]]
