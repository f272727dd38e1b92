"""The folder of a stage: one training at a time writes there."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from instaqnas import distributed
from instaqnas.errors import InputError
from instaqnas.experiment.run_dir import RunDir, set_aside
from instaqnas.experiment.stage import FINETUNE, SEARCH

FORK = multiprocessing.get_context("fork")


def hold(run: Path, ready: Connection) -> None:
    """Begins a stage, starts a worker as a loader does, and does not end."""
    RunDir(run, FINETUNE, {}, [])
    worker = FORK.Process(target=signal.pause)
    worker.start()
    ready.send(worker.pid)
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """A process that has begun the stage finetune of the run `tmp_path`, with a worker that lives longer than it."""
    ready, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, there))
    process.start()
    worker = ready.recv()
    yield process
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def test_a_stage_that_another_process_trains_is_refused_in_one_line(holder: BaseProcess, tmp_path: Path) -> None:
    for begin in (lambda: RunDir(tmp_path, FINETUNE, {}, []), lambda: set_aside(tmp_path / "finetune")):
        with pytest.raises(InputError, match=r"/finetune: another process is training this stage$"):
            begin()
    RunDir(tmp_path, SEARCH, {}, []).close()
    assert not (tmp_path / "finetune.old-1").exists()


def test_a_killed_process_leaves_its_stage_to_the_next_at_once(holder: BaseProcess, tmp_path: Path) -> None:
    holder.kill()
    holder.join()
    run_dir = RunDir(tmp_path, FINETUNE, {}, [])
    assert run_dir.path == tmp_path / "finetune"
    run_dir.close()


def test_processes_that_find_other_files_than_the_first_do_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path, FINETUNE, {}, [])
    run_dir.close()
    monkeypatch.setattr(distributed, "from_writer", lambda found: [*found[:-1], "sha256 of a checkpoint"])
    with pytest.raises(InputError, match=r"/finetune: not the files that the first process finds"):
        RunDir(tmp_path, FINETUNE, {}, [])


def test_a_stage_that_has_ended_can_be_set_aside(tmp_path: Path) -> None:
    RunDir(tmp_path, FINETUNE, {}, []).close()
    set_aside(tmp_path / "finetune")
    assert (tmp_path / "finetune.old-1" / "config.yaml").exists()
    assert not (tmp_path / "finetune").exists()


def test_metrics_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Python alone would write NaN, which JSON does not have."""
    with RunDir(tmp_path, FINETUNE, {}, []) as run_dir:
        run_dir.open_tensorboard(0)
        run_dir.log_epoch(1, 5, {"loss": 0.25, "eval/map": math.nan, "norm": math.inf}, None)
    (line,) = (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line, parse_constant=pytest.fail)
    assert metrics == {"epoch": 1, "step": 5, "loss": 0.25, "eval/map": None, "norm": None}
