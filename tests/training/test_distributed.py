"""Two processes under torchrun train and measure what one does; when one of them dies, the other does not wait."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import instaqnas.training.experiment as experiment
import instaqnas.training.stages as stages
from instaqnas.checkpoint import load_checkpoint
from instaqnas.config import parse_command
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError, TrainingError
from instaqnas.training import distributed

# Three steps an epoch. SGD, because AdamW makes a whole step of a gradient that is nothing but rounding; and not
# channels-last, because a CPU rounds BatchNorm's sums more coarsely there.
CONFIG = """
data: {{roots: [{root}], val_split: val, vertical_flip: true, workers: 0}}
detector: {{image_size: 64, width: 0.125}}
bits: {{choices: [[2, 2], [3, 3], [4, 4]]}}
policy: {{pool: 4, width: 4}}
reward: {{name: budget, target_gbitops: 0.115, score_threshold: 0.05}}
pretrain_fp32: {{epochs: 1, batch_size: 4, optimizer: sgd, lr: 0.00001, clip_grad_norm: 0, ema_decay: 0.5}}
pretrain_quant: {{{sgd}, sandwich: true}}
search: {{{sgd}, policy_batch_size: 4, batch_norm_batches: 3}}
finetune: {{{sgd}, accumulate: 2, distill_weight: 0.5}}
eval: {{batch_size: 4}}
runtime: {{compile: off, channels_last: false, threads: 1}}
"""
SGD = "epochs: 1, batch_size: 4, optimizer: sgd, lr: 0.0005, step_size_lr_factor: 0.01"
STAGES = ("pretrain_fp32", "pretrain_quant", "search", "finetune")
SPLITS = {"train": 12, "val": 5, "test": 5}
RUN_COMMANDS = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from instaqnas.config import parse_command
from instaqnas.errors import exit_on_input_error
from instaqnas.training import stages

Path(sys.argv[1], "process_" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
with exit_on_input_error():
    for stage, words in json.loads(sys.argv[2]):
        getattr(stages, "run_" + stage)(parse_command(stage, words))
"""
MakeWords = Callable[..., list[str]]


def run_in_process(commands: list[tuple[str, list[str]]]) -> None:
    for stage, words in commands:
        getattr(stages, f"run_{stage}")(parse_command(stage, words))


def start_two_processes(folder: Path, commands: list[tuple[str, list[str]]]) -> subprocess.Popen[str]:
    """torchrun on the commands, one after the other; each process writes its id to `folder`/process_RANK."""
    script = folder / "run_commands.py"
    script.write_text(RUN_COMMANDS.format(root=str(Path(__file__).parents[2])))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *torchrun, str(script), str(folder), json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> MakeWords:
    """The words of a command for a run, with further options."""
    folder = tmp_path_factory.mktemp("distributed")
    generate_shapes(folder / "shapes", SPLITS, image_size=64, seed=5)
    (folder / "config.yaml").write_text(CONFIG.format(root=folder / "shapes", sgd=SGD))

    def make(run: Path, *options: str) -> list[str]:
        return ["--config", str(folder / "config.yaml"), "--run", str(run), "--device", "cpu", *options]

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, words: MakeWords) -> tuple[Path, dict[str, Path]]:
    """A run of one process with all stages, and for each stage a run in which two processes have done it: the stages
    before it are those of the one process.
    """
    alone, folder = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    run_in_process([(stage, words(alone)) for stage in ("pretrain", "search", "finetune")])
    run_in_process([("eval", words(alone, "--bits", "all"))])
    two = {stage: folder / stage for stage in (*STAGES, "eval")}
    for number, run in enumerate(two.values()):
        for before in STAGES[:number]:
            shutil.copytree(alone / before, run / before)
    commands = [(stage.partition("_")[0], words(run)) for stage, run in two.items() if stage != "eval"]
    process = start_two_processes(folder, [*commands, ("eval", words(two["eval"], "--bits", "all"))])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return alone, two


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does(runs: tuple[Path, dict[str, Path]], stage: str) -> None:
    alone, two = runs[0] / stage, runs[1][stage] / stage
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


def test_two_processes_have_trained_at_all(runs: tuple[Path, dict[str, Path]]) -> None:
    for before, stage in (("pretrain_quant", "search"), ("search", "finetune")):
        first, last = (load_checkpoint(runs[1][stage] / name / "last.pt")["networks"] for name in (before, stage))
        name = "backbone.blocks.3.pointwise.weight"
        assert (last["detector"][name] - first["detector"][name]).abs().max() > 3e-5


def test_two_processes_evaluate_every_image_once_and_report_what_one_does(runs: tuple[Path, dict[str, Path]]) -> None:
    alone, two = (run / "eval" for run in (runs[0], runs[1]["eval"]))
    assert (two / "per_image.csv").read_text() == (alone / "per_image.csv").read_text()
    rows = [json.loads((folder / "report.json").read_text())["rows"] for folder in (alone, two)]
    assert [row["images"] for row in rows[1]] == [5] * 6
    for first, second in zip(*rows, strict=True):
        del first["checkpoint"], second["checkpoint"]
        assert second == first
    assert max(row["map_11pt"] for row in rows[1]) > 0


def test_one_of_two_processes_writes(runs: tuple[Path, dict[str, Path]]) -> None:
    for stage in STAGES:
        folder = runs[1][stage] / stage
        assert len(list((folder / "tensorboard").iterdir())) == 1
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_ends_the_run_and_leaves_the_checkpoint(tmp_path: Path, words: MakeWords, dead: int) -> None:
    options = (
        "--pretrain_fp32.epochs=100000",
        "--pretrain_fp32.eval_every=100000",
        "--pretrain_fp32.save_minutes=1e-9",
    )
    process = start_two_processes(tmp_path, [("pretrain", words(tmp_path / "run", *options))])
    last = tmp_path / "run" / "pretrain_fp32" / "last.pt"
    while not last.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.kill(int((tmp_path / f"process_{dead}").read_text()), signal.SIGKILL)
    start = time.monotonic()
    output, _ = process.communicate()
    assert time.monotonic() - start < 60
    assert process.returncode == 1
    assert "exitcode  : -9" in output
    assert load_checkpoint(last)["running"]["detector"]["steps"] >= 0


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
    monkeypatch.setattr(experiment, "world_size", lambda: 2)
    parts = (settings.config.finetune.batch_size, settings.config.finetune.accumulate)
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message):
        experiment.Experiment(settings.config).check_shares("finetune.batch_size", *parts)
