"""Ways to choose bit configurations, and the probabilities behind them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from instaqnas.policy.bit_config import (
    entropy,
    fixed,
    greedy_by,
    log_prob,
    mix_uniform,
    sample,
    sampled_by,
    sandwich,
    uniformly_random,
)

PROBABILITIES = torch.tensor(
    [[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]]
)  # B=2, L=2, K=3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int) -> Tensor:
    return torch.zeros(count, 3, 4, 4)


class Table(nn.Module):
    """A policy whose logits do not look at the image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1, -1)


# --- Probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_mixing_is_a_weighted_mean_with_the_uniform_distribution(epsilon: float) -> None:
    logits = torch.tensor([[[math.log(5.0), math.log(3.0), math.log(2.0)]]])
    expected = [(1 - epsilon) * p + epsilon / 3 for p in (0.5, 0.3, 0.2)]
    mixed = mix_uniform(logits, epsilon)
    assert mixed[0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert mixed.sum().item() == pytest.approx(1.0)


def test_log_prob_is_the_sum_over_positions_by_hand() -> None:
    choices = torch.tensor([[1, 2], [0, 0]])
    expected = [math.log(0.3) + math.log(0.8), math.log(0.25) + math.log(1.0)]
    assert log_prob(PROBABILITIES, choices).tolist() == pytest.approx(expected, rel=1e-6)


def test_probabilities_of_all_configurations_sum_to_one() -> None:
    probabilities = torch.randn(1, 3, 4, generator=generator()).softmax(-1)
    configurations = torch.cartesian_prod(*[torch.arange(4)] * 3)
    total = log_prob(probabilities.expand(64, -1, -1), configurations).exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-5)


def test_log_prob_agrees_with_torchs_categorical() -> None:
    logits = torch.randn(5, 13, 3, generator=generator(1))
    choices = torch.randint(3, (5, 13), generator=generator(2))
    expected = torch.distributions.Categorical(logits=logits).log_prob(choices).sum(-1)
    torch.testing.assert_close(log_prob(logits.softmax(-1), choices), expected)


@pytest.mark.parametrize("choices", [2, 3, 7])
def test_entropy_of_the_uniform_distribution_is_the_logarithm_of_k(choices: int) -> None:
    values = entropy(torch.full((2, 5, choices), 1 / choices))
    assert values.shape == (2, 5)
    torch.testing.assert_close(values, torch.full((2, 5), math.log(choices)))


def test_entropy_by_hand() -> None:
    first = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    second = -(0.2 * math.log(0.1) + 0.8 * math.log(0.8))
    expected = torch.tensor([[first, second], [1.5 * math.log(2), 0.0]])
    torch.testing.assert_close(entropy(PROBABILITIES), expected)


