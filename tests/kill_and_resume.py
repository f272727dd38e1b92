"""Kills trainings with SIGKILL at random moments and resumes them: they must end as undisturbed ones do.

    .venv/bin/python tests/kill_and_resume.py [--kills 10] [--in-save 3] [--workers 0 2] [--seed 0]

Each stage runs once undisturbed and, for each number of loader processes, once with `--kills` kills, of which
`--in-save` fall while a checkpoint is being written. After each a new process gets the same command. Compared are the
sha256 of the networks, optimizers, scheduler, counters and sums of the last checkpoint and of the best one, and that of
metrics.jsonl. Without worker processes every step is saved, with them only some are, and the others are repeated. Then,
to see that the comparison can fail, the search is resumed from checkpoints that have each lost one of these.

Exit status 1 if anything differs that must not, or does not that must; or if no kill of a search came in an epoch of
the policy, or none in one of the detector, or fewer than 10 in all while saving.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instaqnas.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from instaqnas.config.command import parse_command
from instaqnas.data.shapes import generate_shapes  # noqa: E402
from instaqnas.experiment.run_dir import RunDir  # noqa: E402
from instaqnas.experiment.stage import PRETRAIN_FP32  # noqa: E402
from instaqnas.training import stages  # noqa: E402

CONFIG = """
data: {{roots: [{root}], val_split: val, vertical_flip: true, workers: {workers}}}
detector: {{image_size: 64, width: 0.125, extras_batch_norm: true}}
bits: {{choices: [[2, 2], [3, 3], [4, 4]]}}
policy: {{pool: 4, width: 4}}
reward: {{name: budget, score_threshold: 0.05, target_gbitops: 0.115}}
pretrain_fp32: {{epochs: {pretrain_epochs}, batch_size: 4, eval_every: 1, ema_decay: 0.9, save_minutes: 1.0e-6}}
pretrain_quant: {{epochs: {pretrain_epochs}, batch_size: 4, configurations: sandwich, save_minutes: 1.0e-6}}
search: {{epochs: 3, batch_size: 4, policy_batch_size: 4, policy_lr: 0.01, ema_decay: 0.9, save_minutes: 1.0e-6}}
finetune: {{epochs: 3, batch_size: 4, optimizer: sgd, batch_norm_batches: 2, save_minutes: 1.0e-6}}
eval: {{batch_size: 4}}
runtime: {{compile: off, threads: 1}}
"""
STAGES = ("pretrain_fp32", "pretrain_quant", "search", "finetune")
STATE = ("networks", "optimizers", "scheduler", "multiplier", "epoch", "best_map", "metrics", "running")
STEPS = {"pretrain_fp32": 12, "pretrain_quant": 12, "search": 24, "finetune": 12}  # of all three epochs
LEAST_IN_SAVE = 10  # kills
STEPS_UNSAVED = 2.5  # about, where not every step is saved
# What a checkpoint of the search loses, each on its own.
LOSSES: dict[str, Callable[[dict[str, Any]], None]] = {
    "moments of the detector's optimizer": lambda state: state["optimizers"]["detector"].update(state={}),
    "moments of the policy's optimizer": lambda state: state["optimizers"]["policy"].update(state={}),
    "step of the scheduler": lambda state: state["scheduler"].update(last_epoch=0),
    "multiplier": lambda state: state.update(multiplier={"integral": 0.0, "excess": 0.0}),
    "average": lambda state: state["networks"].update(detector=state["networks"]["trained_detector"]),
    "sums of the epoch": lambda state: state["running"]["policy"].update(scalars={}),
    "step in the epoch": lambda state: state.update(running={}),
}


@dataclass(frozen=True)
class Kill:
    """A kill: in which pass over the data the last checkpoint was, and whether another was being written."""

    passing: str
    in_save: bool


def fingerprint(stage: Path) -> dict[str, str]:
    """sha256 of every part of what a stage has left."""
    found = {"metrics.jsonl": hashlib.sha256((stage / "metrics.jsonl").read_bytes()).hexdigest()}
    for name in ("last.pt", "best.pt"):
        if (stage / name).exists():
            state = load_checkpoint(stage / name)
            found |= {f"{name} {key}": sha256_of(state[key]) for key in STATE}
    return found


def sha256_of(value: Any) -> str:
    """That of nested plain values and tensors, their types and shapes included."""
    digest = hashlib.sha256()
    for path, leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{path}: {leaf.dtype} {list(leaf.shape)}".encode())
            digest.update(leaf.contiguous().numpy().tobytes())
        else:
            digest.update(f"{path}: {leaf!r}".encode())
    return digest.hexdigest()


def half_written(stage: Path) -> dict[str, int]:
    """When each checkpoint that is being written, or was when its process was killed, got its last bytes."""
    found = {}
    for name in ("last", "best"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = (stage / f".{name}.pt.tmp").stat().st_mtime_ns
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        yield path, len(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{path}/{key}")
    else:
        yield path, value


class Trainings:
    """The stages on a small data set in `folder`, each in processes of their own."""

    def __init__(self, folder: Path, *, seed: int = 0, pretrain_epochs: int = 3) -> None:
        self.folder, self.random, self.pretrain_epochs = folder, random.Random(seed), pretrain_epochs
        self.reference = folder / "undisturbed"
        self.seconds: dict[str, tuple[float, float]] = {}  # of an undisturbed stage: until its first save, and in all
        self._wait(self._process(make_data, folder / "shapes"))

    def undisturbed(self, stage: str) -> None:
        """Runs a stage to its end."""
        start = time.monotonic()
        process = self._start(stage, self.reference, workers=0)
        while process.is_alive() and not (self.reference / stage / "last.pt").exists():
            time.sleep(0.001)
        first_save = time.monotonic() - start
        self._wait(process)
        self.seconds[stage] = first_save, time.monotonic() - start

    def disturbed(self, stage: str, *, workers: int, kills: int, in_save: int) -> tuple[Path, list[Kill]]:
        """Runs a stage to its end, killed on the way, and returns its folder and where that was."""
        first_save, in_all = self.seconds[stage]
        pause = 1.5 * (in_all - first_save) / (kills + 1)
        while True:
            run, done = self._new_run(stage), []
            while len(done) < kills:
                before = half_written(run / stage)
                process = self._start(stage, run, workers)
                left, wanted = kills - len(done), in_save - sum(kill.in_save for kill in done)
                if self.random.random() < wanted / left:
                    is_due = self._in_save(process, run / stage, before, saves=self.random.randint(1, 3))
                else:
                    process.join(first_save + self.random.random() * pause)
                    is_due = process.is_alive()
                kill = self._kill(process, run / stage, before) if is_due else None
                if kill is None:
                    break
                done.append(kill)
            if len(done) == kills and sum(kill.in_save for kill in done) >= in_save:
                self._wait(self._start(stage, run, workers))
                return run / stage, done
            # It was at its end too early, or not caught while saving: again, from the beginning. The machine may have
            # become faster since it was measured.
            first_save, pause = 0.8 * first_save, pause / 2

    def half_a_search(self) -> Path:
        """A run whose search has ended in the middle of the policy's second epoch."""
        run = self._new_run("search")
        process = self._start("search", run, workers=0, function=train_half)
        process.join()
        assert load_checkpoint(run / "search" / "last.pt")["running"]["policy"]["steps"] == 2
        return run

    def search_with_loss(self, half: Path, lose: Callable[[dict[str, Any]], None]) -> Path:
        """Resumes half a search from its checkpoint, which `lose` has taken something from; returns its folder."""
        run = self._new_run("search")
        shutil.copytree(half / "search", run / "search")
        state = load_checkpoint(run / "search" / "last.pt")
        lose(state)
        save_checkpoint(run / "search" / "last.pt", state)
        self._wait(self._start("search", run, workers=0))
        return run / "search"

    @staticmethod
    def _in_save(process: BaseProcess, stage: Path, before: dict[str, int], saves: int) -> bool:
        """Waits until the `saves`-th checkpoint from now on is being written; False if the process ends before.

        `before`: `half_written` when it started.
        """
        was_saving = False
        while process.is_alive():
            is_saving = bool(half_written(stage).items() - before.items())
            saves -= is_saving and not was_saving
            if saves == 0:
                return True
            was_saving = is_saving
        return False

    @staticmethod
    def _kill(process: BaseProcess, stage: Path, before: dict[str, int]) -> Kill:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes of its loader
        process.join()
        in_save = bool(half_written(stage).items() - before.items())
        if not (stage / "last.pt").exists():
            return Kill("before the first checkpoint", in_save)
        running = load_checkpoint(stage / "last.pt")["running"]
        return Kill("detector" if "detector" in running else "policy" if running else "between epochs", in_save)

    def _new_run(self, stage: str) -> Path:
        """A run in which the stages before `stage` are complete."""
        run = Path(tempfile.mkdtemp(dir=self.folder))
        for earlier in STAGES[: STAGES.index(stage)]:
            shutil.copytree(self.reference / earlier, run / earlier)
        return run

    def _start(
        self, stage: str, run: Path, workers: int, function: Callable[[str, list[str]], None] | None = None
    ) -> BaseProcess:
        config = self.folder / f"workers_{workers}.yaml"
        if not config.exists():
            settings = {"root": self.folder / "shapes", "workers": workers, "pretrain_epochs": self.pretrain_epochs}
            config.write_text(CONFIG.format(**settings))
        words = ["--config", str(config), "--run", str(run), "--device", "cpu"]
        if workers:
            first_save, in_all = self.seconds[stage]
            seconds = STEPS_UNSAVED * (in_all - first_save) / STEPS[stage]
            words.append(f"--{stage}.save_minutes={seconds / 60}")
        return self._process(function or train, stage, words)

    def _process(self, function: Callable[..., None], *arguments: Any) -> BaseProcess:
        """A fresh process, forked from one that has imported torch but computed nothing."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["instaqnas.training.stages"])
        process = context.Process(target=in_group_of_its_own, args=(self.folder / "log.txt", function, *arguments))
        process.start()
        return process

    def _wait(self, process: BaseProcess) -> None:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"exit status {process.exitcode}: {(self.folder / 'log.txt').read_text()[-2000:]}")


def in_group_of_its_own(log: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function` as the leader of a process group, which can be killed with all its processes."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    function(*arguments)


def make_data(folder: Path) -> None:
    """The data set."""
    generate_shapes(folder, {"train": 16, "val": 4, "test": 4}, image_size=64, seed=3)


def train(stage: str, words: list[str]) -> None:
    """What the entry script of a stage does; of pretrain.py's two trainings only the one that is asked for."""
    command = parse_command(stage.partition("_")[0], words)
    if stage == "pretrain_fp32":
        stages.run_pretrain_fp32(command, stages.start(command, [PRETRAIN_FP32]))
    else:
        {"pretrain_quant": stages.run_pretrain, "search": stages.run_search, "finetune": stages.run_finetune}[stage](
            command
        )


