"""Levels on the static front: what a configuration means for every layer, and where its losses come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instaqnas.detector.ssd import DetectorBits, detector_costs
from instaqnas.errors import InputError
from instaqnas.evaluation import sensitivity
from instaqnas.evaluation.levels import bits_of_layers, full_precision_sensitivity, levels_of
from instaqnas.experiment.handover import Checkpoint, best_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import PRETRAIN_FP32, PRETRAIN_QUANT


@pytest.fixture
def experiment(make_command, tmp_path: Path) -> Experiment:
    return Experiment(make_command("eval", tmp_path).config)


def test_layers_outside_the_positions_keep_their_single_choice(experiment: Experiment) -> None:
    detector = experiment.quantized_detector()
    configuration = [2, 0, 1] * 4 + [2]
    bits = dict(zip(detector.layer_names, bits_of_layers(detector, configuration), strict=True))
    assert len(bits) == 47
    assert bits["backbone.stem"] == bits["backbone.blocks.4.depthwise"] == bits["class_heads.5"] == (8, 8)
    assert bits["extras.2.down"] == (4, 4)
    pointwise = [bits[f"backbone.blocks.{block}.pointwise"] for block in range(13)]
    assert pointwise == [[(2, 2), (3, 3), (4, 4)][choice] for choice in configuration]


def test_a_level_of_a_fixed_configuration_costs_the_same(make_command, experiment: Experiment, tmp_path: Path) -> None:
    detector, configuration = experiment.quantized_detector(), [2, 0, 1] * 4 + [2]
    level = [list(pair) for pair in bits_of_layers(detector, configuration)]
    options = ("--bits.positions=network", f"--bits.levels=[{level}]")
    alone = Experiment(make_command("eval", tmp_path, *options).config).quantized_detector()
    expected = detector_costs(detector).gbitops(torch.tensor([configuration]))
    assert torch.equal(detector_costs(alone).gbitops(torch.zeros(1, 1, dtype=torch.int64)), expected)


@pytest.mark.parametrize("stage", [PRETRAIN_QUANT, PRETRAIN_FP32])
def test_a_level_is_within_its_cost_and_more_cost_has_less_loss(
    finished_run: Path, experiment: Experiment, stage: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "MOST_IMAGES", 2)
    costs = detector_costs(experiment.quantized_detector())
    limits = [costs.lowest() + share * (costs.highest() - costs.lowest()) for share in (0.0, 0.4, 1.0)]
    levels = levels_of(experiment, Checkpoint.read(best_checkpoint(finished_run, stage)), limits)
    assert all(level.gbitops <= limit + 1e-9 for level, limit in zip(levels, limits, strict=True))
    assert levels[0].gbitops == pytest.approx(costs.lowest())
    if stage is PRETRAIN_FP32:  # losses of layers add up there, so that more room cannot hurt
        assert levels[0].loss >= levels[1].loss >= levels[2].loss
    with pytest.raises(InputError, match="the cheapest configuration costs"):
        levels_of(experiment, Checkpoint.read(best_checkpoint(finished_run, stage)), [0.9 * costs.lowest()])


@torch.no_grad()
def test_one_layer_at_a_time_is_quantized(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "MOST_IMAGES", 4)
    options = ("--bits.choices=[[8, 8], [2, 2]]", "--bits.positions=all")
    experiment = Experiment(make_command("eval", tmp_path, *options).config)
    source = Checkpoint.read(best_checkpoint(finished_run, PRETRAIN_FP32))
    losses, _, _ = full_precision_sensitivity(experiment, source)
    full = experiment.detector(DetectorBits.full_precision()).eval()
    source.load(experiment, full, "detector", ("pretrain_fp32",))
    batch = next(iter(experiment.tuning_loader())).to(experiment.device)
    output = full(batch.images, torch.zeros(4, 13, dtype=torch.int64))
    unquantized = full.image_losses(output, batch.boxes_xyxy, batch.labels, batch.difficult).mean().item()
    assert len(losses) == 47
    changes = (torch.tensor(losses) - unquantized).abs() / unquantized
    assert changes[:, 0].amax() < 0.02  # 47 layers at 8 bits would change more than one does
    assert changes[:, 1].mean() > 3 * changes[:, 0].mean()


def test_levels_of_the_whole_network_have_no_layers_to_vary(make_command, tmp_path: Path, finished_run: Path) -> None:
    experiment = Experiment(make_command("eval", tmp_path, "--bits.positions=network").config)
    with pytest.raises(InputError, match="expected positions whose layers can differ"):
        levels_of(experiment, Checkpoint.read(best_checkpoint(finished_run, PRETRAIN_QUANT)), [1.0])
