"""What the policy is compared with: how it is found, trained as long as the adaptive detector, and evaluated."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import instaqnas.evaluation.baselines as baselines_module
import instaqnas.evaluation.comparison as comparison
import instaqnas.evaluation.sensitivity as sensitivity_module
import instaqnas.training.detector_training as detector_training
import instaqnas.training.stages as stages
from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.errors import InputError
from instaqnas.evaluation.baselines import Baselines
from instaqnas.experiment.checks import checkpoint_bytes
from instaqnas.experiment.handover import Checkpoint, best_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import (
    FINETUNE,
    PRETRAIN_QUANT,
    fixed_config,
    fixed_stage,
    further_epochs,
    stage_named,
)

TRAINED = ("pretrain_fp32", "pretrain_quant", "search", "finetune")


def copy_run(run: Path, to: Path, *stages_: str) -> Path:
    for name in stages_:
        shutil.copytree(run / name, to / name)
    return to


@pytest.fixture(scope="module")
def compared_run(finished_run: Path, make_command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose static and one uniform baseline are finetuned, and which was compared."""
    run = copy_run(finished_run, tmp_path_factory.mktemp("runs") / "compared", *TRAINED)
    for bits in ("static", "uniform:w3a3"):
        stages.run_finetune(make_command("finetune", run, "--bits", bits))
    stages.run_eval(make_command("eval", run, "--bits", "all"))
    return run


def baselines_of(make_command, run: Path, *options: str) -> Baselines:
    command = make_command("eval", run, *options)
    return Baselines(Experiment(command.config), command)


def rows_of(run: Path) -> dict[str, dict]:
    return {row["bits"]: row for row in json.loads((run / "eval" / "report.json").read_text())["rows"]}


# --- How baselines are trained ----------------------------------------------------------------------------------------


def test_a_baseline_is_trained_as_long_as_the_adaptive_detector_and_from_no_lower_a_learning_rate(
    make_command, tmp_path: Path
) -> None:
    options = ("--search.epochs=5", "--search.lr=0.01", "--search.distill_weight=2", "--finetune.optimizer=sgd")
    config = make_command("finetune", tmp_path, *options).config
    changed = fixed_config(config)
    assert (changed.finetune.epochs, changed.finetune.lr, changed.finetune.distill_weight) == (6, 0.01, 2.0)
    assert (changed.finetune.optimizer, changed.finetune.batch_size) == ("sgd", config.finetune.batch_size)
    assert changed.search == config.search
    higher = make_command("finetune", tmp_path, "--finetune.lr=0.5", "--finetune.distill_weight=3").config
    assert (fixed_config(higher).finetune.lr, fixed_config(higher).finetune.distill_weight) == (0.5, 3.0)
    alone = make_command("finetune", tmp_path, *options, "--search.train_detector=false").config
    assert fixed_config(alone) == alone


@pytest.mark.parametrize(
    ("stage", "train_detector", "epochs"),
    [
        ("pretrain_quant", True, 0),
        ("search", True, 3),
        ("search", False, 0),
        ("finetune", True, 5 + 3),
        ("finetune", False, 3),
        ("finetune_static", True, 3),
    ],
)
def test_epochs_after_pretraining_end_with_the_checkpoint(stage: str, train_detector: bool, epochs: int) -> None:  # noqa: FBT001
    config = {"search": {"epochs": 5, "train_detector": train_detector}, "finetune": {"epochs": 8}}
    assert further_epochs(stage_named(stage), config, 3) == epochs


