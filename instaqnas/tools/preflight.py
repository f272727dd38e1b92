"""Checks before a long training: `python -m instaqnas.tools.preflight --config FILE [--run runs/NAME]`.

Data: every annotation and every image header of the splits in use. Disk: what the checkpoints will take. Then each
stage runs as it will, but for two epochs on a few images, in a temporary run and a process of its own: what fails there
would fail later, the most memory it takes is that of the stage, and the second epoch tells how long all will take.

The times are those of this machine with nothing else to do, and of one process. What a search does before its first
epoch (`search.start`) is timed on the few images too, and takes longer on all. The memory is that of the process that
trains; those that read images for it are not in it. Exit status 2 if a stage would fail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config import Command, Config, TrainConfig, parse_command
from instaqnas.data.loader import DetectionLoader
from instaqnas.data.voc import Annotation, SplitCheck, check_split, read_class_names
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.errors import InputError, TrainingError, exit_on_input_error
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.policy.network import PolicyNet
from instaqnas.training.checks import GB, STAGES, check_disk, check_target, existing_parent, splits_of
from instaqnas.training.evaluate import EvalReport
from instaqnas.training.experiment import CACHED_SIDE, Experiment
from instaqnas.training.run_dir import best_checkpoint
from instaqnas.training.stages import BuildExperiment, run_eval, run_finetune, run_pretrain, run_search

log = logging.getLogger(__name__)
EPOCHS = 2  # the first compiles, allocates and starts the workers
STEPS, POLICY_STEPS, EVAL_STEPS = 8, 4, 3  # at least, in each of the epochs
MOST_NAMED = 10  # objects without area
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


# --- What is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageFigures:
    """One stage: its most memory in bytes, and its time in seconds, all of it and by its parts.

    `epoch_seconds` is one pass over the training split, in the search that of policy and detector where it trains both;
    `evaluation_seconds` one over the val split, in eval over the test split; `startup_seconds` come once, and so do
    `batch_norm_seconds`, for the last statistics of BatchNorm.
    """

    stage: str
    memory_bytes: int
    startup_seconds: float
    epochs: int
    epoch_seconds: float
    evaluations: int
    evaluation_seconds: float
    saves: int
    save_seconds: float
    batch_norm_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return (
            self.startup_seconds
            + self.epochs * self.epoch_seconds
            + self.evaluations * self.evaluation_seconds
            + self.saves * self.save_seconds
            + self.batch_norm_seconds
        )


@dataclass(frozen=True)
class Forward:
    """The beginning of one forward pass: when, in seconds, and of how many images."""

    start: float
    images: int


def seconds_per_image(passes: Sequence[Forward], burst: int) -> float:
    """How long an image takes in a loop of forward passes, all that is done between them included.

    `burst`: how many passes the batches give that arrive together, as those do that a loader's workers decode at once;
    what is counted is a multiple of it.
    """
    steps = len(passes) - 1
    if steps > burst:
        steps -= steps % burst
    return (passes[steps].start - passes[0].start) / sum(forward.images for forward in passes[:steps])


def steps_for(least: int, workers: int) -> int:
    """Forward passes that `seconds_per_image` needs, `least` or more: two whole bursts of the workers and one more."""
    return 1 + max(2, math.ceil((least - 1) / workers)) * workers if workers else least


def used_images(images: int, batch_size: int) -> int:
    """Images of a training epoch: those that fill batches."""
    return images - images % batch_size if images >= batch_size else images


def due(epochs: int, every: int) -> int:
    """How many of the epochs end with something that comes after `every` so many of them, and after the last."""
    return math.ceil(epochs / every)


def saves_of(settings: TrainConfig, epoch_seconds: float) -> int:
    """How many checkpoints a stage writes: those after epochs, and those between them that `save_minutes` asks for."""
    saves = due(settings.epochs, settings.save_every)
    if not settings.save_minutes:
        return saves
    return saves * (1 + int(settings.save_every * epoch_seconds / 60 / settings.save_minutes))


# --- A stage on few images --------------------------------------------------------------------------------------------


class Measured(Exception):
    """Ends a script after its first stage."""


class ShortExperiment(Experiment):
    """An experiment on a few images, whose networks note when they run.

    Args:
        config: the whole config, as the stage would have it.
        stage: the stage that is measured.
        workers: processes of a loader.
    """

    def __init__(self, config: Config, stage: str, workers: int) -> None:
        super().__init__(config)
        self.stage, self.workers = stage, workers
        self.images: dict[tuple[str, ...], int] = {}  # of whole splits, by (*roots, split)
        self.passes: dict[str, list[Forward]] = {"detector": [], "policy": [], "evaluation": [], "batch_norm": []}
        self.evaluating = False

    def annotations(self, roots: Sequence[str], split: str) -> list[Annotation]:
        """Evenly spaced ones of a split."""
        whole = super().annotations(roots, split)
        self.images[(*roots, split)] = len(whole)
        wanted = self._wanted(training=self.stage != "eval" and split == self.config.data.train_split)
        return whole[:: max(1, len(whole) // wanted)][:wanted]

    def images_of(self, split: str) -> int:
        """Images of the whole split that the stage trains or evaluates on; 0 where it has none."""
        data = self.config.data
        roots = data.test_roots or data.roots if self.stage == "eval" else data.roots
        return self.images.get((*roots, split), 0)

    def training_images(self, network: str) -> int:
        """Images of the whole train split that the `detector` is trained on, or the `policy` learns from."""
        images, share = self.images_of(self.config.data.train_split), self.config.data.policy_share
        held_out = round(share * images)
        return images - held_out if network == "detector" or not share else held_out

    def _wanted(self, *, training: bool) -> int:
        """Images from which the times of a split can be told."""
        config = self.config
        if not training:
            return config.eval.batch_size * steps_for(EVAL_STEPS, self.workers)
        detector = getattr(config, self.stage).batch_size * steps_for(STEPS, self.workers)
        policy = config.search.policy_batch_size * steps_for(POLICY_STEPS, self.workers)
        share = config.data.policy_share
        if share:  # every stage sees to it that both parts have their batches
            return 1 + math.ceil(max(detector / (1 - share), policy / share))
        return max(detector, policy) if self.stage == "search" else detector

    def detector(self, bits: DetectorBits) -> SwitchableSSD:
        """The detector, which notes when it trains or evaluates."""
        return self._noting(super().detector(bits), "detector")

    def quantized_detector(self) -> SwitchableSSD:
        """The quantized detector. The script that asks for it when the first stage has trained begins the second."""
        if self.stage == "pretrain_fp32" and self.passes["detector"]:
            raise Measured
        return super().quantized_detector()

    def policy(self) -> PolicyNet:
        """The policy, which notes when it trains."""
        return self._noting(super().policy(), "policy")

    def evaluate(
        self, detector: SwitchableSSD, loader: DetectionLoader, choose_bits: ChooseBits, policy_cost: float = 0.0
    ) -> EvalReport:
        """Figures of a detector on a few images."""
        self.evaluating = True
        try:
            return super().evaluate(detector, loader, choose_bits, policy_cost)
        finally:
            self.evaluating = False
            self.passes["evaluation"].append(Forward(self._now(), 0))

    def _noting(self, network: nn.Module, name: str) -> nn.Module:
        def note(module: nn.Module, args: tuple) -> None:
            images = args[0]
            if module.training and torch.is_grad_enabled():
                self.passes[name].append(Forward(self._now(), len(images)))
            elif module.training and self._after_training(name):  # before, it was calibrated
                self.passes["batch_norm"].append(Forward(self._now(), len(images)))
            elif self.evaluating and name == "detector" and images.dtype == torch.uint8:  # not to measure its cost
                self.passes["evaluation"].append(Forward(self._now(), len(images)))

        network.register_forward_pre_hook(note)
        return network

    def _after_training(self, network: str) -> bool:
        """Whether the detector or the policy has been trained, or is not to be."""
        untrained = self.stage == "search" and network == "detector" and not self.config.search.train_detector
        return untrained or bool(self.passes[network])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure_stage(config: Config, run: Path, stage: str, workers: int) -> StageFigures:
    """Runs a stage on few images; for a process that has computed nothing yet.

    Args:
        config: the whole config.
        run: folder of the temporary run, with the stages before.
        workers: processes of a loader.

    Raises: InputError and TrainingError as the stage itself, and InputError if memory does not suffice.
    """
    # The loaders shall start their workers as in a training; a process of a pool would hand its own way down.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    built: list[ShortExperiment] = []

    def build(short: Config) -> ShortExperiment:
        built.append(ShortExperiment(short, stage, workers))
        return built[0]

    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            _run(Command(short_config(config), run), stage, build)
        except Measured:
            pass
        except (RuntimeError, MemoryError) as error:
            if not _is_for_want_of_memory(error):
                raise
            first_line = str(error).partition("\n")[0]
            raise InputError(f"there is too little memory ({first_line})") from None
    return _figures(config, run, built[0], start)


def _is_for_want_of_memory(error: Exception) -> bool:
    # On a CPU torch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def short_config(config: Config) -> Config:
    """`config` with two epochs a stage, and one checkpoint."""

    def shortened(section: TrainConfig) -> TrainConfig:
        changes = {"epochs": EPOCHS, "eval_every": EPOCHS, "save_every": EPOCHS, "keep_checkpoints": 0}
        return replace(section, **changes, warmup_epochs=min(EPOCHS, section.warmup_epochs))

    return replace(config, **{stage: shortened(getattr(config, stage)) for stage in STAGES[:-1]})


def _run(command: Command, stage: str, build: BuildExperiment) -> None:
    if stage == "pretrain_quant":
        command = replace(command, init=best_checkpoint(command.run, "pretrain_fp32"))
    scripts = {"pretrain_fp32": run_pretrain, "pretrain_quant": run_pretrain, "search": run_search}
    scripts |= {"finetune": run_finetune, "eval": run_eval}
    scripts[stage](command, build)


def _figures(config: Config, run: Path, experiment: ShortExperiment, start: float) -> StageFigures:
    data, stage = config.data, experiment.stage
    memory = _peak_memory(experiment.device) + _uncached_bytes(experiment)
    evaluation = experiment.passes["evaluation"]
    burst = max(1, experiment.workers)
    per_image = seconds_per_image(evaluation, burst) if evaluation else 0.0
    if stage == "eval":
        return StageFigures(
            stage,
            memory,
            startup_seconds=evaluation[0].start - start,
            epochs=0,
            epoch_seconds=0.0,
            evaluations=1,
            evaluation_seconds=per_image * experiment.images_of(data.test_split),
            saves=0,
            save_seconds=0.0,
        )
    settings = getattr(config, stage)
    batch_sizes = {"detector": settings.batch_size} if stage != "search" or settings.train_detector else {}
    if stage == "search":
        batch_sizes["policy"] = settings.policy_batch_size
    epoch_seconds, begun, warm_up = 0.0, math.inf, 0.0
    for name, batch_size in batch_sizes.items():
        passes = experiment.passes[name]
        second = passes[len(passes) // EPOCHS :]  # that of the second epoch
        parts = settings.accumulate if name == "detector" else 1
        pace = seconds_per_image(second if len(second) > 1 else passes, burst * parts)
        epoch_seconds += pace * used_images(experiment.training_images(name), batch_size)
        begun = min(begun, second[0].start)
        warm_up += pace * sum(forward.images for forward in passes[: len(passes) // EPOCHS])
    return StageFigures(
        stage,
        memory,
        startup_seconds=max(0.0, begun - start - warm_up),
        epochs=settings.epochs,
        epoch_seconds=epoch_seconds,
        evaluations=due(settings.epochs, settings.eval_every) if data.val_split else 0,
        evaluation_seconds=per_image * experiment.images_of(data.val_split),
        saves=saves_of(settings, epoch_seconds),
        save_seconds=_seconds_of_a_save(run / stage / "last.pt"),
        batch_norm_seconds=_batch_norm_seconds(experiment, settings),
    )


def _batch_norm_seconds(experiment: ShortExperiment, settings: TrainConfig) -> float:
    """Seconds of the passes that BatchNorm's last statistics come from; 0 where there are none, or a single one."""
    passes = experiment.passes["batch_norm"]
    if len(passes) < 2:
        return 0.0
    images = used_images(experiment.images_of(experiment.config.data.train_split), settings.batch_size)
    images = min(images, settings.batch_norm_batches * settings.batch_size)
    return images * seconds_per_image(passes, max(1, experiment.workers))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # Not resource.getrusage: its maximum starts from that of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _uncached_bytes(experiment: ShortExperiment) -> int:
    """Bytes of the training images that `data.cache` would hold beyond the few that were measured with."""
    data = experiment.config.data
    if data.cache != "ram" or experiment.stage == "eval" or experiment.device.type == "cuda":
        return 0
    whole = Experiment.annotations(experiment, data.roots, data.train_split)
    few = experiment.annotations(data.roots, data.train_split)
    side = CACHED_SIDE * experiment.config.detector.image_size
    sizes = [
        sum(int(3 * a.width * a.height * min(1.0, side / min(a.width, a.height)) ** 2) for a in annotations)
        for annotations in (whole, few)
    ]
    return sizes[0] - sizes[1]


