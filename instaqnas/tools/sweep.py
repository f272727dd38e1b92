"""mAP against cost at several targets and seeds: `python -m instaqnas.tools.sweep --config FILE --targets 1.75,1.85`.

RUN/seed0/                  pretraining, once for all targets, and the uniform rivals finetuned
RUN/seed0/target_1.85/      search with the reward `budget` at that total cost, finetuning, the static rival, comparison
RUN/.../logs/STEP.log       what a step printed
RUN/sweep.json, table.md, pareto.png

Every step is a process of its own: one of the stage scripts. The same command goes on where it was interrupted, within
a step too, and does nothing twice; targets and seeds can be added later. --report-only writes the three files from what
is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from instaqnas.config import Config, known_bits, parse_command, to_plain
from instaqnas.data.voc import read_class_names
from instaqnas.errors import InputError, TrainingError, exit_on_input_error
from instaqnas.quant.bitops import CostTable
from instaqnas.tools.profile import profile
from instaqnas.tools.sweep_report import SweepRun, format_table, read_runs, write_files
from instaqnas.training.rivals import fixed_stage
from instaqnas.training.run_dir import write_text

SCRIPTS = Path(__file__).resolve().parents[2]
WITHOUT_TARGET = ("--reward.name", "quality", "--search.start", "uniform")  # the target of the file may be out of reach
OWN_OPTIONS = ("--run", "--seed", "--bits", "--reward.name", "--reward.target_gbitops")
STAGE_OPTIONS = ("--init", "--restart")


@dataclass(frozen=True)
class Sweep:
    """What is asked for: the YAML file, the folder, total costs in GBitOps, seeds, and settings for all stages."""

    config: Path
    run: Path
    targets: tuple[float, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]

    def words(self, seed: int, target: float | None = None) -> list[str]:
        """Options of a stage script, but for its run; without a target those of what all targets share."""
        words = ["--config", str(self.config), *self.overrides, "--seed", str(seed)]
        own = WITHOUT_TARGET if target is None else ("--reward.name", "budget", "--reward.target_gbitops", str(target))
        return [*words, *own]

    def settings(self, seed: int, target: float | None = None) -> Config:
        """The resolved settings of a seed and target."""
        return parse_command("search", self.words(seed, target)).config

    def folder(self, seed: int, target: float | None = None) -> Path:
        """Where the stages of a seed write: what all targets share, or what belongs to one of them."""
        folder = self.run / f"seed{seed}"
        return folder if target is None else folder / f"target_{target:g}"


@dataclass(frozen=True)
class Step:
    """One call of a stage script.

    Args:
        name: what messages, the log and the record call it.
        script: of the four stages.
        folder: its run.
        words: its options beside the run.
        output: relative to the folder; it is there once the step has ended well.
    """

    name: str
    script: str
    folder: Path
    words: list[str]
    output: str

    @property
    def log(self) -> Path:
        """What it printed, this time and before."""
        return self.folder / "logs" / f"{self.name.replace(' ', '_').replace(':', '_')}.log"

    def run(self) -> None:
        """Runs it to its end.

        Raises: InputError where the script has refused its input, TrainingError where it has failed otherwise.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPTS / f"{self.script}.py"), *self.words, "--run", str(self.folder)]
        with self.log.open("ab") as file:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            kind = InputError if done.returncode == 2 else TrainingError
            last = lines[-1] if lines else "nothing printed"
            raise kind(f"{self.name} in {self.folder}: exit status {done.returncode} ({last}); all of it: {self.log}")


class Record:
    """The steps of one folder that have ended well, and with which settings: RUN/.../steps.json."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "steps.json"
        try:
            found = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: damaged; remove it, and finished stages will be looked at again")
        self.digests: dict[str, str] = found

    def has(self, step: Step, settings: Config) -> bool:
        """Whether the step has ended with these settings, and what it wrote is still there."""
        return self.digests.get(step.name) == _digest(settings) and (step.folder / step.output).exists()

    def add(self, step: Step, settings: Config) -> None:
        """Notes that the step has ended."""
        self.digests[step.name] = _digest(settings)
        self._write()

    def forget(self, steps: Sequence[Step]) -> None:
        """Notes that the steps have to run."""
        for step in steps:
            self.digests.pop(step.name, None)
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.digests, indent=1) + "\n")


def shared_steps(sweep: Sweep, seed: int) -> list[Step]:
    """Pretraining and the uniform rivals of a seed."""
    folder, words = sweep.folder(seed), sweep.words(seed)
    uniform = [bits for bits in known_bits("finetune", sweep.settings(seed).bits.choices) if bits.startswith("uniform")]
    return [
        Step("pretrain", "pretrain", folder, words, "pretrain_quant/last.pt"),
        *(_finetune(folder, words, bits) for bits in uniform),
    ]


def target_steps(sweep: Sweep, seed: int, target: float) -> list[Step]:
    """Search, finetuning, static rival and comparison of a seed and target."""
    folder, words = sweep.folder(seed, target), sweep.words(seed, target)
    return [
        Step("search", "search", folder, words, "search/last.pt"),
        Step("finetune", "finetune", folder, words, "finetune/last.pt"),
        _finetune(folder, words, "static"),
        Step("eval", "eval", folder, [*words, "--bits", "all"], "eval/report.json"),
    ]


def _finetune(folder: Path, words: Sequence[str], bits: str) -> Step:
    output = f"{fixed_stage(bits)}/last.pt"
    return Step(f"finetune {bits}", "finetune", folder, [*words, "--bits", bits], output)


def run_all(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Runs what has not ended yet.

    Raises: InputError and TrainingError, which name the step and its log.
    """
    for seed in sweep.seeds:
        shared = shared_steps(sweep, seed)
        of_targets = list(sweep.folder(seed).glob("target_*/steps.json"))
        _run_chain(shared, sweep.settings(seed), f"seed {seed}", say, built_on=of_targets)
        for target in sweep.targets:
            folder = sweep.folder(seed, target)
            folder.mkdir(exist_ok=True)
            for name in ("pretrain_fp32", *(Path(step.output).parent for step in shared)):
                _link(folder / name)
            where = f"seed {seed}, target {target:g}"
            _run_chain(target_steps(sweep, seed, target), sweep.settings(seed, target), where, say)