@pytest.mark.slow
def test_epochs_after_pretraining_are_those_of_search_and_finetuning(compared_run: Path) -> None:
    expected = {"pretrain_fp32": 0, "pretrain_quant": 0, "search": 2, "finetune": 3}
    expected |= {"finetune_static": 3, "finetune_uniform_w3a3": 3}
    for stage, epochs in expected.items():
        assert Checkpoint.read(best_checkpoint(compared_run, stage_named(stage))).further_epochs == epochs


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["static", "uniform:w3a3"])
def test_a_baseline_is_the_pretrained_detector_trained_under_its_configuration(
    compared_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    run = copy_run(compared_run, tmp_path / "run", "pretrain_quant", "search")
    before, choices = [], []
    step = detector_training.detector_step

    def watched_step(detector, batch, choose_bits, *args, **settings):
        before.append({name: value.clone() for name, value in detector.state_dict().items()})

        def watched_choose(*images) -> torch.Tensor:
            choices.append(choose_bits(*images))
            return choices[-1]

        return step(detector, batch, watched_choose, *args, **settings)

    monkeypatch.setattr(detector_training, "detector_step", watched_step)
    stages.run_finetune(make_command("finetune", run, "--bits", bits))
    pretrained = load_checkpoint(best_checkpoint(run, PRETRAIN_QUANT))["networks"]["detector"]
    assert all(torch.equal(before[0][name], value) for name, value in pretrained.items())
    wanted = baselines_of(make_command, run).configuration(bits)
    assert len(choices) == 3 * 2
    assert all(batch.tolist() == [wanted] * 4 for batch in choices)
    # repeated elsewhere, it is the same to the bit
    for name in ("last.pt", "best.pt"):
        first, second = (load_checkpoint(r / fixed_stage(bits).name / name) for r in (compared_run, run))
        assert first["epoch"] == second["epoch"]
        assert all(torch.equal(second["networks"]["detector"][k], v) for k, v in first["networks"]["detector"].items())


@pytest.mark.slow
def test_a_finished_baseline_is_complete_and_can_be_restarted(compared_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_run(compared_run, tmp_path / "run", "pretrain_quant", "finetune_uniform_w3a3")
    command = make_command("finetune", run, "--bits", "uniform:w3a3")
    before = (run / "finetune_uniform_w3a3" / "last.pt").read_bytes()
    stages.run_finetune(command)
    assert (run / "finetune_uniform_w3a3" / "last.pt").read_bytes() == before
    with pytest.raises(InputError, match=r"finetune\.epochs: 3 -> 4.*--restart"):
        stages.run_finetune(make_command("finetune", run, "--bits", "uniform:w3a3", "--search.epochs=3"))
    stages.run_finetune(make_command("finetune", run, "--bits", "uniform:w3a3", "--restart"))
    assert (run / "finetune_uniform_w3a3.old-1" / "last.pt").read_bytes() == before


def test_a_baseline_is_trained_with_the_parts_that_are_handed_in(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(finished_run, tmp_path / "run", "pretrain_quant")
    command = make_command("finetune", run, "--bits", "uniform:w3a3")
    experiment = Experiment(make_command("finetune", tmp_path, "--finetune.lr=0.125").config)
    used = []

    def begin(experiment: Experiment, *args) -> None:
        used.append((experiment, args[2].lr))
        raise InterruptedError

    monkeypatch.setattr(detector_training.DetectorTraining, "begin", begin)
    with pytest.raises(InterruptedError):
        stages.run_finetune(command, experiment)
    assert used == [(experiment, 0.125)]


def test_a_baseline_needs_what_it_is_found_from(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run", "pretrain_quant")
    for bits in ("static", "modal"):
        with pytest.raises(InputError, match=r"search: no checkpoint; run search\.py first"):
            stages.run_finetune(make_command("finetune", run, "--bits", bits))
    with pytest.raises(InputError, match=r"pretrain_quant: no checkpoint; run pretrain\.py first"):
        stages.run_finetune(make_command("finetune", tmp_path / "empty", "--bits", "uniform:w2a2"))
    with pytest.raises(InputError, match=r"^finetune\.distill_weight: needs the run's full-precision network"):
        stages.run_finetune(make_command("finetune", run, "--bits", "uniform:w2a2", "--search.distill_weight=1"))


@pytest.mark.slow
def test_the_checkpoint_of_a_baseline_is_as_large_as_foretold(compared_run: Path, make_command) -> None:
    experiment = Experiment(make_command("finetune", compared_run).config)
    real = (compared_run / "finetune_static" / "last.pt").stat().st_size
    assert 0.6 * real < checkpoint_bytes(experiment, fixed_stage("static")) < real


@pytest.mark.slow
def test_a_baseline_is_not_a_policy_to_finetune_or_to_evaluate(
    compared_run: Path, make_command, tmp_path: Path
) -> None:
    init = str(compared_run / "finetune_static" / "last.pt")
    with pytest.raises(InputError, match="of stage finetune_static; needed here: search or finetune"):
        stages.run_finetune(make_command("finetune", tmp_path / "other", "--init", init))
    with pytest.raises(InputError, match="of stage finetune_static; needed here: search or finetune"):
        stages.run_eval(make_command("eval", compared_run, "--init", init))


# --- Statistics of the policy and the static configuration ------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_statistics_describe_the_greedy_policy_on_the_val_split(compared_run: Path, make_command) -> None:
    baselines = baselines_of(make_command, compared_run)
    experiment = baselines.experiment
    policy = experiment.policy().eval()
    policy.load_state_dict(load_checkpoint(best_checkpoint(compared_run, FINETUNE))["networks"]["policy"])
    [batch] = experiment.val_loader()
    choices = policy(batch.images).argmax(-1).tolist()
    assert len(choices) == 4
    for position, row in enumerate(baselines.statistics.frequencies.tolist()):
        counts = Counter(choice[position] for choice in choices)
        assert row == [counts[k] / 4 for k in range(3)]
    most = max(Counter(map(tuple, choices)).values())
    assert Counter(map(tuple, choices))[tuple(baselines.configuration("modal"))] == most


@pytest.mark.slow
def test_without_a_val_split_statistics_describe_the_train_split(compared_run: Path, make_command) -> None:
    baselines = baselines_of(make_command, compared_run, "--data.val_split=")
    assert baselines.experiment.tuning_split == "train"
    assert (8 * baselines.statistics.frequencies).tolist() == (8 * baselines.statistics.frequencies).round().tolist()
    assert baselines.statistics.frequencies.sum(1).tolist() == [1.0] * 13


@pytest.mark.slow
def test_static_costs_at_most_what_the_policy_costs_with_its_network(compared_run: Path, make_command) -> None:
    record = json.loads((compared_run / "static.json").read_text())
    baselines, rows = baselines_of(make_command, compared_run), rows_of(compared_run)
    assert record["limit_gbitops"] == baselines.statistics.gbitops
    assert record["gbitops"] <= record["limit_gbitops"]
    assert rows["static"]["gbitops_detector"] == pytest.approx(record["gbitops"], abs=1e-12)
    assert record["configuration"] == baselines.names(baselines.configuration("static"))
    losses = [candidate["loss"] for candidate in record["candidates"]]
    assert losses == sorted(losses)
    assert record["candidates"][0]["configuration"] == record["configuration"]
    found = json.loads((compared_run / "pretrain_quant" / "sensitivity.json").read_text())
    assert len(found["positions"]) == len(found["among_random"]) == len(found["from_cheapest"]) == 13


@pytest.mark.slow
def test_static_is_searched_for_once_and_sensitivities_are_measured_once_for_all_policies(
    compared_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(compared_run, tmp_path / "run", "pretrain_quant", "search")
    shutil.copy(compared_run / "static.json", run)
    searched, measured = [], []
    search, measure = baselines_module.best_within, sensitivity_module.measured_sensitivity
    monkeypatch.setattr(baselines_module, "best_within", lambda *a: searched.append(1) or search(*a))
    monkeypatch.setattr(sensitivity_module, "measured_sensitivity", lambda *a: measured.append(1) or measure(*a))
    before = baselines_of(make_command, run).configuration("static")
    assert (searched, measured) == ([], [])
    state = load_checkpoint(run / "search" / "last.pt")
    state["networks"]["policy"]["head.bias"] += torch.arange(39.0) % 3 * 100  # the most expensive choice everywhere
    save_checkpoint(run / "search" / "last.pt", state)
    assert baselines_of(make_command, run).configuration("static") == [2] * 13 != before
    assert (searched, measured) == ([1], [])
    (run / "pretrain_quant" / "sensitivity.json").unlink()
    (run / "static.json").unlink()
    baselines_of(make_command, run).configuration("static")
    assert (searched, measured) == ([1, 1], [1])


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"found_for": '])
def test_a_damaged_static_configuration_is_named(
    compared_run: Path, make_command, tmp_path: Path, content: str
) -> None:
    run = copy_run(compared_run, tmp_path / "run", "pretrain_quant", "search")
    (run / "static.json").write_text(content)
    with pytest.raises(InputError, match=r"/static\.json: damaged; remove it"):
        baselines_of(make_command, run).configuration("static")


# --- The comparison ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_say_which_detector_they_ran_on_and_how_long_it_was_finetuned(compared_run: Path) -> None:
    expected = {
        "fp32": ("pretrain_fp32", 0),
        "uniform:w2a2": ("pretrain_quant", 0),
        "uniform:w3a3": ("finetune_uniform_w3a3", 3),
        "uniform:w4a4": ("pretrain_quant", 0),
        "random": ("pretrain_quant", 0),
        "shuffled": ("finetune", 3),
        "frequencies": ("finetune", 3),
        "modal": ("finetune", 3),
        "static": ("finetune_static", 3),
        "policy": ("finetune", 3),
    }
    rows = rows_of(compared_run)
    assert {bits: (Path(row["checkpoint"]).parent.name, row["finetuned"]) for bits, row in rows.items()} == expected


@pytest.mark.slow
def test_random_configurations_with_the_frequencies_of_the_policy_cost_about_as_much(
    compared_run: Path, make_command
) -> None:
    rows, statistics = rows_of(compared_run), baselines_of(make_command, compared_run).statistics
    detector = statistics.gbitops - rows["policy"]["gbitops_policy"]
    assert rows["frequencies"]["gbitops_detector"] == pytest.approx(detector, rel=0.1)  # six images
    assert rows["modal"]["distinct_configs"] == rows["static"]["distinct_configs"] == 1


@pytest.mark.slow
def test_a_baseline_of_another_policy_is_refused_before_anything_is_measured(
    compared_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(compared_run, tmp_path / "run", *TRAINED, "finetune_static")
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(run / "finetune_static" / name)
        save_checkpoint(run / "finetune_static" / name, state | {"configuration": ["w2a2"] * 13})
    monkeypatch.setattr(comparison, "evaluate", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"finetuned under another configuration than static has now.*--restart"):
        stages.run_eval(make_command("eval", run, "--bits", "all"))
    with pytest.raises(InputError, match=r"was begun otherwise \(configuration: .*--restart"):
        stages.run_finetune(make_command("finetune", run, "--bits", "static"))


def test_a_run_without_a_search_compares_what_it_has_and_says_so(
    finished_run: Path, make_command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_run(finished_run, tmp_path / "run", "pretrain_quant")
    with caplog.at_level(logging.INFO):
        stages.run_eval(make_command("eval", run, "--bits", "all"))
    assert list(rows_of(run)) == ["uniform:w2a2", "uniform:w3a3", "uniform:w4a4", "random"]
    assert "note: no policy (shuffled, frequencies, modal, static, policy): " in caplog.text
    assert "note: no row fp32" in caplog.text
