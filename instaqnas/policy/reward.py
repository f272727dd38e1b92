"""Rewards of one image from its detection quality and its GBitOps; all tensors are [B].

The formulas are those of the paper (its names in brackets) over a quality that is counted one-to-one, and `budget`.
The simplest, `quality` [prec_only], is the quality itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The GBitOps that `window_*` rewards aim at, lower < upper."""

    lower: float
    upper: float

    @property
    def width(self) -> float:
        """W."""
        return self.upper - self.lower


def scheduled_window(lower: float, upper_start: float, upper_end: float, progress: float) -> Window:
    """The window at `progress` (0 in the first epoch, 1 in the last): its upper end moves linearly."""
    return Window(lower, upper_start + (upper_end - upper_start) * progress)


def ratio(quality: Tensor, gbitops: Tensor, *, reference: float, exponent: float) -> Tensor:
    """q * (reference / e)^exponent [prec+bops]."""
    return quality * (reference / gbitops) ** exponent


def bump(gbitops: Tensor, window: Window) -> Tensor:
    """g(e): 1 in the middle of the window, 0 at its ends and outside, a parabola between."""
    return (4 * (window.upper - gbitops) * (gbitops - window.lower) / window.width**2).clamp(min=0)


def signed_bump(gbitops: Tensor, window: Window) -> Tensor:
    """h(e): g inside the window; outside it falls with the distance, with g's slope at the ends, down to -1."""
    distance = torch.maximum(window.lower - gbitops, gbitops - window.upper)
    slope = 4 / (window.width * math.log(1.2))
    outside = (slope * (1.2 ** (-distance.clamp(min=0)) - 1)).clamp(min=-1)
    return torch.where(distance <= 0, bump(gbitops, window), outside)


def window_gate(
    quality: Tensor, gbitops: Tensor, *, window: Window, threshold: float, positive: float, negative: float
) -> Tensor:
    """P * g if q >= t, else N [thre_ori]."""
    return torch.where(quality >= threshold, positive * bump(gbitops, window), negative)


def window_scaled(quality: Tensor, gbitops: Tensor, *, window: Window, threshold: float, positive: float) -> Tensor:
    """P * q * g if q >= t, else P * q [thre]."""
    scaled = positive * quality
    return torch.where(quality >= threshold, scaled * bump(gbitops, window), scaled)


def window_signed(
    quality: Tensor, gbitops: Tensor, *, window: Window, threshold: float, positive: float, negative: float
) -> Tensor:
    """P * q * h if q >= t, else N * (t + 0.1 - q) [thre2]."""
    good = positive * quality * signed_bump(gbitops, window)
    return torch.where(quality >= threshold, good, negative * (threshold + 0.1 - quality))


def budget(quality: Tensor, gbitops: Tensor, *, target: float, multiplier: float) -> Tensor:
    """q - multiplier * (e / target - 1): the Lagrangian of "the best quality at mean cost `target`".

    Where the multiplier comes from is in instaqnas/policy/budget.py.
    """
    return quality - multiplier * (gbitops / target - 1)
