"""Checks before a long training: `python -m instaqnas.tools.preflight --config FILE [--run runs/NAME]`.

Data: every annotation and every image header of the splits in use, what a training sees of the objects, and how the
default boxes fit them. Disk: the size of all checkpoints. Then each stage
runs for two epochs on a few images, in a temporary run and a process of its own: an error in it would come later
anyway, its peak memory is that of the stage, and its second epoch tells how long the whole stage takes.

Times hold for this machine with nothing else to do, and for one process. The work of a search before its first epoch
(`search.start`) is timed on the few images, and takes longer on all. Memory is that of the process that trains, without
the processes that read images for it. Exit status 2 if a stage would fail.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from instaqnas.config.command import Command, parse_command
from instaqnas.config.settings import Config
from instaqnas.data.voc import SplitCheck, check_split, read_class_names
from instaqnas.errors import InputError, TrainingError, exit_on_input_error
from instaqnas.experiment.checks import check_batches, check_disk, check_target, splits_of
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import RUN_STAGES, TRAINING_STAGES
from instaqnas.files import GB, existing_parent
from instaqnas.tools.data_report import DataReport, data_report, format_data_report
from instaqnas.tools.processes import in_fresh_process
from instaqnas.tools.stage_figures import StageFigures, measure_stage

MOST_NAMED = 10  # objects without area
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preflight:
    """Findings: content of each split, GB of disk, time and memory of the stages, and problems, one line each.

    `objects` is None if a problem came first.
    """

    data: list[tuple[str, SplitCheck]]
    objects: DataReport | None
    disk_needed_gb: float
    disk_free_gb: float
    stages: list[StageFigures]
    problems: list[str]

    def plain(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "data": [{"split": split, **asdict(held)} for split, held in self.data],
            "objects": self.objects and self.objects.plain(),
            "disk": {"needed_gb": self.disk_needed_gb, "free_gb": self.disk_free_gb},
            "stages": [{**asdict(figures), "seconds": figures.seconds} for figures in self.stages],
            "problems": self.problems,
        }


def preflight(command: Command, *, quick: bool = False) -> Preflight:
    """Runs all checks of an experiment; no stage is measured if `quick` is set or a problem was found."""
    config = command.config
    data, problems = _check_data(config)
    objects, needed, free = None, 0, 0
    stages: list[StageFigures] = []
    if not problems:
        experiment = Experiment(config)
        try:
            objects = data_report(experiment)
            needed, free = check_disk(experiment, command.run, RUN_STAGES)
            check_batches(experiment, TRAINING_STAGES)
            check_target(experiment)
        except InputError as error:
            problems.append(str(error))
    if not problems and not quick:
        workers = experiment.test_loader().num_workers
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=existing_parent(command.run)) as folder:
            for name in (stage.name for stage in RUN_STAGES):
                log.info("measuring %s", name)
                measure = partial(measure_stage, config, Path(folder), name, workers)
                try:
                    stages.append(_in_fresh_process(measure))
                except (InputError, TrainingError, OSError) as error:
                    problems.append(f"{name}: {error}")  # later stages have nothing to start from
                    break
        problems += _too_large(stages, experiment.device)
    return Preflight(data, objects, needed / GB, free / GB, stages, problems)


def _check_data(config: Config) -> tuple[list[tuple[str, SplitCheck]], list[str]]:
    try:
        class_names = read_class_names(config.data.roots)
    except InputError as error:
        return [], [str(error)]
    log.info("reading annotations and image headers")
    data = [
        (split, check_split(roots, split, class_names, config.data.orientation))
        for roots, split in splits_of(config, RUN_STAGES)
    ]
    return data, [problem for _, held in data for problem in held.problems]


def _in_fresh_process(measure: partial[StageFigures]) -> StageFigures:
    killed = "was killed, probably for want of memory"
    return in_fresh_process(measure, preload="instaqnas.training.stages", killed=killed)


def _memory_there(device: torch.device) -> int:
    """Bytes of memory: free memory of a GPU, or the memory of the machine that this process may use."""
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
    """Lines for the terminal, without warnings and problems."""
    lines = []
    for split, held in result.data:
        lines.append(f"{split}: {held.images:,} images, {held.objects:,} objects")
        if held.without_area:
            named = ", ".join(held.without_area[:MOST_NAMED]) + (", ..." if len(held.without_area) > MOST_NAMED else "")
            lines.append(f"{split}: dropped boxes without area: {len(held.without_area)} ({named})")
    if result.objects is not None:
        lines.append(format_data_report(result.objects))
    if result.disk_free_gb:  # else a problem came first
        lines.append(f"disk: {result.disk_needed_gb:.2f} GB for checkpoints, {result.disk_free_gb:.2f} GB are free")
    if result.stages:
        lines.append(f"{'stage':<16}{'memory GB':>10}{'epochs':>8}{'s an epoch':>12}{'time':>20}")
    for figures in result.stages:
        numbers = f"{figures.memory_bytes / GB:>10.2f}{figures.epochs:>8}{figures.epoch_seconds:>12.1f}"
        lines.append(f"{figures.stage:<16}{numbers}{_time(figures.seconds):>20}")
    if len(result.stages) == len(RUN_STAGES):
        lines.append(f"{'all':<46}{_time(sum(figures.seconds for figures in result.stages)):>20}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def main(arguments: list[str] | None = None) -> None:
    """Prints the findings, warnings and problems last; exit status 2 if there are any."""
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
    for warning in result.objects.warnings if result.objects is not None else []:
        sys.stderr.write(f"warning: {warning}\n")
    for problem in result.problems:
        sys.stderr.write(f"problem: {problem}\n")
    if result.problems:
        sys.exit(2)


if __name__ == "__main__":
    main()
