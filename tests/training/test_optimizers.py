"""The learning rate over a training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from instaqnas.config.settings import TrainConfig
from instaqnas.training.optimizers import build_optimizer, build_scheduler


def rates(steps_per_epoch: int, **settings: float) -> list[float]:
    """The learning rate of every step, then that after the last."""
    config = TrainConfig(lr=0.1, optimizer="sgd", **settings)
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch)
    found = [scheduler.get_last_lr()[0]]
    for _ in range(config.epochs * steps_per_epoch):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


def test_the_rate_rises_linearly_and_falls_on_a_cosine_to_zero_exactly() -> None:
    found = rates(4, epochs=4, warmup_epochs=1)
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert found[4:] == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 12)) for k in range(13)])
    assert found[10] == pytest.approx(0.05)
    assert found[-1] == 0
    assert min(found[:-1]) > 0


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    found = rates(3, epochs=1)
    assert found == pytest.approx([0.1, 0.075, 0.025, 0])
    assert found[-1] == 0


def test_a_training_that_is_all_warm_up_ends_at_zero_too() -> None:
    found = rates(2, epochs=1, warmup_epochs=1)
    assert found == pytest.approx([0.05, 0.1, 0])
    assert found[-1] == 0


def test_step_sizes_follow_at_their_own_rate() -> None:
    weight, step = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [step], "lr": 0.01}], lr=0.1)
    scheduler = build_scheduler(optimizer, TrainConfig(epochs=1, warmup_epochs=1), 3)
    assert scheduler.get_last_lr() == pytest.approx([0.1 / 3, 0.01 / 3])
