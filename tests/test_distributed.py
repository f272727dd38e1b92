"""Two processes under torchrun train and measure what one does; when one of them dies, the other does not wait."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import distributed_commands
import pytest
import torch
from kill_and_resume import differing, fingerprint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import instaqnas.training.detector_training as detector_training
import instaqnas.training.stages as stages
from instaqnas import distributed
from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.command import parse_command
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError, TrainingError
from instaqnas.experiment.checks import check_batches
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import FINETUNE
from instaqnas.training.detector_training import DetectorTraining

# Three steps an epoch. SGD, because AdamW makes a whole step of a gradient that is nothing but rounding; and not
# channels-last, because a CPU rounds BatchNorm's sums more coarsely there.
CONFIG = """
data: {{roots: [{root}], val_split: val, vertical_flip: true, workers: 0}}
detector: {{image_size: 64, width: 0.125}}
bits: {{choices: [[2, 2], [3, 3], [4, 4]]}}
policy: {{pool: 4, width: 4}}
reward: {{name: budget, target_gbitops: 0.115, score_threshold: 0.05}}
pretrain_fp32: {{epochs: 1, batch_size: 4, optimizer: sgd, lr: 0.0003, ema_decay: 0.5}}
pretrain_quant: {{{sgd}, configurations: sandwich}}
search: {{{sgd}, policy_batch_size: 4, batch_norm_batches: 3}}
finetune: {{{sgd}, accumulate: 2, distill_weight: 0.5}}
eval: {{batch_size: 4}}
runtime: {{compile: off, channels_last: false, threads: 1}}
"""
SGD = "epochs: 1, batch_size: 4, optimizer: sgd, lr: 0.0005, step_size_lr_factor: 0.01"
STAGES = ("pretrain_fp32", "pretrain_quant", "search", "finetune")
SPLITS = {"train": 12, "val": 5, "test": 5}
# A checkpoint at every step, in a search of two epochs.
SEARCH_TO_KILL = ("--search.epochs=2", "--search.save_minutes=1e-9")
MakeWords = Callable[..., list[str]]
Starts = dict[str, dict[str, dict[str, Tensor]]]  # weights by stage, network and name


def run_in_process(commands: list[tuple[str, list[str]]]) -> Starts:
    """Runs stages here; returns what each began with."""
    starts: Starts = {}

    def note_and_train(training: DetectorTraining) -> Iterator[int]:
        starts[training.run_dir.stage.name] = copy.deepcopy(training.state.state_dict()["networks"])
        yield from epochs(training)

    epochs = DetectorTraining.epochs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector_training, "LOG_EVERY", 1)
        patch.setattr(DetectorTraining, "epochs", note_and_train)
        for stage, words in commands:
            getattr(stages, f"run_{stage}")(parse_command(stage, words))
    return starts


def run_in_two_processes(commands: list[tuple[str, list[str]]]) -> subprocess.CompletedProcess[str]:
    """torchrun on the commands, one after the other; see distributed_commands.py."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *torchrun, distributed_commands.__file__, json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> MakeWords:
    """The words of a command for a run, with further options."""
    folder = tmp_path_factory.mktemp("distributed")
    generate_shapes(folder / "shapes", SPLITS, image_size=64, seed=5)
    (folder / "config.yaml").write_text(CONFIG.format(root=folder / "shapes", sgd=SGD))

    def make(run: Path, *options: str) -> list[str]:
        return ["--config", str(folder / "config.yaml"), "--run", str(run), "--device", "cpu", *options]

    return make


@dataclass(frozen=True)
class Runs:
    """A run of one process with all stages, what each began with, and for each stage a run in which two processes have
    done it, after the one process had done those before; likewise where the two did not share their gradients.
    """

    alone: Path
    starts: Starts
    two: dict[str, Path]
    unshared: dict[str, Path]
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, words: MakeWords) -> Runs:
    alone, folder = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    starts = run_in_process([(stage, words(alone)) for stage in ("pretrain", "search", "finetune")])
    # One image at a time, here as there: then rounding is the same.
    run_in_process([("eval", words(alone, "--bits", "basic", "--eval.batch_size=1"))])
    two = {stage: folder / stage for stage in (*STAGES, "eval")}
    unshared = {stage: folder / f"unshared_{stage}" for stage in ("pretrain_quant", "search")}
    for stage, run in (*two.items(), *unshared.items()):
        for before in (*STAGES, "eval")[: (*STAGES, "eval").index(stage)]:
            shutil.copytree(alone / before, run / before)
    shutil.copytree(alone / "pretrain_quant", folder / "undisturbed" / "pretrain_quant")
    training = {stage: stage.partition("_")[0] for stage in STAGES}
    commands = [
        ("check_parallel", [str(folder)]),
        *((training[stage], words(two[stage])) for stage in STAGES),
        ("eval", words(two["eval"], "--bits", "basic", "--eval.batch_size=2")),
        ("search", words(folder / "undisturbed", *SEARCH_TO_KILL)),
        ("forget_gradients_of_others", []),
        *((training[stage], words(run)) for stage, run in unshared.items()),
    ]
    done = run_in_two_processes(commands)
    assert done.returncode == 0, done.stdout
    assert "FutureWarning" not in done.stdout
    return Runs(alone, starts, two, unshared, folder)