def test_entropy_of_a_policy_that_is_certain_has_a_finite_gradient() -> None:
    logits = torch.tensor([[[0.0, 200.0, -200.0]]], requires_grad=True)  # softmax underflows to exactly 0, 1, 0
    entropy(logits.softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all()


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_sampled_frequencies_are_the_probabilities() -> None:
    count = 20_000
    drawn = sample(PROBABILITIES.repeat(count, 1, 1), generator()).view(count, 2, 2)
    frequencies = nn.functional.one_hot(drawn, 3).double().mean(0)
    torch.testing.assert_close(frequencies, PROBABILITIES.double(), rtol=0, atol=0.015)  # four standard deviations
    assert (drawn[:, 1, 1] == 0).all()


def test_positions_are_sampled_independently() -> None:
    drawn = sample(torch.full((20_000, 2, 2), 0.5), generator())
    both = (drawn[:, 0] * drawn[:, 1]).double().mean().item()
    assert both == pytest.approx(0.25, abs=0.015)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    probabilities = torch.full((8, 13, 3), 1 / 3)
    first = sample(probabilities, generator(4))
    assert torch.equal(sample(probabilities, generator(4)), first)
    assert not torch.equal(sample(probabilities, generator(5)), first)


def test_sampling_does_not_touch_torchs_own_random_state() -> None:
    before = torch.get_rng_state()
    sample(torch.full((8, 13, 3), 1 / 3), generator())
    uniformly_random(13, 3, generator())(images(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_devices_draw_the_same_samples() -> None:
    probabilities = torch.full((8, 13, 3), 1 / 3)
    drawn = sample(probabilities.cuda(), generator(4))
    assert drawn.is_cuda
    assert torch.equal(drawn.cpu(), sample(probabilities, generator(4)))


# --- Ways to choose ---------------------------------------------------------------------------------------------------


def test_uniformly_random_gives_every_choice_everywhere_alike() -> None:
    drawn = uniformly_random(3, 4, generator())(images(8000))
    assert drawn.shape == (8000, 3)
    frequencies = nn.functional.one_hot(drawn, 4).double().mean(0)
    torch.testing.assert_close(frequencies, torch.full((3, 4), 0.25).double(), rtol=0, atol=0.02)


def test_uniformly_random_goes_on_from_call_to_call_and_repeats_from_its_seed() -> None:
    choose, again = (uniformly_random(13, 3, generator(1)) for _ in range(2))
    first, second = choose(images(4)), choose(images(4))
    assert not torch.equal(first, second)
    assert torch.equal(again(images(4)), first)
    assert torch.equal(again(images(4)), second)


@pytest.mark.parametrize(
    "count, cheapest, dearest", [(1, 1, 0), (2, 1, 1), (3, 1, 1), (4, 2, 1), (5, 2, 2), (32, 11, 11)]
)
def test_sandwich_gives_the_first_third_the_cheapest_choice_and_the_second_the_dearest(
    count: int, cheapest: int, dearest: int
) -> None:
    choices = [(4, 4), (2, 7), (8, 3), (3, 4)]  # 16, 14, 24, 12
    drawn = sandwich(13, choices, generator())(images(count)).tolist()
    assert drawn[:cheapest] == [[3] * 13] * cheapest
    assert drawn[cheapest : cheapest + dearest] == [[2] * 13] * dearest
    assert all(len(set(row)) > 1 for row in drawn[cheapest + dearest :])
    assert len(drawn) == count


def test_the_last_third_of_a_sandwich_has_every_choice_everywhere_alike() -> None:
    drawn = sandwich(3, [(2, 2), (3, 3), (4, 4), (5, 5)], generator())(images(24_000))[16_000:]
    frequencies = nn.functional.one_hot(drawn, 4).double().mean(0)
    torch.testing.assert_close(frequencies, torch.full((3, 4), 0.25).double(), rtol=0, atol=0.02)


def test_sandwiches_go_on_from_call_to_call_and_repeat_from_their_seed() -> None:
    choose, again = (sandwich(13, [(2, 2), (4, 4)], generator(1)) for _ in range(2))
    first, second = choose(images(6)), choose(images(6))
    assert not torch.equal(first, second)
    assert torch.equal(again(images(6)), first)
    assert torch.equal(again(images(6)), second)


def test_fixed_gives_every_image_the_same_configuration() -> None:
    assert fixed([2, 0, 1])(images(3)).tolist() == [[2, 0, 1]] * 3


def test_greedy_takes_the_most_likely_choice() -> None:
    policy = Table(torch.tensor([[0.1, 0.3, 0.2], [5.0, -1.0, 4.9]]))
    drawn = greedy_by(policy)(images(2))
    assert drawn.tolist() == [[1, 0], [1, 0]]
    assert not drawn.requires_grad


def test_samples_of_a_policy_follow_the_mixed_distribution() -> None:
    policy = Table(torch.tensor([[10.0, -10.0, -10.0], [0.0, math.log(3.0), -30.0]]))
    drawn = sampled_by(policy, 0.3, generator())(images(20_000))
    frequencies = nn.functional.one_hot(drawn, 3).double().mean(0)
    expected = torch.tensor([[0.8, 0.1, 0.1], [0.7 * 0.25 + 0.1, 0.7 * 0.75 + 0.1, 0.1]]).double()
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.015)