def _run_chain(
    steps: Sequence[Step],
    settings: Config,
    where: str,
    say: Callable[[str], None],
    *,
    built_on: Sequence[Path] = (),
) -> None:
    """Runs steps that build on each other: before one that has to run, all that builds on it is forgotten to be done.

    So it is run again, even if the sweep ends in between. `built_on` are the records of other folders that do, too.
    """
    steps[0].folder.mkdir(parents=True, exist_ok=True)
    record = Record(steps[0].folder)
    for number, step in enumerate(steps):
        if record.has(step, settings):
            say(f"{where}: {step.name} is done")
            continue
        for path in built_on:
            path.unlink(missing_ok=True)
        record.forget(steps[number:])
        say(f"{where}: {step.name}, see {step.log}")
        start = time.monotonic()
        step.run()
        record.add(step, settings)
        say(f"{where}: {step.name} took {time.monotonic() - start:.0f} s")


def _link(link: Path) -> None:
    """Makes a stage of the folder above one of this folder, unless it has its own."""
    if not link.is_symlink() and not link.exists():
        link.symlink_to(Path("..") / link.name, target_is_directory=True)


def _digest(settings: Config) -> str:
    return hashlib.sha256(json.dumps(to_plain(settings), sort_keys=True).encode()).hexdigest()


# --- The command line -------------------------------------------------------------------------------------------------


def parse_sweep(arguments: Sequence[str] | None) -> tuple[Sweep, bool]:
    """The sweep that the command line asks for, and whether it asks for the report only.

    Raises: InputError for bad numbers, numbers twice, bad settings, and options that belong to the sweep.
    """
    parser = _Parser(
        prog="python -m instaqnas.tools.sweep",
        description="Run or resume searches at several total costs and seeds, with fixed rivals finetuned as long, and "
        "write table and plot of mAP against GBitOps.",
        epilog="Settings can be overridden for all stages, such as --search.epochs 3.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the experiment (required)")
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="what it writes (default: runs/<name of FILE>_sweep)"
    )
    parser.add_argument("--targets", default="", metavar="A,B,C", help="mean GBitOps of detector and policy (required)")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds of everything random (default: 0,1,2)")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    options, overrides = parser.parse_known_args(arguments)
    for word in overrides:
        option = word.partition("=")[0]
        if option in OWN_OPTIONS:
            raise InputError(f"{option}: the sweep sets it itself")
        if option in STAGE_OPTIONS:
            raise InputError(
                f"{option}: not for all stages of a sweep; give it to one, such as search.py, with its --run"
            )
    if options.config is None:
        raise InputError("--config FILE is missing")
    run = options.run or Path("runs") / f"{options.config.stem}_sweep"
    targets = tuple(_numbers("--targets", options.targets, float))
    seeds = tuple(_numbers("--seeds", options.seeds, int))
    sweep = Sweep(options.config, run, targets, seeds, tuple(overrides))
    for seed in seeds:
        for target in targets:
            sweep.settings(seed, target)
    return sweep, options.report_only


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _numbers(option: str, text: str, kind: type) -> Iterator[float]:
    """The numbers of a list such as 1.7,1.8, none of them twice."""
    seen = set()
    for word in text.split(","):
        try:
            number = kind(word)
        except ValueError:
            raise InputError(f"{option}: expected numbers such as 1,2, got {text!r}") from None
        name = f"{number:g}"
        if name in seen:
            raise InputError(f"{option}: {name} is there twice")
        seen.add(name)
        yield number


def check_targets(sweep: Sweep) -> None:
    """Raises InputError for a target that no bit configuration can have with its policy."""
    config = sweep.settings(sweep.seeds[0], sweep.targets[0])
    found = profile(config, read_class_names(config.data.roots))
    costs, policy_cost = CostTable(found.layers, found.positions), found.plain()["policy"]["gbitops"]
    lowest, highest = costs.lowest() + policy_cost, costs.highest() + policy_cost
    for target in sweep.targets:
        if not lowest <= target <= highest:
            raise InputError(
                f"--targets: expected {lowest:.4g} to {highest:.4g} GBitOps, what the configurations of this network "
                f"cost with its policy, got {target:g}"
            )


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing and reports."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the running stage ends too
    with exit_on_input_error():
        sweep, report_only = parse_sweep(arguments)
        if not report_only:
            check_targets(sweep)
            run_all(sweep, lambda line: print(line, flush=True))
        wanted = [
            SweepRun(seed, target, sweep.folder(seed, target)) for target in sweep.targets for seed in sweep.seeds
        ]
        runs, missing = read_runs(wanted)
        for run in missing:
            print(f"missing: seed {run.seed}, target {run.target:g} ({run.report})")
        if not runs:
            raise InputError(f"{sweep.run}: nothing to report yet")
        write_files(sweep.run, runs, missing)
        print(format_table(runs))
        print(f"written: {', '.join(str(sweep.run / name) for name in ('sweep.json', 'table.md', 'pareto.png'))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it was\n")
        sys.exit(130)
