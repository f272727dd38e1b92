"""The line of an epoch, and the warning of a stage that has learned nothing."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from instaqnas.training import stages
from instaqnas.training.history import EpochClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> EpochClock:
    """Began an epoch 100 seconds ago, whose training took 50 seconds for 2,000 images."""
    clock = EpochClock()
    now = time.monotonic()
    clock.start()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    clock.started = now
    clock.trained(2000, 50.0)
    return clock


def test_the_line_has_losses_quality_cost_speed_and_the_time_left(clock: EpochClock) -> None:
    losses = {"train/loss": 3.25, "train/loss_box": 1.0, "train/loss_class": 2.25}
    line = clock.line("finetune", 1, 4, {**losses, "eval/map": 0.4567, "eval/gbitops_total": 0.35126})
    assert line == (
        "finetune 1/4: loss 3.250, box 1.000, class 2.250, val mAP 45.7 %, 0.3513 GBitOps, 40 images/s, 5 min left"
    )


def test_the_line_leaves_out_what_was_not_measured(clock: EpochClock) -> None:
    clock.start()
    scalars = {"reward/sampled": -1.5, "cost/gbitops_greedy": 0.5, "policy/entropy": 1.0}
    assert clock.line("search", 4, 4, scalars) == "search 4/4: reward -1.500, 0.5 GBitOps"


def test_every_epoch_leaves_a_line_and_a_stage_that_learned_nothing_says_so(
    make_command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = ("--pretrain_fp32.lr", "1e-9", "--pretrain_quant.lr", "1e-9")
    stages.run_pretrain(make_command("pretrain", tmp_path / "run", *options))
    for stage in ("pretrain_fp32", "pretrain_quant"):
        lines = [line for line in caplog.messages if line.startswith(stage)]
        assert [line.partition(":")[0] for line in lines] == [f"{stage} 1/2", f"{stage} 2/2"]
        (warning,) = [line for line in caplog.messages if line.startswith(f"warning: {stage}")]
        assert warning.startswith(f"warning: {stage} has learned nothing: val mAP never rose above 1 %")
