"""Rewards of an image from its detection quality q and its GBitOps e; all tensors are [B].

The rewards of the paper (its names in brackets), with detections matched one-to-one, and `budget`. The simplest one,
`quality` [prec_only], is the quality itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The range of GBitOps that `window_*` rewards favour, lower < upper."""

    lower: float
    upper: float

    @property
    def width(self) -> float:
        """W = upper - lower."""
        return self.upper - self.lower


def scheduled_window(lower: float, upper_start: float, upper_end: float, progress: float) -> Window:
    """The window at `progress` (0 in the first epoch, 1 in the last), whose upper end moves linearly."""
    return Window(lower, upper_start + (upper_end - upper_start) * progress)


def ratio(quality: Tensor, gbitops: Tensor, *, reference: float, exponent: float) -> Tensor:
    """q * (reference / e)^exponent [prec+bops]."""
    return quality * (reference / gbitops) ** exponent


def bump(gbitops: Tensor, window: Window) -> Tensor:
    """g(e) = max(0, 4 (upper - e) (e - lower) / W^2): 1 in the middle of the window, 0 at its ends and outside."""
    return (4 * (window.upper - gbitops) * (gbitops - window.lower) / window.width**2).clamp(min=0)


def signed_bump(gbitops: Tensor, window: Window) -> Tensor:
    """h(e): g inside the window, else max(-1, c (1.2^-distance - 1)); c makes the slope continuous at the ends."""
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
    """q - multiplier * (e / target - 1): the Lagrangian of maximal quality at the mean cost `target`.

    The multiplier is updated by `instaqnas.policy.budget.Multiplier`.
    """
    return quality - multiplier * (gbitops / target - 1)
