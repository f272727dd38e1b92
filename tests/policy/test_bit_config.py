"""Ways to choose bit configurations, and the probabilities behind them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from instaqnas.policy.bit_config import (
    Draw,
    entropy,
    fixed,
    greedy_at_random_shifts,
    greedy_by,
    handed_out,
    log_prob,
    mix_uniform,
    sample,
    sampled_by,
    sandwich,
    uniformly_random,
    with_frequencies,
)
from instaqnas.seeds import SampleKey, uniform_numbers

PROBABILITIES = torch.tensor(
    [[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]]
)  # B=2, L=2, K=3


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(positions: int, *parts: int | str) -> Draw:
    return lambda keys: uniform_numbers(keys, positions, *parts)


def images(count: int) -> Tensor:
    return torch.zeros(count, 3, 4, 4)


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(epoch, index, place=index) for index in range(count)]


class Table(nn.Module):
    """A policy whose logits do not depend on the image."""

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
    probabilities = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    configurations = torch.cartesian_prod(*[torch.arange(4)] * 3)
    total = log_prob(probabilities.expand(64, -1, -1), configurations).exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-5)


def test_log_prob_agrees_with_torchs_categorical() -> None:
    logits = torch.randn(5, 13, 3, generator=torch.Generator().manual_seed(1))
    choices = torch.randint(3, (5, 13), generator=torch.Generator().manual_seed(2))
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
    drawn = sample(PROBABILITIES.repeat(count, 1, 1), uniform(2 * count, 2)).view(count, 2, 2)
    frequencies = nn.functional.one_hot(drawn, 3).double().mean(0)
    torch.testing.assert_close(frequencies, PROBABILITIES.double(), rtol=0, atol=0.015)  # four standard deviations
    assert (drawn[:, 1, 1] == 0).all()


@pytest.mark.parametrize(
    "number, chosen", [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (1 - 2**-53, 2)], ids=str
)
def test_the_choice_is_where_the_number_falls_among_the_cumulative_probabilities(number: float, chosen: int) -> None:
    drawn = sample(PROBABILITIES[:1, :1], torch.tensor([[number]], dtype=torch.float64))
    assert drawn.tolist() == [[chosen]]


@pytest.mark.parametrize("probabilities", [[0.0, 0.3, 0.7], [0.3, 0.0, 0.7], [0.3, 0.7, 0.0], [0.3, 0.6999, 0.0]])
@pytest.mark.parametrize("number", [0.0, 0.3, 0.99999, 1 - 2**-52])
def test_a_choice_of_probability_zero_is_never_drawn(probabilities: list[float], number: float) -> None:
    drawn = sample(torch.tensor([[probabilities]]), torch.tensor([[number]], dtype=torch.float64)).item()
    assert probabilities[drawn] > 0


def test_sampling_does_not_touch_torchs_own_random_state() -> None:
    before = torch.get_rng_state()
    sample(torch.full((8, 13, 3), 1 / 3), draw(13)(keys(8)))
    uniformly_random(3, draw(13))(images(4), keys(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_devices_draw_the_same_samples() -> None:
    probabilities = torch.full((8, 13, 3), 1 / 3)
    drawn = sample(probabilities.cuda(), uniform(8, 13))
    assert drawn.is_cuda
    assert torch.equal(drawn.cpu(), sample(probabilities, uniform(8, 13)))


# --- Ways to choose ---------------------------------------------------------------------------------------------------


def test_uniformly_random_gives_every_choice_everywhere_alike() -> None:
    drawn = uniformly_random(4, draw(3))(images(8000), keys(8000))
    assert drawn.shape == (8000, 3)
    frequencies = nn.functional.one_hot(drawn, 4).double().mean(0)
    torch.testing.assert_close(frequencies, torch.full((3, 4), 0.25).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("number, choice", [(0.0, 0), (0.19, 0), (0.21, 1), (0.61, 3), (1 - 2**-53, 4)], ids=str)
def test_uniformly_random_divides_the_unit_interval_into_equal_parts(number: float, choice: int) -> None:
    choose = uniformly_random(5, lambda keys: torch.full((len(keys), 2), number, dtype=torch.float64))
    assert choose(images(1), keys(1)).tolist() == [[choice, choice]]


def test_configurations_with_given_frequencies_have_them_at_each_position_independently() -> None:
    frequencies = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], dtype=torch.float64)
    choices = with_frequencies(frequencies, draw(2, "here"))(images(4000), keys(4000))
    counts = torch.nn.functional.one_hot(choices, 3).double().mean(0)
    torch.testing.assert_close(counts, frequencies, atol=0.03, rtol=0)
    assert counts[0, 2] == 0
    both = (choices == torch.tensor([0, 2])).all(1).double().mean().item()
    assert both == pytest.approx(0.5 * 0.7, abs=0.03)


def test_configurations_that_are_handed_out_are_whole_and_equally_likely() -> None:
    known = torch.tensor([[0, 2, 1], [1, 1, 1], [0, 2, 1], [2, 0, 0]])
    choices = handed_out(known, draw(3, "here"))(images(4000), keys(4000))
    shares = [(choices == row).all(1).double().mean().item() for row in known[[0, 1, 3]]]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("way", ["random", "sandwich", "sampled"])
def test_the_configuration_of_an_image_does_not_depend_on_the_batch_it_is_in(way: str) -> None:
    choose = {
        "random": uniformly_random(3, draw(13)),
        "sandwich": sandwich([4, 9, 16], draw(13)),
        "sampled": sampled_by(Table(torch.zeros(13, 3)), 0.5, draw(13)),
    }[way]
    whole = choose(images(9), keys(9))
    parts = [choose(images(len(part)), part) for part in (keys(9)[::2], keys(9)[1:6:2], keys(9)[7:])]
    assert torch.equal(torch.cat(parts), torch.cat([whole[::2], whole[1:6:2], whole[7:]]))
    assert len({tuple(row) for row in whole.tolist()}) > 3


def test_configurations_differ_between_images_epochs_and_purposes() -> None:
    drawn = [
        uniformly_random(3, draw(13, *purpose))(images(4), keys(4, epoch))
        for purpose in ((0, "a"), (1, "a"), (0, "b"))
        for epoch in (0, 1)
    ]
    assert len({tuple(row) for rows in drawn for row in rows.tolist()}) == 24


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 32])
def test_sandwich_gives_in_turn_the_cheapest_the_most_expensive_and_random_choices(count: int) -> None:
    drawn = sandwich([16, 14, 24, 12], draw(13))(images(count), keys(count)).tolist()
    assert len(drawn) == count
    assert all(row == [3] * 13 for row in drawn[::3])
    assert all(row == [2] * 13 for row in drawn[1::3])
    assert all(len(set(row)) > 1 for row in drawn[2::3])


def test_the_last_third_of_a_sandwich_has_every_choice_everywhere_alike() -> None:
    drawn = sandwich([4, 9, 16, 25], draw(3))(images(24_000), keys(24_000))[2::3]
    frequencies = nn.functional.one_hot(drawn, 4).double().mean(0)
    torch.testing.assert_close(frequencies, torch.full((3, 4), 0.25).double(), rtol=0, atol=0.02)


def test_fixed_gives_every_image_the_same_configuration() -> None:
    assert fixed([2, 0, 1])(images(3), keys(3)).tolist() == [[2, 0, 1]] * 3


def test_greedy_takes_the_most_likely_choice() -> None:
    policy = Table(torch.tensor([[0.1, 0.3, 0.2], [5.0, -1.0, 4.9]]))
    drawn = greedy_by(policy)(images(2), keys(2))
    assert drawn.tolist() == [[1, 0], [1, 0]]
    assert not drawn.requires_grad


def test_samples_of_a_policy_follow_the_mixed_distribution() -> None:
    policy = Table(torch.tensor([[10.0, -10.0, -10.0], [0.0, math.log(3.0), -30.0]]))
    drawn = sampled_by(policy, 0.3, draw(2))(images(20_000), keys(20_000))
    frequencies = nn.functional.one_hot(drawn, 3).double().mean(0)
    expected = torch.tensor([[0.8, 0.1, 0.1], [0.7 * 0.25 + 0.1, 0.7 * 0.75 + 0.1, 0.1]]).double()
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.015)


def test_every_batch_draws_one_shift_of_the_logits() -> None:
    policy = Table(torch.tensor([[0.0, 0.4, 0.2]]))

    def offset_of(number: float) -> torch.Tensor:
        return torch.tensor([[1.0 if number < 0.5 else 0.0, 0.0, 0.0]])

    def numbers(drawn: list[float]) -> list[int]:
        choose = greedy_at_random_shifts(policy, offset_of, lambda _: torch.tensor(drawn)[:, None].double())
        return choose(images(3), keys(3))[:, 0].tolist()

    assert numbers([0.1, 0.9, 0.9]) == [0, 0, 0]  # the first image decides for its batch
    assert numbers([0.7, 0.1, 0.1]) == [1, 1, 1]
