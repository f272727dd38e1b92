"""The cliff of given figures, and the figures of a network compared with single evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.reading import from_plain
from instaqnas.detector.ssd import detector_costs
from instaqnas.evaluation.measure import evaluate
from instaqnas.experiment.parts import Experiment
from instaqnas.metrics.bootstrap import Interval
from instaqnas.policy.bit_config import fixed
from instaqnas.policy.network import policy_gbitops
from instaqnas.tools.cliff import Landscape, UniformChoice, cliff, cliff_line, main

SETTINGS = {
    "detector": {"image_size": 64, "width": 0.125, "extras_batch_norm": True},
    "bits": {"choices": [[3, 3], [2, 2], [4, 4]]},
    "policy": {"pool": 4, "width": 4},
    "eval": {"batch_size": 2},
}


def uniform(*rows: tuple[str, float, float]) -> list[UniformChoice]:
    return [UniformChoice(choice, map_11pt, 1.0, gbitops) for choice, map_11pt, gbitops in rows]


def test_the_cliff_is_where_map_falls_most_per_gbitops() -> None:
    rows = uniform(
        ("w8a8", 0.74, 6.0), ("w2a2", 0.2, 1.0), ("w3a3", 0.5, 2.0), ("w2a3", 0.45, 1.5), ("w4a4", 0.73, 4.0)
    )
    lower, upper = cliff(rows)
    assert (lower.choice, upper.choice) == ("w2a2", "w2a3")  # 0.5 a GBitOps, then 0.1, 0.115, 0.005
    line = cliff_line(Landscape("val", "x.pt", 0.25, rows, [], Interval(0.25, 0.2, 0.3)))
    assert line == (
        "cliff: from w2a3 to w2a2 mAP falls by 25.0 points (95 % interval +20.0 to +30.0), 50 per GBitOps; "
        "set targets from 1.25 to 1.75 GBitOps, policy included"
    )


def test_the_better_of_two_choices_of_equal_cost_counts() -> None:
    lower, upper = cliff(uniform(("w2a3", 0.3, 2.0), ("w3a2", 0.4, 2.0), ("w2a2", 0.1, 1.0), ("w3a3", 0.5, 3.0)))
    assert (lower.choice, upper.choice) == ("w2a2", "w3a2")


def test_there_is_no_cliff_if_map_never_falls() -> None:
    rows = uniform(("w2a2", 0.5, 1.0), ("w3a3", 0.5, 2.0), ("w4a4", 0.4, 3.0))
    assert cliff(rows) is None
    found = Landscape("val", "x.pt", 0.25, rows, [], None)
    assert cliff_line(found).startswith("no cliff: mAP never falls")
    assert (found.plain()["cliff"], found.plain()["target_gbitops"]) == (None, None)


def test_a_fall_within_noise_is_no_cliff() -> None:
    rows = uniform(("w2a2", 0.5, 1.0), ("w3a3", 0.52, 2.0))
    found = Landscape("val", "x.pt", 0.25, rows, [], Interval(0.02, -0.01, 0.05))
    assert "2.0 points, is within noise (95 % interval -1.0 to +5.0)" in cliff_line(found)
    assert found.plain()["cliff"] is None


def test_a_network_that_has_learned_nothing_has_no_cliff_to_look_for() -> None:
    rows = uniform(("w2a2", 0.001, 1.0), ("w3a3", 0.009, 2.0))
    found = Landscape("val", "x.pt", 0.25, rows, [], Interval(0.008, 0.001, 0.01))
    assert cliff_line(found).startswith("the network has learned nothing: mAP is below 1 % at every choice")


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path]) -> Path:
    """Has `tiny.yaml` and `runs/tiny`, a finished run of untrained networks."""
    return make_run(SETTINGS, test_images=3)


def words(folder: Path, *more: str) -> list[str]:
    init = str(folder / "runs" / "tiny" / "finetune" / "last.pt")
    return ["--config", str(folder / "tiny.yaml"), "--init", init, *more]


@pytest.mark.slow
def test_figures_equal_single_evaluations(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(words(folder, "--split", "test", "--json"))
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [line for line in captured.err.splitlines() if line.startswith("note")] == [
        "note: do not use the test split both to pick choices or targets and to evaluate them"
    ]
    experiment = Experiment(from_plain(yaml.safe_load((folder / "tiny.yaml").read_text())))
    detector = experiment.quantized_detector().eval()
    checkpoint = folder / "runs" / "tiny" / "finetune" / "last.pt"
    detector.load_state_dict(load_checkpoint(checkpoint)["networks"]["detector"])
    costs, loader = detector_costs(detector), experiment.test_loader()

    images = [part for batch in loader for part in batch.split(len(batch.images))]
    assert len(images) == 3

    random_bits = experiment.choose_random("sensitivity")

    @torch.no_grad()
    def loss(configuration: list[int | None]) -> float:
        """Mean over the images; None stands for a random choice."""
        outputs = []
        for one in images:
            drawn = random_bits(one.images, one.keys)[0].tolist()
            wanted = [b if a is None else a for a, b in zip(configuration, drawn, strict=True)]
            outputs.append(detector(one.images, torch.tensor([wanted])))
        total = 0.0
        for output, one in zip(outputs, images, strict=True):
            own = detector.loss(output, one.boxes_xyxy, one.labels)
            total += sum(own.values()).item() * detector.targets(one.boxes_xyxy, one.labels).positives.item()
        return total / 3

    assert [row["choice"] for row in found["uniform"]] == ["w3a3", "w2a2", "w4a4"]
    for k, row in enumerate(found["uniform"]):
        report = evaluate(experiment, detector, loader, fixed([k] * 13))
        assert (row["map_11pt"], row["gbitops"]) == (report.map_11pt, report.gbitops_detector)
        assert row["loss"] == pytest.approx(loss([k] * 13), rel=1e-5)
    assert found["policy_gbitops"] == policy_gbitops(experiment.policy(), 64)
    assert [(step["position"], step["choice"]) for step in found["steps"]] == [
        (name, choice) for name in detector.positions for choice in ("w3a3", "w2a2")
    ]
    for position in (0, 12):
        step = found["steps"][2 * position + 1]
        most_expensive, changed = ([None] * position + [choice] + [None] * (12 - position) for choice in (2, 1))
        assert step["loss_rise"] == pytest.approx(loss(changed) - loss(most_expensive), abs=1e-5)
        filled = [[choice or 0 for choice in configuration] for configuration in (most_expensive, changed)]
        cost = [costs.gbitops(torch.tensor([configuration])).item() for configuration in filled]
        assert step["gbitops_saved"] == pytest.approx(cost[0] - cost[1], abs=1e-12)
        assert step["rise_per_gbitops"] == pytest.approx(step["loss_rise"] / step["gbitops_saved"])


@pytest.mark.slow
def test_tables_have_a_line_for_every_choice_and_position_and_end_with_the_cliff(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    main(words(folder))
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith("note: the network was trained on the train split")
    lines = [line for line in captured.out.splitlines() if line]
    assert lines[0].endswith("finetune/last.pt on the train split")
    assert [line.split()[0] for line in lines[2:5]] == ["w2a2", "w3a3", "w4a4"]  # by cost
    assert lines[6].split() == ["position", "w3a3", "per", "GBitOps", "w2a2", "per", "GBitOps"]
    assert len(lines[7:-1]) == 13
    assert all(len(line.split()) == 5 for line in lines[7:-1])
    assert "cliff: " in lines[-1] or lines[-1].startswith("the network has learned nothing")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "static"], "--bits: this tool has no such option"),
        (["--split", "nowhere"], "no split 'nowhere'"),
        (["--bits.choices=[[4, 4]]"], "bits.choices: expected two or more to compare, got one"),
        (["--bits.choices=[[4, 4], [2, 2]]"], "trained with other settings: bits.choices"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    folder: Path, error_of: Callable[..., str], more: list[str], message: str
) -> None:
    assert message in error_of(main, words(folder, *more))


def test_a_missing_pretrained_network_names_the_script_to_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")])
    assert "pretrain_quant: no checkpoint; run pretrain.py first" in capsys.readouterr().err
