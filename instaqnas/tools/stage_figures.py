"""Time and memory of a stage, from a short run of it on a few images.

The stage runs as it will, but for two epochs. Networks and loaders note when they run, so that the time of an image is
the distance between two notes. The second epoch counts: the first one compiles, allocates and starts the workers.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config.command import Command
from instaqnas.config.settings import Config, QuantTrainConfig, TrainConfig
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.data.voc import Annotation
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.errors import InputError
from instaqnas.experiment.handover import LAST_FILE
from instaqnas.experiment.parts import CACHED_SIDE, Experiment
from instaqnas.experiment.stage import (
    EVAL,
    FINETUNE,
    PRETRAIN_FP32,
    PRETRAIN_QUANT,
    SEARCH,
    Stage,
    stage_named,
    trains_detector,
)
from instaqnas.policy.network import PolicyNet
from instaqnas.tools.processes import peak_resident_bytes
from instaqnas.training.stages import (
    prepare_process,
    run_eval,
    run_finetune,
    run_pretrain_fp32,
    run_pretrain_quant,
    run_search,
)

EPOCHS = 2
STEPS, POLICY_STEPS, EVAL_STEPS = 8, 4, 3  # at least, in each epoch

Network = TypeVar("Network", bound=nn.Module)
Section = TypeVar("Section", bound=TrainConfig)


@dataclass(frozen=True)
class StageFigures:
    """Time and memory of one stage.

    Args:
        stage: its name.
        memory_bytes: peak memory of the process that trains.
        startup_seconds: once, before the first epoch.
        epochs: number of epochs.
        epoch_seconds: of one pass over the training split; in a search, over all passes of policy and detector.
        evaluations: number of evaluations.
        evaluation_seconds: of one pass over the val split, or the test split in `eval`.
        saves: number of checkpoints.
        save_seconds: of one checkpoint.
        batch_norm_seconds: once, for the last statistics of BatchNorm.
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
        """Seconds from beginning to end."""
        return (
            self.startup_seconds
            + self.epochs * self.epoch_seconds
            + self.evaluations * self.evaluation_seconds
            + self.saves * self.save_seconds
            + self.batch_norm_seconds
        )


@dataclass(frozen=True)
class Note:
    """Start of one forward pass in seconds, and its number of images."""

    start: float
    images: int


def seconds_per_image(notes: Sequence[Note], burst: int) -> float:
    """Seconds per image in a loop of forward passes, with all work between them.

    Args:
        notes: of the passes in order; the last one only ends the loop.
        burst: batches that arrive together, since a loader's workers decode them at the same time; whole bursts count.
    """
    steps = len(notes) - 1
    if steps > burst:
        steps -= steps % burst
    return (notes[steps].start - notes[0].start) / sum(note.images for note in notes[:steps])


def steps_for(least: int, workers: int) -> int:
    """Forward passes that `seconds_per_image` needs, at least `least`: two whole bursts of the workers and one more."""
    return 1 + max(2, math.ceil((least - 1) / workers)) * workers if workers else least


def used_images(images: int, batch_size: int) -> int:
    """Images of a training epoch: as many as fill batches."""
    return images - images % batch_size if images >= batch_size else images


def due(epochs: int, every: int) -> int:
    """How often an event happens that comes after every `every` epochs and after the last one."""
    return math.ceil(epochs / every)


def saves_of(settings: TrainConfig, epoch_seconds: float) -> int:
    """Number of checkpoints that a stage writes, after epochs and every `save_minutes` within them."""
    saves = due(settings.epochs, settings.save_every)
    if not settings.save_minutes:
        return saves
    return saves * (1 + int(settings.save_every * epoch_seconds / 60 / settings.save_minutes))


class NotedLoader(DetectionLoader):
    """A loader that notes when it hands out each batch of its first iteration, and when that iteration ends.

    Args:
        loader: with the same batches.
        note: takes the number of images handed out.
    """

    def __init__(self, loader: DetectionLoader, note: Callable[[int], None]) -> None:
        self.__dict__.update(loader.__dict__)
        self.note: Callable[[int], None] | None = note

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, as in the class above it
        note, self.note = self.note, None
        for batch in super().__iter__():
            if note is not None:
                note(len(batch.images))
            yield batch
        if note is not None:
            note(0)


