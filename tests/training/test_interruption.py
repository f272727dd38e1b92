"""SIGINT and SIGTERM: a training ends after the step, saved, and resumes to the result of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_and_resume import differing, fingerprint

import instaqnas.entry as entry
import instaqnas.training.detector_training as detector_training
import instaqnas.training.policy_training as policy_training
import instaqnas.training.stages as stages
from instaqnas import distributed
from instaqnas.checkpoint import load_checkpoint
from instaqnas.errors import Interrupted
from instaqnas.training.interruption import finishing_steps


def with_signal(step: Callable, number: int) -> Callable:
    """`step`, in which this process gets a signal."""

    def signalled(*args, **settings):
        os.kill(os.getpid(), number)
        return step(*args, **settings)

    return signalled


@pytest.mark.parametrize(
    "module, name, part",
    [(detector_training, "detector_step", "detector"), (policy_training, "policy_step", "policy")],
    ids=["detector", "policy"],
)
def test_the_step_is_finished_and_saved_and_the_search_resumes(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module, name: str, part: str
) -> None:
    for stage in ("pretrain_fp32", "pretrain_quant"):
        shutil.copytree(finished_run / stage, tmp_path / "run" / stage)
    command = make_command("search", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, with_signal(getattr(module, name), signal.SIGTERM))
        with pytest.raises(Interrupted) as interrupted:
            stages.run_search(command)
    assert interrupted.value.number == signal.SIGTERM
    assert load_checkpoint(tmp_path / "run" / "search" / "last.pt")["running"][part]["steps"] == 1
    stages.run_search(command)
    assert differing(fingerprint(finished_run / "search"), fingerprint(tmp_path / "run" / "search")) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_is_that_of_the_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    def train(_command) -> None:
        with finishing_steps() as interruption:
            os.kill(os.getpid(), number)
            interruption.end()

    monkeypatch.setattr(entry, "parse_command", lambda _stage: None)
    monkeypatch.setattr(stages, "run_search", train)
    with pytest.raises(SystemExit) as exit_status:
        entry.main("search")
    assert exit_status.value.code == status
    assert capsys.readouterr().err == (
        "interrupted; this step is finished and saved first, a second signal ends at once\n"
        "interrupted; the same command (without --restart) continues from the last checkpoint\n"
    )


def test_a_second_signal_ends_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), finishing_steps():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with finishing_steps():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_several_processes_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    with finishing_steps() as interruption:
        assert signal.getsignal(signal.SIGTERM) is before
    interruption.end()