def _seconds_of_a_save(checkpoint: Path) -> float:
    state, copy = load_checkpoint(checkpoint), checkpoint.with_name("copy.pt")
    start = time.perf_counter()
    save_checkpoint(copy, state)
    seconds = time.perf_counter() - start
    copy.unlink()
    return seconds


# --- All checks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preflight:
    """What was found: (split, what it holds) of the data, GB of disk, the stages, and problems, one line each."""

    data: list[tuple[str, SplitCheck]]
    disk_needed_gb: float
    disk_free_gb: float
    stages: list[StageFigures]
    problems: list[str]

    def plain(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "data": [{"split": split, **asdict(held)} for split, held in self.data],
            "disk": {"needed_gb": self.disk_needed_gb, "free_gb": self.disk_free_gb},
            "stages": [{**asdict(figures), "seconds": figures.seconds} for figures in self.stages],
            "problems": self.problems,
        }


def preflight(command: Command, *, quick: bool = False) -> Preflight:
    """All checks of an experiment; `quick` leaves out what is measured. Nothing is measured after a problem."""
    config = command.config
    data, problems = _check_data(config)
    needed = free = 0
    stages: list[StageFigures] = []
    if not problems:
        experiment = Experiment(config)
        try:
            needed, free = check_disk(experiment, command.run, STAGES)
            check_target(experiment)
        except InputError as error:
            problems.append(str(error))
    if not problems and not quick:
        workers = experiment.test_loader().num_workers
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=existing_parent(command.run)) as folder:
            for stage in STAGES:
                log.info("measuring %s", stage)
                try:
                    stages.append(_in_fresh_process(partial(measure_stage, config, Path(folder), stage, workers)))
                except (InputError, TrainingError, OSError) as error:
                    problems.append(f"{stage}: {error}")  # the stages after it would have nothing to start from
                    break
        problems += _too_large(stages, experiment.device)
    return Preflight(data, needed / GB, free / GB, stages, problems)


