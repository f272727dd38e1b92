"""A training that is interrupted at any checkpoint ends as one that is not; what is kept when a write fails."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kill_and_resume import differing, fingerprint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import instaqnas.checkpoint as checkpoint
import instaqnas.training.detector_training as detector_training
import instaqnas.training.stages as stages
from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.command import Command
from instaqnas.errors import InputError, TrainingError
from instaqnas.experiment.run_dir import RunDir
from instaqnas.experiment.stage import stage_named

EVERY_STEP = "save_minutes=1e-9"
RUN = {
    "pretrain": stages.run_pretrain,
    "search": stages.run_search,
    "finetune": stages.run_finetune,
}


def copy_stages(run: Path, to: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(run / name, to / name)
    return to


def interrupt_after_each_checkpoint(run_stage: Callable[[Command], None], command: Command) -> int:
    """Repeats a stage until it ends, each time stopped right after its first checkpoint; returns how often it began."""

    def save_and_stop(run_dir: RunDir, *args, **settings) -> None:
        save(run_dir, *args, **settings)
        raise KeyboardInterrupt

    save = RunDir.save
    for beginnings in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunDir, "save", save_and_stop)
            try:
                run_stage(command)
            except KeyboardInterrupt:
                continue
        return beginnings
    raise AssertionError


def scalars(stage: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: by name, (step, value)."""
    events = EventAccumulator(str(stage / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


SEARCH_OPTIONS = (
    "--search.ema_decay=0.5",
    "--search.distill_weight=0.5",
    "--search.batch_norm_batches=1",
    "--reward.name=budget",
    "--reward.target_gbitops=0.115",
    "--reward.quality=loss",
    "--search.baseline=rloo",
    "--search.samples=2",
    "--policy.input=stem",
)


PRETRAIN_OPTIONS = (
    "--pretrain_quant.configurations=sandwich",
    "--pretrain_quant.batch_norm_batches=1",
    "--pretrain_quant.eval_every=1",
)


@pytest.mark.parametrize(
    "script, stages_of_script, options, checkpoints",
    [
        pytest.param("pretrain", ("pretrain_fp32", "pretrain_quant"), PRETRAIN_OPTIONS, 12, marks=pytest.mark.slow),
        pytest.param("search", ("search",), SEARCH_OPTIONS, 10, marks=pytest.mark.slow),
        ("finetune", ("finetune",), ("--finetune.optimizer=sgd", "--finetune.accumulate=2"), 3),
        pytest.param(
            "finetune",
            ("finetune_uniform_w2a2",),
            ("--bits=uniform:w2a2", "--search.epochs=1"),
            6,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pretrain", "search", "finetune", "fixed"],
)
def test_a_stage_interrupted_after_each_checkpoint_ends_as_a_whole_one(
    finished_run: Path,
    make_command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    stages_of_script: tuple[str, ...],
    options: tuple[str, ...],
    checkpoints: int,
) -> None:
    monkeypatch.setattr(detector_training, "LOG_EVERY", 1)
    before = {"pretrain": (), "search": ("pretrain_fp32", "pretrain_quant"), "finetune": ("pretrain_quant", "search")}
    whole, interrupted = (
        copy_stages(finished_run, tmp_path / name, *before[script]) for name in ("whole", "interrupted")
    )
    options = (*options, *(f"--{stage_named(stage).section}.{EVERY_STEP}" for stage in stages_of_script))
    RUN[script](make_command(script, whole, *options))
    assert interrupt_after_each_checkpoint(RUN[script], make_command(script, interrupted, *options)) == checkpoints + 1
    for stage in stages_of_script:
        assert differing(fingerprint(whole / stage), fingerprint(interrupted / stage)) == []
        assert scalars(whole / stage) == scalars(interrupted / stage)
        assert len(scalars(whole / stage)["step/loss"]) == 2 * load_checkpoint(whole / stage / "last.pt")["epoch"]


def test_a_resumed_epoch_reads_only_the_images_that_are_left(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    command = make_command("finetune", run, f"--finetune.{EVERY_STEP}")

    def save_and_stop(run_dir: RunDir, *args, **settings) -> None:
        save(run_dir, *args, **settings)
        raise KeyboardInterrupt

    save = RunDir.save
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            stages.run_finetune(command)
    assert load_checkpoint(run / "finetune" / "last.pt")["running"]["detector"]["steps"] == 1
    read = []
    step = detector_training.detector_step

    def watched_step(network, batch, *args, **settings):
        read.append(batch.image_ids)
        return step(network, batch, *args, **settings)

    monkeypatch.setattr(detector_training, "detector_step", watched_step)
    stages.run_finetune(command)
    assert len(read) == 1
    assert len(read[0]) == 4


def test_without_save_minutes_there_is_a_checkpoint_an_epoch(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(RunDir, "save", lambda self, state, **settings: saved.append(state["epoch"]))
    run = copy_stages(finished_run, tmp_path / "run", "search")
    stages.run_finetune(make_command("finetune", run, "--finetune.save_minutes=0", "--finetune.epochs=2"))
    assert saved == [1, 2]


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept_by_epoch(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    options = ("--finetune.epochs=4", "--finetune.keep_checkpoints=2", f"--finetune.{EVERY_STEP}")
    stages.run_finetune(make_command("finetune", run, *options))
    kept = {path.name: load_checkpoint(path)["epoch"] for path in (run / "finetune").glob("epoch_*")}
    assert kept == {"epoch_0003.pt": 3, "epoch_0004.pt": 4}
    assert (run / "finetune" / "epoch_0004.pt").read_bytes() == (run / "finetune" / "last.pt").read_bytes()


def test_how_often_to_save_may_change_between_interruption_and_resumption(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "finetune", "search")
    others = ("--finetune.save_minutes=3", "--finetune.keep_checkpoints=1", "--finetune.save_every=2")
    stages.run_finetune(make_command("finetune", run, *others))
    with pytest.raises(InputError, match=r"finetune\.accumulate: 1 -> 2"):
        stages.run_finetune(make_command("finetune", run, "--finetune.accumulate=2"))


def test_a_finished_stage_of_before_there_were_checkpoints_in_mid_epoch_is_complete(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search", "finetune")
    state = load_checkpoint(run / "finetune" / "last.pt")
    del state["running"]
    for section in ("finetune", "search", "pretrain_fp32", "pretrain_quant"):
        for name in ("save_minutes", "keep_checkpoints", "accumulate"):
            del state["config"][section][name]
    checkpoint.save_checkpoint(run / "finetune" / "last.pt", state)
    before = (run / "finetune" / "last.pt").read_bytes()
    stages.run_finetune(make_command("finetune", run))
    assert (run / "finetune" / "last.pt").read_bytes() == before


def open_locks() -> list[str]:
    """Files named .lock that this process has open."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [link for link in links if link.endswith("/.lock")]


def test_a_stage_unlocks_its_folder_whether_it_trains_is_complete_or_fails(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    before = open_locks()
    for _ in range(2):  # the second time it is complete
        stages.run_finetune(make_command("finetune", run))
        assert open_locks() == before
    with pytest.raises(InputError, match="was begun otherwise"):
        stages.run_finetune(make_command("finetune", run, "--finetune.lr=1"))
    assert open_locks() == before


def test_a_stage_goes_on_after_its_images_have_moved_but_not_with_others(
    finished_run: Path, make_command, config_file: Path, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search", "finetune")
    shutil.copytree(config_file.parent / "shapes", tmp_path / "moved")
    options = (f"--data.roots=[{tmp_path}/moved]",)
    before = (run / "finetune" / "last.pt").read_bytes()
    stages.run_finetune(make_command("finetune", run, *options))
    assert (run / "finetune" / "last.pt").read_bytes() == before
    path = tmp_path / "moved" / "Annotations" / "train_000001.xml"  # the same id, another box
    path.write_text(re.sub(r"<xmin>(\d+)", lambda m: f"<xmin>{int(m[1]) + 1}", path.read_text(), count=1))
    with pytest.raises(InputError, match="with other training images: 8 then, 8 now"):
        stages.run_finetune(make_command("finetune", run, *options))


# --- What fails on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        pytest.param(RuntimeError("PytorchStreamWriter failed writing file"), marks=pytest.mark.slow),
    ],
    ids=["open", "writer"],
)
def test_a_full_disk_while_saving_ends_in_one_line_and_keeps_the_last_checkpoint(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    command = make_command("finetune", run, "--finetune.epochs=3", "--finetune.save_minutes=0")
    kept, write, saved = [], torch.save, itertools.count(1)

    def write_until_full(state: dict, file) -> None:
        if next(saved) == 2:
            kept.append((run / "finetune" / "last.pt").read_bytes())
            file.write(b"half a checkpoint")
            raise error
        write(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", write_until_full)
        with pytest.raises(
            TrainingError, match=r"finetune/last\.pt: cannot be written \(.+\); what was there"
        ) as caught:
            stages.run_finetune(command)
    assert "\n" not in str(caught.value)
    assert (run / "finetune" / "last.pt").read_bytes() == kept[0]
    assert sorted(path.name for path in (run / "finetune").iterdir() if ".pt" in path.name) == ["last.pt"]
    stages.run_finetune(command)
    assert load_checkpoint(run / "finetune" / "last.pt")["epoch"] == 3


def test_a_worker_that_is_killed_ends_in_one_line(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the main process is busy with something else than its loader."""
    save, children = RunDir.save, []

    def save_and_kill(run_dir: RunDir, *args, **settings) -> None:
        save(run_dir, *args, **settings)
        children.append(multiprocessing.active_children()[0])
        os.kill(children[0].pid, signal.SIGKILL)
        time.sleep(60)  # torch's signal handler ends this

    monkeypatch.setattr(RunDir, "save", save_and_kill)
    run = copy_stages(finished_run, tmp_path / "run", "search")
    options = ("--data.workers=1", "--finetune.epochs=3", "--finetune.save_minutes=0")
    with pytest.raises(TrainingError, match=r"^a process that reads images has died \(DataLoader worker .+\)$"):
        stages.run_finetune(make_command("finetune", run, *options))
    assert load_checkpoint(run / "finetune" / "last.pt")["epoch"] == 1


@pytest.mark.slow
def test_a_disk_that_takes_no_more_ends_the_script_and_keeps_the_last_checkpoint(
    finished_run: Path, config_file: Path, tmp_path: Path
) -> None:
    """For real, by the limit that the system sets to the size of files: the last checkpoint is just below it."""
    run, words = copy_stages(finished_run, tmp_path / "run", "search", "finetune"), ["--run", str(tmp_path / "run")]
    last = run / "finetune" / "last.pt"
    state = load_checkpoint(last)
    state["epoch"] = 0
    checkpoint.save_checkpoint(last, state)
    before = last.read_bytes()
    limit = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
             "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')")  # fmt: skip
    script = Path(__file__).parents[2] / "finetune.py"
    words = [sys.executable, "-c", limit, str(len(before) // 2), str(script), "--config", str(config_file), *words]
    done = subprocess.run(words, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 1
    assert f"error: {last}: cannot be written (" in done.stderr
    assert "Traceback" not in done.stderr
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*.tmp"))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_on_the_way_end_in_one_line_and_keep_the_last_checkpoint(
    finished_run: Path, make_command, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    run, data = copy_stages(finished_run, tmp_path / "run", "search"), tmp_path / "data"
    shutil.copytree(config_file.parent / "shapes", data)
    options = (
        f"--data.roots=[{data}]",
        f"--data.workers={workers}",
        "--finetune.epochs=3",
        "--finetune.save_minutes=0",
    )
    save = RunDir.save

    def save_and_remove(run_dir: RunDir, *args, **settings) -> None:
        save(run_dir, *args, **settings)
        shutil.rmtree(data)

    monkeypatch.setattr(RunDir, "save", save_and_remove)
    with pytest.raises(InputError, match=rf"^{data}/JPEGImages/train_\d+\.\w+: cannot be read: No such file") as caught:
        stages.run_finetune(make_command("finetune", run, *options))
    assert "\n" not in str(caught.value)
    assert load_checkpoint(run / "finetune" / "last.pt")["epoch"] == 1
    assert json.loads((run / "finetune" / "metrics.jsonl").read_text())["epoch"] == 1


def test_a_finished_stage_with_more_epochs_says_why_it_does_not_go_on(finished_run: Path, make_command) -> None:
    with pytest.raises(InputError) as refused:
        stages.run_finetune(make_command("finetune", finished_run, "--finetune.epochs=3"))
    assert str(refused.value).endswith(
        "/finetune: was begun otherwise (finetune.epochs: 1 -> 3); the learning rate falls to 0 at the last epoch, so "
        "other epochs are another training; take another --run, or --restart to begin this stage anew"
    )
