"""mAP against cost at several targets and seeds: `python -m instaqnas.tools.sweep --config FILE --targets 1.75,1.85`.

RUN/seed0/                  pretraining, once for all targets, and the finetuned uniform baselines
RUN/seed0/target_1.85/      search with the reward `budget` at that total cost, finetuning, static baseline, comparison
RUN/.../logs/STEP.log       output of a step
RUN/sweep.json, table.md, pareto.png

Every step runs one of the stage scripts in a process of its own. Repeating the command continues an interrupted sweep,
within a step too, and skips finished steps; targets and seeds can be added later. --report-only writes the three files
from the finished runs.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from instaqnas.bits import STATIC, uniform_name
from instaqnas.config.command import ALL_ROWS, OneLineParser, parse_command
from instaqnas.config.reading import to_plain
from instaqnas.config.settings import Config
from instaqnas.data.voc import read_class_names
from instaqnas.errors import InputError, TrainingError, exit_on_input_error
from instaqnas.evaluation.report import REPORT_FILE
from instaqnas.experiment.handover import LAST_FILE
from instaqnas.experiment.stage import EVAL, FINETUNE, PRETRAIN_FP32, PRETRAIN_QUANT, SEARCH, Stage, fixed_stage
from instaqnas.files import write_text
from instaqnas.quant.bitops import CostTable
from instaqnas.tools.profile import profile
from instaqnas.tools.sweep_report import SweepRun, markdown_table, read_runs, write_files

SCRIPTS = Path(__file__).resolve().parents[2]
WITHOUT_TARGET = ("--reward.name", "quality", "--search.start", "uniform")  # the file's own target may be out of range
OWN_OPTIONS = ("--run", "--seed", "--bits", "--reward.name", "--reward.target_gbitops")
STAGE_OPTIONS = ("--init", "--restart")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Sweep:
    """The YAML file, the folder to write, total costs in GBitOps, seeds, and overridden settings for all stages."""

    config: Path
    run: Path
    targets: tuple[float, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]

    def words(self, seed: int, target: float | None = None) -> list[str]:
        """Options of a stage script except `--run`; without a target, of the stages that all targets share."""
        words = ["--config", str(self.config), *self.overrides, "--seed", str(seed)]
        if target is None:
            return [*words, *WITHOUT_TARGET]
        return [*words, "--reward.name", "budget", "--reward.target_gbitops", str(target)]

    def settings(self, seed: int, target: float | None = None) -> Config:
        """The resolved settings of a seed and target."""
        return parse_command("search", self.words(seed, target)).config

    def folder(self, seed: int, target: float | None = None) -> Path:
        """Folder of the stages of a seed: of those that all targets share, or of one target."""
        folder = self.run / f"seed{seed}"
        return folder if target is None else folder / f"target_{target:g}"


@dataclass(frozen=True)
class SweepStep:
    """One call of a stage script.

    Args:
        name: name in messages, of its log and in steps.json.
        script: such as search.py.
        folder: its `--run`.
        words: its other options.
        output: file, relative to the folder, that exists once the step has succeeded.
    """

    name: str
    script: str
    folder: Path
    words: list[str]
    output: str

    @property
    def log(self) -> Path:
        """Output of this call and of those before."""
        return self.folder / "logs" / f"{self.name.replace(' ', '_').replace(':', '_')}.log"

    def run(self) -> None:
        """Runs the script to its end.

        Raises: InputError if the script refuses its input (exit status 2), TrainingError if it fails otherwise.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPTS / self.script), *self.words, "--run", str(self.folder)]
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
            raise kind(f"{self.name} in {self.folder}: exit status {done.returncode} ({last}); full log: {self.log}")


class FinishedSteps:
    """The steps of one folder that have succeeded, each with a digest of its settings: RUN/.../steps.json.

    Raises: InputError if the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "steps.json"
        try:
            found = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: damaged; remove it, and all its steps will be checked again")
        self.digests: dict[str, str] = found

    def has(self, step: SweepStep, settings: Config) -> bool:
        """Whether the step has succeeded with these settings and its output still exists."""
        return self.digests.get(step.name) == _settings_digest(settings) and (step.folder / step.output).exists()

    def add(self, step: SweepStep, settings: Config) -> None:
        """Records that the step has succeeded."""
        self.digests[step.name] = _settings_digest(settings)
        self._write()

    def forget(self, steps: Sequence[SweepStep]) -> None:
        """Records that the steps have to run."""
        for step in steps:
            self.digests.pop(step.name, None)
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.digests, indent=1) + "\n")


def shared_steps(sweep: Sweep, seed: int) -> list[SweepStep]:
    """Pretraining and the uniform baselines of a seed."""
    folder, words = sweep.folder(seed), sweep.words(seed)
    return [
        SweepStep("pretrain", PRETRAIN_QUANT.script, folder, words, _last(PRETRAIN_QUANT)),
        *(_finetune(folder, words, uniform_name(name)) for name in sweep.settings(seed).bits.names),
    ]


def target_steps(sweep: Sweep, seed: int, target: float) -> list[SweepStep]:
    """Search, finetuning, static baseline and comparison of a seed and target."""
    folder, words = sweep.folder(seed, target), sweep.words(seed, target)
    return [
        SweepStep(SEARCH.name, SEARCH.script, folder, words, _last(SEARCH)),
        SweepStep(FINETUNE.name, FINETUNE.script, folder, words, _last(FINETUNE)),
        _finetune(folder, words, STATIC),
        SweepStep(EVAL.name, EVAL.script, folder, [*words, "--bits", ALL_ROWS], f"{EVAL.name}/{REPORT_FILE}"),
    ]


def _finetune(folder: Path, words: Sequence[str], bits: str) -> SweepStep:
    stage = fixed_stage(bits)
    return SweepStep(f"{stage.section} {bits}", stage.script, folder, [*words, "--bits", bits], _last(stage))


def _last(stage: Stage) -> str:
    return f"{stage.name}/{LAST_FILE}"


def run_all(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Runs all steps that have not succeeded yet; `say` gets a line of progress at a time.

    Raises: InputError and TrainingError, which name the step and its log.
    """
    for seed in sweep.seeds:
        shared = shared_steps(sweep, seed)
        dependents = list(sweep.folder(seed).glob("target_*/steps.json"))
        _run_chain(shared, sweep.settings(seed), f"seed {seed}", say, dependents=dependents)
        for target in sweep.targets:
            folder = sweep.folder(seed, target)
            folder.mkdir(exist_ok=True)
            _link(folder / PRETRAIN_FP32.name)
            for step in shared:
                _link(folder / Path(step.output).parent)
            where = f"seed {seed}, target {target:g}"
            _run_chain(target_steps(sweep, seed, target), sweep.settings(seed, target), where, say)