def moves(runs: Runs, run: Path, stage: str) -> dict[str, Tensor]:
    """How far the weights of each network have gone in a stage, as one vector.

    Without step sizes, whose way is a few roundings long.
    """
    found: dict[str, list[Tensor]] = {}
    for name, network in load_checkpoint(run / stage / "last.pt")["networks"].items():
        for key, value in network.items():
            if value.is_floating_point() and "running" not in key and "quantizer" not in key:
                found.setdefault(name, []).append((value - runs.starts[stage][name][key]).flatten())
    return {name: torch.cat(values) for name, values in found.items()}


def deviations(runs: Runs, run: Path, stage: str) -> dict[str, float]:
    """How far the weights end from where they do in the one process, relative to their way there, by network."""
    expected, found = moves(runs, runs.alone, stage), moves(runs, run, stage)
    if stage == "finetune":
        assert not expected.pop("policy").any()  # frozen
    return {name: ((found[name] - move).norm() / move.norm()).item() for name, move in expected.items()}


def losses(folder: Path) -> list[float]:
    """The loss of each step."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("step/loss")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does(runs: Runs, stage: str) -> None:
    alone, two = runs.alone / stage, runs.two[stage] / stage
    assert len(losses(two)) == 3
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
    lines = [json.loads((folder / "metrics.jsonl").read_text()) for folder in (alone, two)]
    assert lines[0]["step"] == lines[1]["step"] == 3
    for line in lines:
        del line["eval/map"]  # rounding swaps detections of equal scores; the evaluation is compared below
    assert lines[1] == pytest.approx(lines[0], rel=1e-5, abs=1e-5)
    states = [load_checkpoint(folder / "last.pt") for folder in (alone, two)]
    for name, network in states[0]["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(
                states[1]["networks"][name][key], value, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert states[1]["multiplier"] == pytest.approx(states[0]["multiplier"], rel=1e-5)
    assert max(deviations(runs, runs.two[stage], stage).values()) < 1e-2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_begin_a_search_from_sensitivities_as_one_does(
    runs: Runs, words: MakeWords, tmp_path: Path
) -> None:
    """Each fits the same policy to all images; a learning rate of next to nothing leaves it there."""
    options = (
        "--search.start=sensitivity", "--policy.effort=true", "--reward.quality=loss",
        "--search.train_detector=false", "--search.policy_lr=1e-12", "--search.batch_norm_batches=0",
    )  # fmt: skip
    for name in ("alone", "two"):
        shutil.copytree(runs.alone / "pretrain_quant", tmp_path / name / "pretrain_quant")
    run_in_process([("search", words(tmp_path / "alone", *options))])
    done = run_in_two_processes([("search", words(tmp_path / "two", *options))])
    assert done.returncode == 0, done.stdout
    alone, two = (load_checkpoint(tmp_path / name / "search" / "last.pt") for name in ("alone", "two"))
    assert alone["networks"]["policy"]["effort"].any()
    for name, value in alone["networks"]["policy"].items():
        torch.testing.assert_close(two["networks"]["policy"][name], value, rtol=1e-4, atol=1e-5)
    assert two["multiplier"] == pytest.approx(alone["multiplier"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain_quant", "search"])
def test_two_processes_that_keep_their_gradients_train_otherwise(runs: Runs, stage: str) -> None:
    assert min(deviations(runs, runs.unshared[stage], stage).values()) > 0.1


@pytest.mark.slow
def test_every_process_gets_the_state_of_the_first_and_the_sum_of_all(runs: Runs) -> None:
    for number in (1, 2):
        found = json.loads((runs.folder / f"parallel_{number - 1}").read_text())
        state = {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1, "num_batches_tracked": 1}
        # 1 + 2 is the sum; each process weighs it with its number, so the gradient of each share is 1 + 2 too
        assert found == {**state, "total": 3, "gradient": 3, "share": number}


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once_and_report_what_one_does(runs: Runs) -> None:
    alone, two = (run / "eval" for run in (runs.alone, runs.two["eval"]))
    assert (two / "per_image.csv").read_text() == (alone / "per_image.csv").read_text()
    rows = [json.loads((folder / "report.json").read_text())["rows"] for folder in (alone, two)]
    assert {row["images"] for row in rows[1]} == {5}
    assert len(rows[1]) == 6
    for first, second in zip(*rows, strict=True):
        del first["checkpoint"], second["checkpoint"]
        assert second == first
    assert max(row["map_11pt"] for row in rows[1]) > 0


@pytest.mark.slow
def test_one_of_two_processes_writes(runs: Runs) -> None:
    for stage in STAGES:
        folder = runs.two[stage] / stage
        assert len(list((folder / "tensorboard").iterdir())) == 1
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dead_process_ends_the_run_and_the_same_command_goes_on_as_if_nothing_had_been(
    runs: Runs, tmp_path: Path, words: MakeWords
) -> None:
    """One dies in an epoch of the policy, one in an epoch of the detector."""
    searches = []
    # The one that does not write may die before the other has written the same checkpoint.
    for dead, saves, passing, steps in ((0, 2, "policy", {2}), (1, 5, "detector", {1, 2})):
        run = tmp_path / f"dead_{dead}"
        shutil.copytree(runs.alone / "pretrain_quant", run / "pretrain_quant")
        searches.append(("search", words(run, *SEARCH_TO_KILL)))
        done = run_in_two_processes([("die_after_saves", [str(dead), str(saves)]), searches[-1]])
        last = run / "search" / "last.pt"
        assert time.time() - last.stat().st_mtime < 60  # its death came with the last checkpoint
        assert done.returncode == 1
        assert "exitcode  : -9" in done.stdout
        assert load_checkpoint(last)["running"][passing]["steps"] in steps
    done = run_in_two_processes(searches)
    assert done.returncode == 0, done.stdout
    undisturbed = fingerprint(runs.folder / "undisturbed" / "search")
    for dead in (0, 1):
        assert differing(fingerprint(tmp_path / f"dead_{dead}" / "search"), undisturbed) == []


def test_an_error_from_a_lost_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234\nmore"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with (
        pytest.raises(
            TrainingError, match=r"another process of this training has died.*closed by peer \[127"
        ) as caught,
        distributed.reporting_lost_processes(),
    ):
        raise RuntimeError(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes"), distributed.reporting_lost_processes():
        raise RuntimeError("shapes do not match")


def test_the_process_group_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: left.append(True))
    distributed.leave()
    assert left == [True]


@pytest.mark.slow
def test_wrong_input_ends_all_processes_in_one_line(tmp_path: Path) -> None:
    words = ["--standalone", "--nproc-per-node", "2", "--", "search.py", "--config", str(tmp_path / "absent.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "instaqnas.launch", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/absent.yaml: No such file or directory\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_processes_in_one_line(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "wait.py"
    script.write_text("import os, pathlib, time; pathlib.Path(os.environ['RANK']).touch(); time.sleep(60)")
    words = ["-m", "instaqnas.launch", "--standalone", "--nproc-per-node", "2", "--", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    while process.poll() is None and not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if "interrupted" in line]
    assert process.returncode == 128 + number
    assert lines == ["interrupted; the same command (without --restart) continues from the last checkpoint"]
    assert "ChildFailedError" not in errors
    assert "SignalException" not in errors


@pytest.mark.parametrize(
    "options, message",
    [
        ((), None),
        (("--finetune.batch_size=3",), r"^finetune\.batch_size: expected a multiple of 2 .*, got 3$"),
        (("--finetune.batch_size=6", "--finetune.accumulate=2"), r"expected a multiple of 4 .*, got 6$"),
        (("--finetune.batch_size=14", "--finetune.accumulate=1"), r"expected at most the 12 training images, got 14$"),
    ],
)
def test_a_batch_without_equal_shares_for_all_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: MakeWords, options: tuple[str, ...], message: str | None
) -> None:
    settings = parse_command("finetune", words(tmp_path, "--finetune.accumulate=1", *options))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message):
        check_batches(Experiment(settings.config), [FINETUNE])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_for_terminals_and_leaves_nothing_in_a_file(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", written)
    seen = list(distributed.progress_bar(range(8), "epoch 1/2", done=1))
    assert seen == list(range(8))
    assert ("epoch 1/2" in written.getvalue()) is terminal
    assert terminal or written.getvalue() == ""
