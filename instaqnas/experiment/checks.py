"""Checks before a stage trains: data, default boxes, batches, disk, and whether the reward's target can be met."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from instaqnas import distributed
from instaqnas.config.settings import Config
from instaqnas.data.voc import Annotation, check_image_header
from instaqnas.detector.box_sizes import best_ious, class_coverage
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.experiment.data_checks import (
    SplitObjects,
    evaluation_warnings,
    fraction_warnings,
    objects_at,
    shared_images,
    training_warnings,
)
from instaqnas.experiment.parts import Experiment, TrainPart
from instaqnas.experiment.stage import (
    EVAL,
    PRETRAIN_FP32,
    PRETRAIN_QUANT,
    RUN_STAGES,
    SEARCH,
    TRAINING_STAGES,
    Stage,
    stage_named,
    trains_detector,
)
from instaqnas.files import GB, free_bytes
from instaqnas.policy.network import policy_gbitops

LEAST_COVERAGE = 0.7  # of training objects by default boxes, below which a warning is due
MOMENTS = {"adamw": 2, "sgd": 1}  # tensors of an optimizer's state per parameter

log = logging.getLogger(__name__)


def quick_preflight(experiment: Experiment, run: Path, stages: Sequence[Stage], *, restart: bool = False) -> None:
    """Runs all checks that take seconds: data, default boxes, batches, disk and target; logs warnings.

    Args:
        experiment: parts of the config.
        run: folder of the run.
        stages: that are about to run.
        restart: the stages start over; their old checkpoints are kept and need disk space too.

    Raises: InputError that names the first wrong file, the setting, or the missing disk space.
    """
    for roots, split in splits_of(experiment.config, stages):
        with ThreadPoolExecutor() as pool:
            list(pool.map(check_image_header, experiment.annotations(roots, split)))
    warnings = data_warnings(experiment, stages)
    if PRETRAIN_FP32 in stages:  # later stages have its default boxes
        warnings += default_box_warnings(experiment)
    for line in warnings:
        log.warning("warning: %s", line)
    if stages[0] is not EVAL:
        check_batches(experiment, stages)
    check_disk(experiment, run, stages, restart=restart)
    if PRETRAIN_QUANT in stages or SEARCH in stages:  # the pretraining takes hours, and the search builds on it
        check_target(experiment)


def data_warnings(experiment: Experiment, stages: Sequence[Stage]) -> list[str]:
    """Lines about objects that do not count, classes without objects, and images that splits share.

    Raises: InputError if a split has nothing to train on, or its boxes look like fractions of the image.
    """
    lines = []
    for roots, split in splits_of(experiment.config, stages):
        lines += fraction_warnings(split, experiment.annotations(roots, split))
    if any(stage is not EVAL for stage in stages):
        lines += training_warnings(training_objects(experiment), experiment.class_names)
    for objects in evaluated_objects(experiment, stages):
        lines += evaluation_warnings(objects)
    return lines + _shared_image_warnings(experiment) if distributed.is_writer() else lines


def training_objects(experiment: Experiment) -> SplitObjects:
    """Objects of the images that the detector is trained on."""
    data = experiment.config.data
    annotations = experiment.annotations(data.roots, data.train_split)
    used = [annotations[index] for index in experiment.train_indices("detector")]
    return objects_at(data.train_split, used, experiment.config.detector.image_size)


def evaluated_objects(experiment: Experiment, stages: Sequence[Stage]) -> list[SplitObjects]:
    """Objects of the val and test splits that `stages` evaluate on."""
    data, found = experiment.config.data, []
    if data.val_split and any(stage is not EVAL for stage in stages):
        found.append((data.roots, data.val_split))
    if EVAL in stages:
        found.append((data.test_roots or data.roots, data.test_split))
    image_size = experiment.config.detector.image_size
    return [objects_at(split, experiment.annotations(roots, split), image_size) for roots, split in found]


def _shared_image_warnings(experiment: Experiment) -> list[str]:
    """Lines about images that train, val and test share, and about splits that cannot be read for the comparison."""
    found: list[tuple[str, list[Annotation]]] = []
    lines = []
    for roots, split in splits_of(experiment.config, RUN_STAGES):
        try:
            found.append((split, experiment.annotations(roots, split)))
        except InputError as error:  # this stage may not need it
            lines.append(f"images of split {split!r} were not compared with other splits ({error})")
    return lines + shared_images(found)


def default_box_warnings(experiment: Experiment) -> list[str]:
    """Lines about default boxes that are larger than the image, or that cover few objects to train on."""
    detector = experiment.detector(DetectorBits.full_precision())
    objects, lines = training_objects(experiment), oversized_boxes(experiment.config)
    best = best_ious(detector.default_boxes_cxcywh.cpu(), torch.from_numpy(objects.boxes_xyxy) / objects.image_size)
    covered = class_coverage(best, torch.from_numpy(objects.labels))
    if covered < LEAST_COVERAGE:
        lines.append(
            f"default boxes: {covered:.0%} of the objects to train on (mean over classes) have one at IoU 0.5 or more; "
            "`python -m instaqnas.tools.preflight --quick` looks for detector.box_sizes that reach more"
        )
    return lines


def oversized_boxes(config: Config) -> list[str]:
    """A line if `detector.box_sizes` are larger than the image, as after copying them to a smaller `image_size`."""
    size, pairs = config.detector.image_size, config.detector.box_sizes or []
    large = [smaller for smaller, _ in pairs if smaller > size]
    if not large:
        return []
    return [
        f"detector.box_sizes: {', '.join(map(str, large))} exceed detector.image_size = {size}; they are pixels of the "
        "network's input and do not follow it"
    ]


def check_batches(experiment: Experiment, stages: Sequence[Stage]) -> None:
    """Checks the batch sizes of `stages` and of all stages that follow them in a run.

    A search that cannot run is refused before hours of pretraining.

    Raises: InputError that names the setting, if a batch cannot be split evenly, exceeds the number of images, or
        leaves BatchNorm a single value per channel.
    """
    following = TRAINING_STAGES[TRAINING_STAGES.index(stage_named(stages[0].section)) :]
    detector = experiment.detector(DetectorBits.full_precision())
    for stage in following:
        settings = stage.settings(experiment.config)
        if trains_detector(stage, experiment.config):
            key = f"{stage.section}.batch_size"
            _check_batch(experiment, key, settings.batch_size, settings.accumulate, "detector")
            _check_batch_norm(experiment, detector, key, settings.batch_size, settings.accumulate)
        if stage is SEARCH:
            key, size = f"{stage.section}.policy_batch_size", experiment.config.search.policy_batch_size
            _check_batch(experiment, key, size, 1, "policy")
            if min(size, len(experiment.train_indices("policy"))) < 2:
                raise InputError(f"{key}: BatchNorm of the policy needs two images or more in a batch, got 1")


def _check_batch(experiment: Experiment, key: str, batch_size: int, parts: int, part: TrainPart) -> None:
    """Raises InputError unless `batch_size` is a multiple of processes x `parts` and the split has enough images."""
    shares = parts * distributed.world_size()
    if batch_size % shares:
        raise InputError(f"{key}: expected a multiple of {shares} (processes x accumulate), got {batch_size}")
    images, share = len(experiment.train_indices(part)), experiment.config.data.policy_share
    if share and batch_size > images:
        raise InputError(
            f"data.policy_share: {share:g} leaves the {part} {images} training images, fewer than {key} = {batch_size}"
        )
    if shares > 1 and batch_size > images:  # the only batch would not be full
        raise InputError(f"{key}: expected at most the {images} training images, got {batch_size}")


def _check_batch_norm(experiment: Experiment, detector: SwitchableSSD, key: str, batch_size: int, parts: int) -> None:
    """Raises InputError if BatchNorm of the last extra layer would see one value per channel, which has no variance."""
    images = min(batch_size, len(experiment.train_indices("detector"))) // parts
    if experiment.config.detector.extras_batch_norm and images < 2 and detector.map_sizes()[-1] == 1:
        raise InputError(
            f"{key}: detector.extras_batch_norm needs two images or more in each part of a batch, got {images} "
            "(training images or batch size, divided by accumulate)"
        )


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
            f"reward.target_gbitops: expected {lowest:.4g} to {highest:.4g}, the cost of this network's configurations "
            f"with its policy, got {settings.target_gbitops:g}"
        )


def splits_of(config: Config, stages: Sequence[Stage]) -> list[tuple[list[str], str]]:
    """(roots, split) of all splits that `stages` read, each once."""
    data = config.data
    found: list[tuple[list[str], str]] = []
    if any(stage is not EVAL for stage in stages):
        found += [(data.roots, split) for split in (data.train_split, data.val_split) if split]
    if EVAL in stages:
        found.append((data.test_roots or data.roots, data.test_split))
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def check_disk(experiment: Experiment, run: Path, stages: Sequence[Stage], *, restart: bool = False) -> tuple[int, int]:
    """Bytes that the checkpoints of `stages` still need, and free bytes.

    Raises: InputError if more are needed than are free.
    """
    needed, free = disk_needed(experiment, run, stages, restart=restart), free_bytes(run)
    if free < needed:
        raise InputError(f"{run}: {needed / GB:.2f} GB of disk are needed for checkpoints, {free / GB:.2f} GB are free")
    return needed, free


def disk_needed(experiment: Experiment, run: Path, stages: Sequence[Stage], *, restart: bool = False) -> int:
    """Bytes that the checkpoints of `stages` will take; existing ones are subtracted unless `restart` is set.

    A stage keeps its last checkpoint, the best if there is a val split, and `keep_checkpoints` more. While one is
    written, it takes its space once more.
    """
    total = largest = 0
    for stage in (stage for stage in stages if stage is not EVAL):
        size = checkpoint_bytes(experiment, stage)
        keep = stage.settings(experiment.config).keep_checkpoints
        files = 1 + bool(experiment.config.data.val_split) + keep
        existing = 0 if restart else sum(path.stat().st_size for path in (run / stage.name).glob("*.pt"))
        total += max(0, files * size - existing)
        largest = max(largest, size)
    return total + largest


def checkpoint_bytes(experiment: Experiment, stage: Stage) -> int:
    """Bytes of the tensors in a checkpoint of a training stage: networks and optimizers."""
    settings = stage.settings(experiment.config)
    if stage.is_quantized:
        detector = experiment.quantized_detector()
    else:
        detector = experiment.detector(DetectorBits.full_precision())
    networks = 2 if settings.ema_decay else 1
    total = networks * _bytes(detector)
    if trains_detector(stage, experiment.config):
        total += MOMENTS[settings.optimizer] * _parameter_bytes(detector)
    if stage.has_policy:
        policy = experiment.policy()
        total += _bytes(policy)
        if stage is SEARCH:
            total += MOMENTS["adamw"] * _parameter_bytes(policy)
    return total


def _bytes(network: nn.Module) -> int:
    return sum(value.nbytes for value in network.state_dict().values())


def _parameter_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
