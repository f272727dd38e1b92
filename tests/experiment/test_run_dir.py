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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instaqnas import distributed
from instaqnas.errors import InputError
from instaqnas.experiment.run_dir import RunDir, picture_of_choices, set_aside
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


def test_the_picture_of_choices_has_a_row_for_each_position_and_a_column_for_each_epoch() -> None:
    first = [[4, 0, 0], [0, 0, 4]]  # position 0 always at choice 0, position 1 at choice 2
    second = [[2, 0, 2], [0, 4, 0]]  # both at choice 1 on average
    picture = picture_of_choices([first, second])
    assert picture.shape == (3, 2 * 8, 2 * 12)
    dark, bright, middle = [40, 30, 110], [250, 230, 60], [145, 130, 85]
    corners = [picture[:, y, x].tolist() for y, x in ((0, 0), (8, 0), (7, 12), (15, 23))]
    assert corners == [dark, bright, middle, middle]


def test_tensorboard_shows_the_choices_and_the_settings_with_final_figures(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "search" / "tensorboard")).Reload()
    assert "bits/positions" in events.Tags()["images"]
    assert "final/eval/map" in events.Tags()["scalars"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    lines = [json.loads(line) for line in (finished_run / "search" / "metrics.jsonl").read_text().splitlines()]
    assert [len(line["choices"]) for line in lines] == [13, 13]
    assert all(sum(position) == 8 for line in lines for position in line["choices"])  # training images