def _run_chain(
    steps: Sequence[SweepStep],
    settings: Config,
    where: str,
    say: Callable[[str], None],
    *,
    dependents: Sequence[Path] = (),
) -> None:
    """Runs steps of one folder, each of which depends on the steps before it.

    Args:
        where: prefix of the lines of progress.
        dependents: steps.json of other folders whose steps depend on these.
    """
    steps[0].folder.mkdir(parents=True, exist_ok=True)
    finished = FinishedSteps(steps[0].folder)
    for number, step in enumerate(steps):
        if finished.has(step, settings):
            say(f"{where}: {step.name} is done")
            continue
        # Everything that depends on the step is forgotten before it runs: it then runs again even if the sweep is
        # interrupted in between.
        for path in dependents:
            path.unlink(missing_ok=True)
        finished.forget(steps[number:])
        say(f"{where}: {step.name}, see {step.log}")
        start = time.monotonic()
        step.run()
        finished.add(step, settings)
        say(f"{where}: {step.name} took {time.monotonic() - start:.0f} s")


def _link(link: Path) -> None:
    """Links to the stage of the same name in the folder above, unless this folder has its own."""
    if not link.is_symlink() and not link.exists():
        link.symlink_to(Path("..") / link.name, target_is_directory=True)


def _settings_digest(settings: Config) -> str:
    return hashlib.sha256(json.dumps(to_plain(settings), sort_keys=True).encode()).hexdigest()


# --- The command line -------------------------------------------------------------------------------------------------


def parse_sweep(arguments: Sequence[str] | None) -> tuple[Sweep, bool]:
    """The sweep of a command line, and whether only the report is wanted.

    Raises: InputError for a value that is no number or occurs twice, a bad setting, and an option that the sweep sets.
    """
    parser = OneLineParser(
        prog="python -m instaqnas.tools.sweep",
        description="Run or resume searches at several total costs and seeds, with fixed baselines finetuned as long, "
        "and write table and plot of mAP against GBitOps.",
        epilog="Settings can be overridden for all stages, such as --search.epochs 3.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the experiment (required)")
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="folder to write (default: runs/<name of FILE>_sweep)"
    )
    parser.add_argument("--targets", default="", metavar="A,B,C", help="mean GBitOps of detector and policy (required)")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="random seeds (default: 0,1,2)")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report the finished runs")
    options, overrides = parser.parse_known_args(arguments)
    for word in overrides:
        option = word.partition("=")[0]
        if option in OWN_OPTIONS:
            raise InputError(f"{option}: set by the sweep itself")
        if option in STAGE_OPTIONS:
            raise InputError(
                f"{option}: does not apply to a sweep; pass it to one stage's script, such as search.py, with its --run"
            )
    if options.config is None:
        raise InputError("--config FILE is missing")
    run = options.run or Path("runs") / f"{options.config.stem}_sweep"
    targets = tuple(_numbers("--targets", options.targets, float, "g"))
    seeds = tuple(_numbers("--seeds", options.seeds, int, "d"))
    sweep = Sweep(options.config, run, targets, seeds, tuple(overrides))
    for seed in seeds:
        for target in targets:
            sweep.settings(seed, target)
    return sweep, options.report_only


def _numbers(option: str, text: str, parse: Callable[[str], Number], form: str) -> list[Number]:
    """The numbers of a list such as 1.7,1.8; no two may have the same text in `form`, which names folders."""
    numbers: dict[str, Number] = {}
    for word in text.split(","):
        try:
            number = parse(word)
        except ValueError:
            raise InputError(f"{option}: expected numbers such as 1,2, got {text!r}") from None
        name = format(number, form)
        if name in numbers:
            raise InputError(f"{option}: {name} occurs twice")
        numbers[name] = number
    return list(numbers.values())


def check_targets(sweep: Sweep) -> None:
    """Raises InputError for a target outside the costs of all bit configurations, policy included."""
    config = sweep.settings(sweep.seeds[0], sweep.targets[0])
    found = profile(config, read_class_names(config.data.roots))
    costs, policy_cost = CostTable(found.layers, found.positions), found.plain()["policy"]["gbitops"]
    lowest, highest = costs.lowest() + policy_cost, costs.highest() + policy_cost
    for target in sweep.targets:
        if not lowest <= target <= highest:
            raise InputError(
                f"--targets: expected {lowest:.4g} to {highest:.4g} GBitOps, the range of the network's configurations "
                f"with the policy, got {target:g}"
            )


def main(arguments: list[str] | None = None) -> None:
    """Runs the missing steps and writes the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that subprocess.run ends the stage
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
        print(markdown_table(runs))
        print(f"written: {', '.join(str(sweep.run / name) for name in ('sweep.json', 'table.md', 'pareto.png'))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        sys.exit(130)
