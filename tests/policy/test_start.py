"""Initial logits of a policy: from a configuration, and from the best choices at one price."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instaqnas.policy.budget import TOLERANCE
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import MEAN_TOP_PROBABILITY, start_at_price, start_logits

COSTS = torch.tensor([[0.1, 0.2, 0.5], [1.0, 2.0, 5.0], [0.2, 0.1, 0.4], [0.3, 0.6, 1.5]]).double()
LOSSES = torch.tensor([[9.0, 8.0, 7.5], [9.0, 6.0, 3.0], [8.0, 9.0, 7.0], [7.0, 7.0, 6.0]])
EFFORTS = torch.linspace(-1, 1, 201)
FIXED = 3.0
NONE = torch.zeros(4, dtype=torch.bool)


def choices_at(price: float) -> Tensor:
    """The best choices [N, L], by trying all K."""
    rows = []
    for effort in EFFORTS.tolist():
        total = (1 + effort) * LOSSES.double() + price * COSTS
        rows.append([min(range(3), key=row.__getitem__) for row in total.tolist()])
    return torch.tensor(rows)


def mean_gbitops(choices: Tensor) -> float:
    return FIXED + COSTS[torch.arange(4), choices].sum(1).mean().item()


def test_logits_from_a_configuration_give_its_choices_a_probability_of_seven_tenths() -> None:
    probabilities = start_logits([2, 0], 3).softmax(-1)
    torch.testing.assert_close(probabilities, torch.tensor([[0.15, 0.15, 0.7], [0.7, 0.15, 0.15]]))
    assert start_logits([0, 0], 1).softmax(-1).tolist() == [[1], [1]]


@pytest.mark.parametrize("target", [5.0, 6.0, 8.0])
def test_the_most_likely_choices_are_the_best_at_one_price_and_cost_the_target(target: float) -> None:
    logits, of_effort, price = start_at_price(LOSSES, COSTS, FIXED, target, EFFORTS, NONE)
    likeliest = (logits + EFFORTS.double()[:, None, None] * of_effort).argmax(-1)
    assert price > 0
    assert (likeliest != choices_at(price)).float().mean() < 0.01  # ties at the limit
    assert mean_gbitops(likeliest) == pytest.approx(target, rel=TOLERANCE)
    assert mean_gbitops(choices_at(price * 1.02)) <= target <= mean_gbitops(choices_at(price / 1.02))
    gbitops = COSTS[torch.arange(4), likeliest].sum(1)
    assert gbitops[-1] > gbitops[0]
    assert (gbitops.diff() >= -1e-9).all()


def test_at_some_positions_all_images_get_the_choice_of_effort_0() -> None:
    alike = torch.tensor([False, True, False, False])
    logits, of_effort, price = start_at_price(LOSSES, COSTS, FIXED, 6.0, EFFORTS, alike)
    likeliest = (logits + EFFORTS.double()[:, None, None] * of_effort).argmax(-1)
    expected = choices_at(price)
    expected[:, 1] = expected[100, 1]  # effort 0
    assert (likeliest[:, 1] == likeliest[0, 1]).all()
    assert (likeliest != expected).float().mean() < 0.01
    assert len(likeliest.unique(dim=0)) > 1


def test_the_price_is_0_if_the_target_exceeds_all_costs() -> None:
    highest = mean_gbitops(torch.full((201, 4), 2))
    logits, of_effort, price = start_at_price(LOSSES, COSTS, FIXED, highest + 1, EFFORTS[1:], NONE)
    assert price == 0
    assert ((logits + of_effort).argmax(-1) == LOSSES.argmin(-1)).all()


def test_the_most_likely_choices_have_the_stated_mean_probability() -> None:
    logits, of_effort, _ = start_at_price(LOSSES, COSTS, FIXED, 6.0, EFFORTS, NONE)
    probabilities = (logits + EFFORTS.double()[:, None, None] * of_effort).softmax(-1)
    assert probabilities.amax(-1).mean().item() == pytest.approx(MEAN_TOP_PROBABILITY, abs=1e-6)


def test_at_the_lowest_cost_all_images_have_the_cheapest_choices() -> None:
    lowest = FIXED + 0.1 + 1.0 + 0.1 + 0.3
    logits, of_effort, _ = start_at_price(LOSSES, COSTS, FIXED, lowest, EFFORTS, NONE)
    likeliest = (logits + EFFORTS.double()[:, None, None] * of_effort).argmax(-1)
    assert (likeliest == torch.tensor([0, 0, 1, 0])).all()


@torch.no_grad()
def test_a_policy_starts_with_these_logits() -> None:
    torch.manual_seed(0)
    policy = PolicyNet(4, 3, pool=1, width=2, bits=(8, 8), effort=[0.0] * 3).eval()
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    for module in policy.modules():
        if hasattr(module, "initialize_steps"):
            module.register_forward_pre_hook(lambda layer, args: layer.initialize_steps(args[0]))
    before, efforts = policy(images), policy.efforts(images)
    logits, of_effort, _ = start_at_price(LOSSES, COSTS, FIXED, 6.0, EFFORTS, NONE)
    policy.begin(logits.float(), of_effort.float())
    expected = before + logits + efforts[:, None, None] * of_effort
    torch.testing.assert_close(policy(images), expected.float(), rtol=1e-4, atol=1e-3)
