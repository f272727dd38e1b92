"""tools.levels writes a file that `bits.levels` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instaqnas.detector.ssd import detector_costs
from instaqnas.evaluation import sensitivity
from instaqnas.experiment.parts import Experiment
from instaqnas.tools.levels import main

POINTWISE = "--bits.positions=pointwise"  # as the network was trained


def test_the_file_is_a_list_of_levels_within_their_costs(
    finished_run: Path, config_file: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sensitivity, "MOST_IMAGES", 2)
    out = tmp_path / "new" / "levels.json"
    words = ["--config", str(config_file), "--run", str(finished_run), "--costs", "0.13,0.11", "--out", str(out)]
    words.append(POINTWISE)
    main(words)
    written = json.loads(out.read_text())["levels"]
    assert capsys.readouterr().out.startswith(f"level0: {written[0]['gbitops']:.4g} GBitOps, loss ")
    options = ("--bits.positions=network", f"--bits.levels={out}")
    config = make_command("pretrain", tmp_path, *options).config
    costs = detector_costs(Experiment(config).quantized_detector()).gbitops_table()[0].tolist()
    assert costs == pytest.approx([level["gbitops"] for level in written])
    assert costs[0] <= 0.11 < costs[1] <= 0.13


@pytest.mark.parametrize(
    "costs, message",
    [("0.001", "--costs 0.001: the cheapest configuration costs"), ("1," * 8 + "1", "expected one to eight, got 9")],
)
def test_costs_without_levels_are_refused(
    finished_run: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], costs: str, message: str
) -> None:
    out = tmp_path / "levels.json"
    with pytest.raises(SystemExit) as error:
        main(["--config", str(config_file), "--run", str(finished_run), "--costs", costs, "--out", str(out), POINTWISE])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
