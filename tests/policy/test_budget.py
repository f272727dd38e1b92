"""The price of GBitOps and the offset that meets a target, against hand-worked values and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from instaqnas.errors import InputError
from instaqnas.policy.budget import (
    SMOOTHING,
    TOLERANCE,
    Multiplier,
    PricePoint,
    budget_offset,
    greedy_gbitops,
    price_of,
    price_table,
)
from instaqnas.policy.reward import budget

# --- The multiplier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "integral, cost, updated",
    [(0.3, 2.0, 0.3), (0.3, 3.0, 0.35), (0.3, 1.0, 0.25), (0.02, 1.0, 0.0), (0.0, 1.9, 0.0), (0.0, 4.0, 0.1)],
)
def test_a_step_of_dual_ascent_by_hand(integral: float, cost: float, updated: float) -> None:
    multiplier = Multiplier(integral).updated(cost, target=2.0, lr=0.1)
    assert multiplier.integral == pytest.approx(updated)
    assert multiplier.value(gain=0.0) == multiplier.integral


def test_the_excess_is_a_moving_average_that_takes_effect_at_once() -> None:
    assert SMOOTHING == 0.3
    once = Multiplier(0.5).updated(2.2, target=2.0, lr=1.0)  # 10 % above
    assert once.excess == pytest.approx(0.03)
    assert once.value(gain=20.0) == pytest.approx(0.5 + 0.1 + 20 * 0.03)
    twice = once.updated(1.8, target=2.0, lr=1.0)
    assert twice.excess == pytest.approx(0.7 * 0.03 - 0.3 * 0.1)
    assert twice.value(gain=20.0) == pytest.approx(0.5 - 20 * 0.009)


def test_the_multiplier_is_never_below_0() -> None:
    assert Multiplier(0.1, -0.1).value(gain=20.0) == 0


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_the_multiplier_finds_the_price_at_which_the_mean_cost_is_the_target(gain: float) -> None:
    # 100 images: cost 1 at quality 0, or cost 2 at quality 0.005, 0.015 ... 0.995. At a mean cost of 1.3 the best 30
    # take cost 2: those worth more than 0.7 = multiplier / 1.3, so that the multiplier is 0.91.
    quality = (torch.arange(100).double() + 0.5) / 100
    cheap, expensive = torch.ones(100).double(), torch.full((100,), 2.0).double()
    multiplier, costs, values = Multiplier(), [], []
    for _ in range(400):
        settings = {"target": 1.3, "multiplier": multiplier.value(gain)}
        take = budget(quality, expensive, **settings) > budget(torch.zeros_like(quality), cheap, **settings)
        costs.append(torch.where(take, expensive, cheap).mean().item())
        multiplier = multiplier.updated(costs[-1], 1.3, lr=0.1)
        values.append(multiplier.value(gain))
    assert costs[0] == 2  # a free budget is spent
    assert sum(costs[-100:]) / 100 == pytest.approx(1.3, abs=0.01)
    assert values[-1] == pytest.approx(0.91, abs=0.02)


def swings(gain: float) -> list[float]:
    """Costs of a policy that reacts slowly: each step moves the cost by 0.01 times the error of the price."""
    cost, multiplier, costs = 1.1, Multiplier(), []
    for _ in range(300):
        multiplier = multiplier.updated(cost, target=1.0, lr=1.0)
        cost -= 0.01 * (multiplier.value(gain) - 2.0)
        costs.append(cost)
    return costs


def test_the_proportional_term_damps_the_swings_of_ascent_alone() -> None:
    alone, damped = swings(gain=0.0), swings(gain=20.0)
    assert max(abs(cost - 1) for cost in alone[-100:]) > 0.1
    assert max(abs(cost - 1) for cost in damped[-100:]) < 0.001


def test_a_budget_that_does_not_bind_is_left_alone() -> None:
    multiplier = Multiplier(0.5)
    for _ in range(100):
        multiplier = multiplier.updated(1.0, target=2.0, lr=0.05)
    assert multiplier.value(gain=20.0) == 0


# --- The offset -------------------------------------------------------------------------------------------------------


def random_logits(images: int, positions: int, choices: int, seed: int = 0) -> Tensor:
    return torch.randn(images, positions, choices, generator=torch.Generator().manual_seed(seed))


COSTS = torch.tensor([[0.04, 0.09, 0.16], [0.4, 0.9, 1.6], [0.16, 0.04, 0.09]]).double()  # in no particular order


def test_greedy_cost_by_hand() -> None:
    logits = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 1], [0, 0, 1], [0, 1, 0]]])
    expected = 2.0 + (0.04 + 0.9 + 0.09 + 0.16 + 1.6 + 0.04) / 2
    assert greedy_gbitops(logits, COSTS, fixed=2.0) == pytest.approx(expected)


def test_an_offset_is_one_price_times_the_costs() -> None:
    offset = budget_offset(random_logits(50, 3, 3), COSTS, 2.0, target=2.9)
    prices = -offset / COSTS
    torch.testing.assert_close(prices, prices[0, 0].expand(3, 3))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 0.77, 1.0])
def test_the_target_is_met_from_the_cheapest_to_the_most_expensive(share: float) -> None:
    lowest, highest = 2 + 0.04 + 0.4 + 0.04, 2 + 0.16 + 1.6 + 0.16
    target = lowest + share * (highest - lowest)
    logits = random_logits(1000, 3, 3)
    offset = budget_offset(logits, COSTS, 2.0, target)
    assert greedy_gbitops(logits + offset, COSTS, 2.0) == pytest.approx(target, rel=TOLERANCE)


def test_nothing_is_shifted_where_the_target_is_met_already() -> None:
    logits = random_logits(100, 3, 3)
    target = greedy_gbitops(logits, COSTS, 2.0)
    changed = (logits + budget_offset(logits, COSTS, 2.0, target)).argmax(-1) != logits.argmax(-1)
    assert not changed.any()


def test_the_configurations_are_the_most_likely_ones_at_their_cost() -> None:
    """Brute force over all configurations of three images."""
    logits = random_logits(3, 2, 3, seed=1).double()
    costs, options = COSTS[:2], list(itertools.product(range(3), repeat=6))
    everything = torch.tensor(options).view(-1, 3, 2)
    log_probs = logits.log_softmax(-1).expand(len(options), -1, -1, -1)
    likelihood = log_probs.gather(-1, everything[..., None]).sum((1, 2, 3))
    cost = costs.expand(len(options), 3, -1, -1).gather(-1, everything[..., None]).sum((1, 2, 3)) / 3
    for target in (0.55, 0.75, 1.0, 1.3):
        chosen = (logits + budget_offset(logits, costs, 0.0, target)).argmax(-1)
        own = (everything == chosen).all(-1).all(-1)
        assert own.sum() == 1
        saves = cost[own] <= greedy_gbitops(logits, costs, 0.0)  # than without a price, or else spends more
        alternatives = likelihood[cost <= cost[own] + 1e-12 if saves else cost >= cost[own] - 1e-12]
        assert likelihood[own].item() == pytest.approx(alternatives.max().item())


def test_images_with_equal_logits_end_as_near_as_a_step_allows() -> None:
    logits = torch.tensor([[[0.3, 0.0], [0.0, 0.1]]]).expand(10, -1, -1)
    costs = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double()  # all images alike: 2, 3 or 4
    for target, met in ((2.1, 2.0), (2.9, 3.0), (3.4, 3.0), (3.6, 4.0)):
        offset = budget_offset(logits, costs, 0.0, target)
        assert greedy_gbitops(logits + offset, costs, 0.0) == met


@pytest.mark.parametrize("target", [0.25, 0.31, 0.36, 0.46])
def test_rounding_does_not_move_images_with_equal_logits_across_a_step(target: float) -> None:
    """A coarse policy: a thousand images share five differences of logits. 0.2 to 0.7 GBitOps in steps of 0.1."""
    difference = torch.tensor([-6.0, -5.0, 0.5, 2.0, 7.0]).repeat(200)
    logits = torch.stack([torch.zeros(1000), difference], -1)[:, None]
    costs = torch.tensor([[0.2, 0.7]]).double()
    offset = budget_offset(logits, costs, 0.0, target)
    met = greedy_gbitops(logits + offset, costs, 0.0)
    assert abs(met - target) <= 0.05 + 1e-9  # half a step
    for noise in (-1e-3, 1e-3):
        moved = logits + torch.tensor([0.0, noise])
        assert greedy_gbitops(moved + offset, costs, 0.0) == met


@pytest.mark.parametrize("costs", [[[0.5]], [[0.5, 0.5]]])
def test_without_anything_to_choose_nothing_is_shifted(costs: list[list[float]]) -> None:
    table = torch.tensor(costs).double()
    offset = budget_offset(random_logits(4, *table.shape), table, 1.0, 3.0)
    assert torch.equal(offset, torch.zeros_like(table))


# --- Prices for other budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2.5, 2.71, 3.2, 3.9])
def test_the_table_has_the_price_of_every_budget(budget: float) -> None:
    logits = random_logits(1000, 3, 3)
    price = price_of(price_table(logits, COSTS, 2.0), budget)
    assert greedy_gbitops(logits - price * COSTS, COSTS, 2.0) == pytest.approx(budget, rel=0.005)


def test_a_table_runs_from_the_cheapest_to_the_most_expensive_configuration_at_falling_prices() -> None:
    table = price_table(random_logits(200, 3, 3), COSTS, 2.0)
    assert table[0].gbitops == pytest.approx(2 + 0.04 + 0.4 + 0.04, rel=TOLERANCE)
    assert table[-1].gbitops == pytest.approx(2 + 0.16 + 1.6 + 0.16, rel=TOLERANCE)
    assert all(a.gbitops < b.gbitops and a.price > b.price for a, b in itertools.pairwise(table))


def test_between_two_points_the_price_is_linear_and_outside_there_is_none() -> None:
    table = [PricePoint(4.0, 1.0), PricePoint(2.0, 2.0), PricePoint(-1.0, 2.5)]
    assert price_of(table, 1.25) == pytest.approx(3.5)
    assert price_of(table, 2.0) == 2.0
    for outside in (0.9, 2.6):
        with pytest.raises(InputError, match=f"a budget of {outside} GBitOps: expected 1 to 2.5"):
            price_of(table, outside)
