"""Diagnostics of a policy at values worked out by hand, and against naive loops."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from instaqnas.policy.diagnostics import (
    average_ranks,
    choice_frequencies,
    distinct_configurations,
    modal_configuration,
    mutual_information,
    position_entropy,
    rank_correlation,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive_entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def random_probabilities(images: int, positions: int, choices: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(images, positions, choices, generator=g, dtype=torch.float64)).softmax(-1)


# --- Entropy and mutual information -----------------------------------------------------------------------------------

# Two images. Position 0: certain of the same choice; 1: certain of different choices; 2: uniform for both.
CERTAIN = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]).double()


def test_entropy_per_position_by_hand() -> None:
    torch.testing.assert_close(position_entropy(CERTAIN), doubles(0, 0, math.log(2)))


def test_mutual_information_differs_from_entropy_where_the_image_does_not_matter() -> None:
    torch.testing.assert_close(mutual_information(CERTAIN), doubles(0, math.log(2), 0))


def test_mutual_information_by_hand() -> None:
    # mean (0.5, 0.5): log 2, less the entropy of (0.9, 0.1)
    probabilities = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).double()
    expected = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert mutual_information(probabilities).item() == pytest.approx(expected)


def test_entropy_and_mutual_information_equal_naive_loops() -> None:
    probabilities = random_probabilities(7, 4, 3)
    table = probabilities.tolist()
    for position in range(4):
        rows = [image[position] for image in table]
        mean = [sum(row[k] for row in rows) / 7 for k in range(3)]
        own = sum(map(naive_entropy, rows)) / 7
        assert position_entropy(probabilities)[position].item() == pytest.approx(own)
        assert mutual_information(probabilities)[position].item() == pytest.approx(naive_entropy(mean) - own)


def test_mutual_information_of_one_distribution_for_all_images_is_not_below_zero() -> None:
    for seed in range(20):
        same = random_probabilities(1, 13, 4, seed).float().expand(11, -1, -1)
        information = mutual_information(same)
        assert information.min() >= 0
        assert information.max() < 1e-6


# --- Configurations ---------------------------------------------------------------------------------------------------

CHOICES = torch.tensor([[2, 0, 1], [0, 0, 1], [2, 0, 1], [0, 1, 1], [0, 0, 1], [1, 2, 0]])


def test_configurations_are_counted_by_hand() -> None:
    assert distinct_configurations(CHOICES) == 4
    assert distinct_configurations(CHOICES[:1].expand(9, -1)) == 1


def test_the_modal_configuration_is_a_whole_configuration_and_the_first_of_equals() -> None:
    assert modal_configuration(CHOICES).tolist() == [0, 0, 1]  # twice, as (2, 0, 1)
    assert modal_configuration(CHOICES[[0, 2, 1]]).tolist() == [2, 0, 1]
    # Position by position the mode would be (0, 0, 0), which no image has.
    spread = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 2, 2], [2, 2, 2]])
    assert modal_configuration(spread).tolist() == [2, 2, 2]


def test_frequencies_equal_a_counter() -> None:
    frequencies = choice_frequencies(CHOICES, 4)
    assert frequencies.shape == (3, 4)
    for position in range(3):
        counts = Counter(row[position] for row in CHOICES.tolist())
        assert frequencies[position].tolist() == pytest.approx([counts[k] / 6 for k in range(4)])


# --- Rank correlation -------------------------------------------------------------------------------------------------


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert average_ranks(doubles(10, 20, 20, 5, 20, 10)).tolist() == [2.5, 5, 5, 1, 5, 2.5]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ((1, 2, 3, 4), (10, 100, 1000, 10000), 1),
        ((1, 2, 3, 4), (4, 3, 2, -9), -1),
        ((1, 2, 3, 4), (1, 3, 2, 4), 1 - 6 * 2 / (4 * 15)),  # 1 - 6 sum d^2 / (n (n^2 - 1)), without ties
        ((3, 1, 2, 5, 4), (2, 1, 5, 3, 4), 1 - 6 * (1 + 0 + 9 + 4 + 0) / (5 * 24)),
        # ranks 1.5 1.5 3 and 1 2.5 2.5: (-0.5 -0.5 1) . (-1 0.5 0.5) / 1.5
        ((7, 7, 8), (1, 2, 2), 0.5),
    ],
)
def test_rank_correlation_by_hand(x: tuple[float, ...], y: tuple[float, ...], expected: float) -> None:
    assert rank_correlation(doubles(*x), doubles(*y)) == pytest.approx(expected)
    assert rank_correlation(doubles(*y), doubles(*x)) == pytest.approx(expected)


def test_rank_correlation_leaves_pairs_without_a_value_out() -> None:
    x, y = doubles(1, math.nan, 3, 2, 9), doubles(1, 50, 2, 4, math.nan)
    assert rank_correlation(x, y) == rank_correlation(doubles(1, 3, 2), doubles(1, 2, 4)) == pytest.approx(0.5)


@pytest.mark.parametrize(("x", "y"), [((1, 1, 1), (1, 2, 3)), ((1,), (1,)), ((math.nan, 2), (1, 2))])
def test_rank_correlation_of_equal_values_is_not_a_number(x: tuple[float, ...], y: tuple[float, ...]) -> None:
    assert math.isnan(rank_correlation(doubles(*x), doubles(*y)))


def naive_rank_correlation(x: list[float], y: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [1 + sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]

    pairs = list(zip(ranks(x), ranks(y), strict=True))
    means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    products = [sum((p[i] - means[i]) * (p[j] - means[j]) for p in pairs) for i, j in ((0, 1), (0, 0), (1, 1))]
    return products[0] / math.sqrt(products[1] * products[2])


def random_pairs() -> list[tuple[list[float], list[float]]]:
    drawn = random.Random(0)
    sizes = itertools.product((5, 40), (3, 10, 1000))  # the fewer values, the more ties
    return [
        ([float(drawn.randrange(most)) for _ in range(n)], [drawn.gauss(0, 1) for _ in range(n)]) for n, most in sizes
    ]


def test_rank_correlation_with_and_without_ties_equals_a_naive_loop() -> None:
    for x, y in random_pairs():
        assert rank_correlation(doubles(*x), doubles(*y)) == pytest.approx(naive_rank_correlation(x, y))


def test_rank_correlation_equals_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for x, y in random_pairs():
        assert rank_correlation(doubles(*x), doubles(*y)) == pytest.approx(stats.spearmanr(x, y).statistic)
