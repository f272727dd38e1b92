"""Rewards at hand-worked points."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from instaqnas.policy.reward import (
    Window,
    budget,
    bump,
    ratio,
    scheduled_window,
    signed_bump,
    window_gate,
    window_scaled,
    window_signed,
)

WINDOW = Window(42.0, 49.0)  # width 7, middle 45.5
SLOPE = 4 / (7 * math.log(1.2))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- Window -----------------------------------------------------------------------------------------------------------


def test_width_of_a_window() -> None:
    assert WINDOW.width == 7


@pytest.mark.parametrize("progress, upper", [(0.0, 70.0), (0.25, 65.0), (0.5, 60.0), (1.0, 50.0)])
def test_the_upper_end_moves_linearly(progress: float, upper: float) -> None:
    assert scheduled_window(42.0, 70.0, 50.0, progress) == Window(42.0, upper)


def test_the_shipped_schedule_is_constant() -> None:
    assert {scheduled_window(42.0, 0.7 * 70, 0.5 * 98, p / 10) for p in range(11)} == {WINDOW}


def test_bump_by_hand() -> None:
    # 4 (ub - e)(e - lb) / W^2: a quarter from an end 4 * 1.75 * 5.25 / 49 = 0.75, one from it 4 * 1 * 6 / 49
    e = vector(0.0, 41.0, 42.0, 43.0, 43.75, 45.5, 47.25, 49.0, 50.0, 100.0)
    expected = vector(0, 0, 0, 24 / 49, 0.75, 1, 0.75, 0, 0, 0)
    torch.testing.assert_close(bump(e, WINDOW), expected)


def test_signed_bump_by_hand() -> None:
    # outside: c (1.2^-d - 1), c = 4 / (7 ln 1.2) = 3.134...; at d = 1 c * -1/6, at d = 2 c * -11/36; -1 from d = 2.1 on
    e = vector(42.0, 45.5, 49.0, 41.0, 50.0, 40.0, 51.0, 39.0, 52.0, 0.0, 1000.0)
    outside = [-SLOPE / 6, -SLOPE / 6, -SLOPE * 11 / 36, -SLOPE * 11 / 36, -1, -1, -1, -1]
    torch.testing.assert_close(signed_bump(e, WINDOW), vector(0, 1, 0, *outside))
    assert signed_bump(vector(50.0), WINDOW).item() == pytest.approx(-0.522363, abs=1e-6)


@pytest.mark.parametrize("end, inwards", [(42.0, 1), (49.0, -1)])
def test_signed_bump_is_continuous_with_the_same_slope_on_both_sides_of_an_end(end: float, inwards: int) -> None:
    h = 1e-6
    inside, at, outside = signed_bump(vector(end + inwards * h, end, end - inwards * h), WINDOW).tolist()
    assert at == 0
    assert (inside - at) / h == pytest.approx(4 / 7, rel=1e-4)
    assert (at - outside) / h == pytest.approx(4 / 7, rel=1e-4)


@pytest.mark.parametrize("window", [WINDOW, Window(1.0, 1.5), Window(10.0, 60.0)])
def test_signed_bump_rises_to_the_middle_and_falls_behind_it(window: Window) -> None:
    middle = (window.lower + window.upper) / 2
    rising = signed_bump(torch.linspace(0, middle, 400, dtype=torch.float64), window)
    falling = signed_bump(torch.linspace(middle, 100, 400, dtype=torch.float64), window)
    assert (rising.diff() >= 0).all()
    assert (falling.diff() <= 0).all()
    assert rising.min() >= -1
    assert rising.max() <= 1


# --- The paper's rewards ----------------------------------------------------------------------------------------------


def test_ratio_by_hand() -> None:
    q, e = vector(0.5, 0.5, 0.8, 0.0), vector(50.0, 25.0, 100.0, 10.0)
    expected = vector(0.5, 0.5 * 2**0.1, 0.8 * 0.5**0.1, 0)
    torch.testing.assert_close(ratio(q, e, reference=50.0, exponent=0.1), expected)


SETTINGS = {"window": WINDOW, "threshold": 0.6, "positive": 30.0}
# inside, quarter, edge, outside; then good at the threshold, below it, nothing found
QUALITY = vector(1.0, 0.8, 0.9, 0.7, 0.6, 0.599, 0.0)
GBITOPS = vector(45.5, 43.75, 49.0, 50.0, 45.5, 45.5, 60.0)


def test_window_gate_by_hand() -> None:
    reward = window_gate(QUALITY, GBITOPS, **SETTINGS, negative=-10.0)
    torch.testing.assert_close(reward, vector(30, 22.5, 0, 0, 30, -10, -10))


def test_window_scaled_by_hand() -> None:
    reward = window_scaled(QUALITY, GBITOPS, **SETTINGS)
    torch.testing.assert_close(reward, vector(30, 18, 0, 0, 18, 17.97, 0))


def test_window_signed_by_hand() -> None:
    reward = window_signed(QUALITY, GBITOPS, **SETTINGS, negative=-10.0)
    outside = -30 * 0.7 * SLOPE / 6
    torch.testing.assert_close(reward, vector(30, 18, 0, outside, 18, -10 * 0.101, -7))


# --- Budget -----------------------------------------------------------------------------------------------------------


def test_budget_by_hand() -> None:
    q, e = vector(0.9, 0.9, 0.9, 0.2), vector(2.0, 3.0, 1.0, 2.0)
    reward = budget(q, e, target=2.0, multiplier=0.4)
    torch.testing.assert_close(reward, vector(0.9, 0.7, 1.1, 0.2))
    assert torch.equal(budget(q, e, target=2.0, multiplier=0.0), q)
