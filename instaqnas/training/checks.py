"""What can be known before a stage trains: whether its data is whole, whether its checkpoints fit on the disk, and
whether the target of the reward can be met.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from torch import nn

from instaqnas.config import Config
from instaqnas.data.voc import check_image_header
from instaqnas.detector.ssd import DetectorBits, detector_costs
from instaqnas.errors import InputError
from instaqnas.policy.network import policy_gbitops
from instaqnas.training.experiment import POLICY_STAGES, Experiment
from instaqnas.training.run_dir import section_of

STAGES = ("pretrain_fp32", "pretrain_quant", "search", "finetune", "eval")
MOMENTS = {"adamw": 2, "sgd": 1}  # tensors of an optimizer's state for each parameter
GB = 1e9


def quick_preflight(experiment: Experiment, run: Path, *stages: str, restart: bool = False) -> None:
    """Reads every annotation and image header that `stages` will use, compares the disk with their checkpoints, and the
    target with what configurations cost.

    `restart`: they will begin anew, and what is there of them will be kept.

    Raises: InputError, naming the first file that is wrong, what the disk lacks, or the target.
    """
    for roots, split in splits_of(experiment.config, stages):
        with ThreadPoolExecutor() as pool:
            list(pool.map(check_image_header, experiment.annotations(roots, split)))
    check_disk(experiment, run, stages, restart=restart)
    if {"pretrain_quant", "search"} & set(stages):  # before the long trainings, too, that the search builds on
        check_target(experiment)


def check_target(experiment: Experiment) -> None:
    """Raises InputError if the reward aims at a cost that no configuration has."""
    settings = experiment.config.reward
    if settings.name != "budget":
        return
    detector = experiment.quantized_detector()
    costs, policy_cost = detector_costs(detector), policy_gbitops(experiment.policy(), detector.image_size)
    lowest, highest = costs.lowest() + policy_cost, costs.highest() + policy_cost
    if not lowest <= settings.target_gbitops <= highest:
        raise InputError(
            f"reward.target_gbitops: expected {lowest:.4g} to {highest:.4g}, what the configurations of this network "
            f"cost with its policy, got {settings.target_gbitops:g}"
        )


def splits_of(config: Config, stages: Sequence[str]) -> list[tuple[list[str], str]]:
    """(roots, split) that `stages` read, each once."""
    data, found = config.data, []
    if set(stages) - {"eval"}:
        found += [(data.roots, split) for split in (data.train_split, data.val_split) if split]
    if "eval" in stages:
        found.append((data.test_roots or data.roots, data.test_split))
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def check_disk(experiment: Experiment, run: Path, stages: Sequence[str], *, restart: bool = False) -> tuple[int, int]:
    """Bytes that the checkpoints of `stages` still need, and bytes that are free.

    Raises: InputError if these are fewer.
    """
    needed, free = disk_needed(experiment, run, stages, restart=restart), free_bytes(run)
    if free < needed:
        raise InputError(f"{run}: {needed / GB:.2f} GB of disk are needed for checkpoints, {free / GB:.2f} GB are free")
    return needed, free


def disk_needed(experiment: Experiment, run: Path, stages: Sequence[str], *, restart: bool = False) -> int:
    """Bytes that the checkpoints of `stages` will take beyond those that are there; all of them for a `restart`.

    A stage has its last one, the best where there is a val split, those it keeps by their epochs, and for a moment one
    more that is being written.
    """
    total = largest = 0
    for stage in (stage for stage in stages if stage != "eval"):
        size = checkpoint_bytes(experiment, stage)
        keep = getattr(experiment.config, section_of(stage)).keep_checkpoints
        files = 1 + bool(experiment.config.data.val_split) + keep
        there = 0 if restart else sum(path.stat().st_size for path in (run / stage).glob("*.pt"))
        total += max(0, files * size - there)
        largest = max(largest, size)
    return total + largest


def checkpoint_bytes(experiment: Experiment, stage: str) -> int:
    """Bytes of the tensors in a checkpoint of a stage that trains: networks and optimizers."""
    settings = getattr(experiment.config, section_of(stage))
    full = stage == "pretrain_fp32"
    detector = experiment.detector(DetectorBits.full_precision()) if full else experiment.quantized_detector()
    networks = 2 if settings.ema_decay else 1
    total = networks * _bytes(detector)
    if stage != "search" or settings.train_detector:
        total += MOMENTS[settings.optimizer] * _parameter_bytes(detector)
    if stage in POLICY_STAGES:
        policy = experiment.policy()
        total += _bytes(policy)
        if stage == "search":
            total += MOMENTS["adamw"] * _parameter_bytes(policy)
    return total


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """`folder` itself, or the nearest above it that exists."""
    return next(path for path in chain([folder.absolute()], folder.absolute().parents) if path.exists())


def _bytes(network: nn.Module) -> int:
    return sum(value.nbytes for value in network.state_dict().values())


def _parameter_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
