"""Diagnostics of a policy on N images: how certain it is, how much it depends on the image, and where it spends.

All functions are pure and take all images of a split at once. Entropies are in nats.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from instaqnas.policy.bit_config import entropy


def position_entropy(probabilities: Tensor) -> Tensor:
    """Mean over images of the entropy -sum_k p_k log p_k at each position, [L], 0 to log K.

    Args:
        probabilities: of the policy, [N, L, K].
    """
    return entropy(probabilities).mean(0)


def mutual_information(probabilities: Tensor) -> Tensor:
    """I(image; choice) = H(mean_n p_n) - mean_n H(p_n) at each position, [L], 0 to log K, for N equally likely images.

    It is 0 if all images have the same distribution, whatever its entropy. It equals the Jensen-Shannon divergence of
    the N distributions (Lin, IEEE Transactions on Information Theory, 1991).

    Args:
        probabilities: of the policy, [N, L, K].
    """
    # Rounding can leave the difference of two equal entropies just below 0.
    return (entropy(probabilities.mean(0)) - position_entropy(probabilities)).clamp(min=0)


def choice_frequencies(choices: Tensor, count: int) -> Tensor:
    """Share of the images with each of `count` = K choices at each position, float64 [L, K]; rows sum to 1.

    Args:
        choices: bit configurations [N, L].
    """
    return F.one_hot(choices, count).double().mean(0)


def distinct_configurations(choices: Tensor) -> int:
    """Number of different bit configurations among [N, L]."""
    return len(choices.unique(dim=0))


def modal_configuration(choices: Tensor) -> Tensor:
    """The most frequent configuration [L] among [N, L]; of equally frequent ones the first in lexicographic order."""
    configurations, counts = choices.unique(dim=0, return_counts=True)  # sorted
    return configurations[(counts == counts.max()).nonzero()[0, 0]]


def average_ranks(values: Tensor) -> Tensor:
    """Rank of each of `values` [N], counted from 1, float64; equal values share the mean of their ranks."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)  # sorted
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of `x` and `y` [N], -1 to 1: Pearson's correlation of their average ranks.

    Pairs with a NaN are left out. The result is NaN if all remaining values of `x`, or of `y`, are equal.

    Source: Spearman, 1904; ties as in Kendall, Rank Correlation Methods, chapter 3.
    """
    known = ~(x.isnan() | y.isnan())
    ranks = torch.stack([average_ranks(x[known]), average_ranks(y[known])])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1).prod().item()
    return (ranks[0] @ ranks[1]).item() / norms if norms > 0 else math.nan