def _check_data(config: Config) -> tuple[list[tuple[str, SplitCheck]], list[str]]:
    try:
        class_names = read_class_names(config.data.roots)
    except InputError as error:
        return [], [str(error)]
    log.info("reading annotations and image headers")
    data = [(split, check_split(roots, split, class_names)) for roots, split in splits_of(config, STAGES)]
    return data, [problem for _, held in data for problem in held.problems]


def _in_fresh_process(measure: partial[StageFigures]) -> StageFigures:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["instaqnas.training.stages"])  # the imports that take long
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure).result()
        except BrokenExecutor:
            raise InputError("was killed, probably for want of memory") from None


def _memory_there(device: torch.device) -> int:
    """Bytes of memory: what is free on a GPU; what this process may have of that of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return machine if limit == "max" else min(machine, int(limit))


def _too_large(stages: Sequence[StageFigures], device: torch.device) -> list[str]:
    there = _memory_there(device)
    return [
        f"{figures.stage}: needs {figures.memory_bytes / GB:.1f} GB of memory, there are {there / GB:.1f} GB"
        for figures in stages
        if figures.memory_bytes > there
    ]


def format_report(result: Preflight) -> str:
    """Lines for the terminal, the problems left out."""
    lines = []
    for split, held in result.data:
        lines.append(f"{split}: {held.images:,} images, {held.objects:,} objects")
        if held.without_area:
            named = ", ".join(held.without_area[:MOST_NAMED]) + (", ..." if len(held.without_area) > MOST_NAMED else "")
            lines.append(f"{split}: dropped boxes without area: {len(held.without_area)} ({named})")
    if result.disk_free_gb:  # else a problem came first
        lines.append(f"disk: {result.disk_needed_gb:.2f} GB for checkpoints, {result.disk_free_gb:.2f} GB are free")
    if result.stages:
        lines.append(f"{'stage':<16}{'memory GB':>10}{'epochs':>8}{'s an epoch':>12}{'time':>20}")
    for figures in result.stages:
        numbers = f"{figures.memory_bytes / GB:>10.2f}{figures.epochs:>8}{figures.epoch_seconds:>12.1f}"
        lines.append(f"{figures.stage:<16}{numbers}{_time(figures.seconds):>20}")
    if len(result.stages) == len(STAGES):
        lines.append(f"{'all':<46}{_time(sum(figures.seconds for figures in result.stages)):>20}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def main(arguments: list[str] | None = None) -> None:
    """Prints what was found, problems last; exit status 2 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.preflight",
        description="Check data, disk, memory and time of all stages of an experiment.",
        epilog="Settings can be overridden, such as --search.batch_size 16.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--quick", action="store_true", help="data and disk only, nothing is run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    run = ["--run", options.run] if options.run else []
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_on_input_error():
        result = preflight(parse_command("eval", ["--config", options.config, *run, *overrides]), quick=options.quick)
    print(json.dumps(result.plain(), indent=1) if options.json else format_report(result))
    for problem in result.problems:
        sys.stderr.write(f"problem: {problem}\n")
    if result.problems:
        sys.exit(2)


if __name__ == "__main__":
    main()