def train_half(stage: str, words: list[str]) -> None:
    """As `train`, but ends after the checkpoint of the second step of the policy's second epoch."""

    def save_and_exit(run_dir: RunDir, state: dict[str, Any], **settings: Any) -> None:
        save(run_dir, state, **settings)
        if state["epoch"] == 1 and state["running"] and state["running"]["policy"]["steps"] == 2:
            os._exit(0)

    save, RunDir.save = RunDir.save, save_and_exit
    train(stage, words)


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Names of the parts in which two fingerprints differ."""
    return sorted(key for key in {**first, **second} if first.get(key) != second.get(key))


def say_where(killed: list[tuple[str, Kill]]) -> bool:
    """Says how many kills came where it matters; whether those are too few."""
    in_save = sum(kill.in_save for _, kill in killed)
    searching = Counter(kill.passing for stage, kill in killed if stage == "search")
    policy, detector = searching["policy"], searching["detector"]
    say(f"all: {in_save} in a save; in the search {policy} in an epoch of the policy, {detector} of the detector")
    return in_save < LEAST_IN_SAVE or policy == 0 or detector == 0


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """See the docstring of the file."""
    parser = argparse.ArgumentParser(description="Kill trainings at random moments, resume them, compare the results.")
    parser.add_argument("--kills", type=int, default=10, help="kills a stage and number of workers (10)")
    parser.add_argument("--in-save", type=int, default=3, help="of them, so many inside a save (3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of loader processes (0 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    failed, killed = False, []
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), seed=options.seed)
        for stage in STAGES:
            trainings.undisturbed(stage)
            expected = fingerprint(trainings.reference / stage)
            for workers in options.workers:
                left, kills = trainings.disturbed(stage, workers=workers, kills=options.kills, in_save=options.in_save)
                different = differing(expected, fingerprint(left))
                failed |= bool(different)
                killed += [(stage, kill) for kill in kills]
                where = ", ".join(f"{count} {name}" for name, count in Counter(kill.passing for kill in kills).items())
                saving = sum(kill.in_save for kill in kills)
                result = f"DIFFERENT: {', '.join(different)}" if different else "equal"
                say(f"{stage}, {workers} workers: {len(kills)} kills ({where}), {saving} in a save: {result}")
        failed |= say_where(killed)
        expected, half = fingerprint(trainings.reference / "search"), trainings.half_a_search()
        for name, lose in LOSSES.items():
            different = differing(expected, fingerprint(trainings.search_with_loss(half, lose)))
            failed |= not different
            say(f"search without {name}: {'noticed' if different else 'NOT NOTICED'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