class ShortExperiment(Experiment):
    """An experiment on a few images, whose networks and loaders note when they run.

    Args:
        config: the whole config, as the stage will have it.
        stage: the stage that is measured.
        workers: processes of a loader.
    """

    def __init__(self, config: Config, stage: Stage, workers: int) -> None:
        super().__init__(config)
        self.stage, self.workers = stage, workers
        self.images: dict[tuple[str, ...], int] = {}  # of whole splits, by (*roots, split)
        self.notes: dict[str, list[Note]] = {"detector": [], "policy": [], "evaluation": [], "batch_norm": []}

    def annotations(self, roots: Sequence[str], split: str) -> list[Annotation]:
        """A few annotations of a split, evenly spaced."""
        whole = super().annotations(roots, split)
        self.images[(*roots, split)] = len(whole)
        wanted = self._wanted(training=self.stage is not EVAL and split == self.config.data.train_split)
        return whole[:: max(1, len(whole) // wanted)][:wanted]

    def images_of(self, split: str) -> int:
        """Images of the whole split that the stage trains or evaluates on; 0 if it has none."""
        data = self.config.data
        roots = data.test_roots or data.roots if self.stage is EVAL else data.roots
        return self.images.get((*roots, split), 0)

    def training_images(self, network: str) -> int:
        """Images of the whole train split that the `detector` is trained on, or the `policy` learns from."""
        images, share = self.images_of(self.config.data.train_split), self.config.data.policy_share
        held_out = round(share * images)
        return images - held_out if network == "detector" or not share else held_out

    def detector(self, bits: DetectorBits) -> SwitchableSSD:
        """A new detector that notes its forward passes in training."""
        return self._noting(super().detector(bits), "detector")

    def policy(self) -> PolicyNet:
        """A new policy that notes its forward passes in training."""
        return self._noting(super().policy(), "policy")

    def eval_loader(self, split: str, roots: list[str]) -> DetectionLoader:
        """A few images of a split; the loader notes its evaluation."""
        return NotedLoader(super().eval_loader(split, roots), lambda images: self._note("evaluation", images))

    def _wanted(self, *, training: bool) -> int:
        """Number of images from which the time of a split can be told."""
        config = self.config
        if not training:
            return config.eval.batch_size * steps_for(EVAL_STEPS, self.workers)
        detector = self.stage.settings(config).batch_size * steps_for(STEPS, self.workers)
        policy = config.search.policy_batch_size * steps_for(POLICY_STEPS, self.workers)
        share = config.data.policy_share
        if share:  # the detector's and the policy's part both need their batches
            return 1 + math.ceil(max(detector / (1 - share), policy / share))
        return max(detector, policy) if self.stage is SEARCH else detector

    def _noting(self, network: Network, name: str) -> Network:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module.training and torch.is_grad_enabled():
                self._note(name, len(args[0]))
            elif module.training and self._after_training(name):  # before training, the network is calibrated
                self._note("batch_norm", len(args[0]))

        network.register_forward_pre_hook(note)
        return network

    def _after_training(self, network: str) -> bool:
        """Whether the training of the detector or the policy is over, or is left out."""
        left_out = network == "detector" and not trains_detector(self.stage, self.config)
        return left_out or bool(self.notes[network])

    def _note(self, name: str, images: int) -> None:
        self.notes[name].append(Note(self._now(), images))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure_stage(config: Config, run: Path, name: str, workers: int) -> StageFigures:
    """Runs a stage on a few images; call it in a process that has computed nothing yet.

    Args:
        config: the whole config.
        run: folder of a temporary run that holds the stages before.
        name: of the stage.
        workers: processes of a loader.

    Raises: InputError and TrainingError as the stage itself, and InputError if memory does not suffice.
    """
    # Loaders start their workers as in a training; a process of a pool would hand on its own start method.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    stage = stage_named(name)
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            command = Command(short_config(config), run)
            prepare_process(command.config)
            experiment = ShortExperiment(command.config, stage, workers)
            _run(stage, experiment, command)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            first_line = str(error).partition("\n")[0]
            raise InputError(f"there is too little memory ({first_line})") from None
    return _figures(config, run, experiment, start)


def short_config(config: Config) -> Config:
    """`config` with two epochs and one checkpoint in each stage."""

    def shortened(section: Section) -> Section:
        warmup = min(EPOCHS, section.warmup_epochs)
        return replace(
            section, epochs=EPOCHS, eval_every=EPOCHS, save_every=EPOCHS, keep_checkpoints=0, warmup_epochs=warmup
        )

    return replace(
        config,
        pretrain_fp32=shortened(config.pretrain_fp32),
        pretrain_quant=shortened(config.pretrain_quant),
        search=shortened(config.search),
        finetune=shortened(config.finetune),
    )


def _run(stage: Stage, experiment: Experiment, command: Command) -> None:
    run = {
        PRETRAIN_FP32: run_pretrain_fp32,
        PRETRAIN_QUANT: run_pretrain_quant,
        SEARCH: run_search,
        FINETUNE: run_finetune,
        EVAL: run_eval,
    }[stage]
    run(command, experiment)


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _figures(config: Config, run: Path, experiment: ShortExperiment, start: float) -> StageFigures:
    data, stage = config.data, experiment.stage
    memory = _peak_memory(experiment.device) + _uncached_bytes(experiment)
    evaluation = experiment.notes["evaluation"]
    burst = max(1, experiment.workers)
    per_image = seconds_per_image(evaluation, burst) if evaluation else 0.0
    if stage is EVAL:
        return StageFigures(
            stage.name,
            memory,
            startup_seconds=evaluation[0].start - start,
            epochs=0,
            epoch_seconds=0.0,
            evaluations=1,
            evaluation_seconds=per_image * experiment.images_of(data.test_split),
            saves=0,
            save_seconds=0.0,
        )
    settings = stage.settings(config)
    batch_sizes = {"detector": settings.batch_size} if trains_detector(stage, config) else {}
    if stage is SEARCH:
        batch_sizes["policy"] = config.search.policy_batch_size
    epoch_seconds, begun, warm_up = 0.0, math.inf, 0.0
    for name, batch_size in batch_sizes.items():
        notes = experiment.notes[name]
        second = notes[len(notes) // EPOCHS :]  # of the second epoch
        parts = settings.accumulate if name == "detector" else 1
        pace = seconds_per_image(second if len(second) > 1 else notes, burst * parts)
        epoch_seconds += pace * used_images(experiment.training_images(name), batch_size)
        begun = min(begun, second[0].start)
        warm_up += pace * sum(note.images for note in notes[: len(notes) // EPOCHS])
    return StageFigures(
        stage.name,
        memory,
        startup_seconds=max(0.0, begun - start - warm_up),
        epochs=settings.epochs,
        epoch_seconds=epoch_seconds,
        evaluations=due(settings.epochs, settings.eval_every) if data.val_split else 0,
        evaluation_seconds=per_image * experiment.images_of(data.val_split),
        saves=saves_of(settings, epoch_seconds),
        save_seconds=_seconds_of_a_save(run / stage.name / LAST_FILE),
        batch_norm_seconds=_batch_norm_seconds(experiment, settings),
    )


def _batch_norm_seconds(experiment: ShortExperiment, settings: TrainConfig) -> float:
    """Seconds of re-estimating BatchNorm's statistics at the end; 0 if that takes at most one batch."""
    notes = experiment.notes["batch_norm"]
    if len(notes) < 2 or not isinstance(settings, QuantTrainConfig):
        return 0.0
    images = used_images(experiment.images_of(experiment.config.data.train_split), settings.batch_size)
    images = min(images, settings.batch_norm_batches * settings.batch_size)
    return images * seconds_per_image(notes, max(1, experiment.workers))


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident_bytes()


def _uncached_bytes(experiment: ShortExperiment) -> int:
    """Bytes of training images that `data.cache` will hold beyond the few that were measured with."""
    data = experiment.config.data
    if data.cache != "ram" or experiment.stage is EVAL or experiment.device.type == "cuda":
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
