"""Where a policy may begin: between two fixed bit configurations, at the effort for the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY = 0.99  # of a configuration's choice at a position: there are dozens of them, and some choices are dear
SPREAD = 0.3  # positions go over from one configuration to the other at efforts from -0.3 to 0.3


def start_between(
    low: Sequence[int], high: Sequence[int], worth: Sequence[float], choices: int
) -> tuple[Tensor, Tensor]:
    """First logits for all images, and what a unit of effort adds to them; both [L, K].

    At an effort of -1 the likeliest choices are those of `low`, at 1 those of `high`. In between positions go over one
    after the other, those of most worth first.

    Args:
        low, high: the index of a choice at each of L positions.
        worth: what it is worth to go over at a position, in any unit.
        choices: K.
    """
    low_choice, high_choice = (F.one_hot(torch.tensor(c), choices).float() for c in (low, high))
    odds = math.log(PROBABILITY * max(1, choices - 1) / (1 - PROBABILITY))
    moving = [position for position in range(len(low)) if low[position] != high[position]]
    moving.sort(key=lambda position: -worth[position])
    threshold = torch.zeros(len(low), 1)
    for rank, position in enumerate(moving):
        threshold[position] = SPREAD * (2 * (rank + 0.5) / len(moving) - 1)
    effort = odds / 2 * (high_choice - low_choice)
    return odds * torch.maximum(low_choice, high_choice) - threshold * effort, effort
