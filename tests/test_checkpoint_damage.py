"""The short form of checkpoint_damage.py."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_damage import EQUAL, OTHER, REFUSED, flipped, outcomes
from torch import nn

from instaqnas.checkpoint import save_checkpoint
from instaqnas.config.reading import to_plain
from instaqnas.config.settings import Config, DataConfig, TrainConfig
from instaqnas.training.optimizers import build_optimizer, build_scheduler
from instaqnas.training.state import TrainState


def small_checkpoint(path: Path) -> Path:
    """What a stage saves after a step, but of a network of one layer."""
    network, settings = nn.Linear(30, 40), TrainConfig()
    optimizer = build_optimizer(network, settings)
    network(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    state = TrainState({"detector": network}, {"detector": optimizer}, build_scheduler(optimizer, settings, 9))
    begun = {"stage": "finetune", "config": to_plain(Config(DataConfig(["voc"]))), "classes": ["a"]}
    save_checkpoint(path, {**begun, **state.state_dict()})
    return path


def test_no_damaged_checkpoint_loads_with_other_values(tmp_path: Path) -> None:
    found = outcomes(small_checkpoint(tmp_path / "last.pt"), tmp_path, flips=150, truncations=30)
    assert [counts.total() for counts in found.values()] == [150, 30]
    assert not any(OTHER in counts for counts in found.values())
    assert found["bit flips"][REFUSED] > 75
    assert set(found["bit flips"]) <= {REFUSED, EQUAL}
    assert set(found["truncations"]) == {REFUSED}


def test_a_bit_is_flipped() -> None:
    assert flipped(b"\x00\xff\x0f", 8 + 2) == b"\x00\xfb\x0f"
