"""The detector's side of every stage: data, optimizer, epochs, validation, checkpoints.

with open_stage(experiment, run, stage, source=source) as run_dir:
    training = DetectorTraining.begin(experiment, run_dir, detector, settings)
    for epoch in training.epochs():
        scalars = training.train_epoch(epoch, choose_bits)
        scalars |= training.validate_epoch(choose_bits)
        training.save_epoch(scalars, choose_bits)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from instaqnas import distributed
from instaqnas.config.settings import QuantTrainConfig, TrainConfig
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.errors import InputError
from instaqnas.evaluation.inference import detect
from instaqnas.evaluation.measure import evaluate
from instaqnas.evaluation.pictures import draw_detections, draw_objects
from instaqnas.experiment.handover import Checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.run_dir import RunDir
from instaqnas.experiment.stage import FULL_PRECISION_KINDS
from instaqnas.metrics.voc import LEARNED
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.batch_norm import reestimate_batch_norm, use_batch_renorm
from instaqnas.training.detector_step import Parameters, Teacher, detector_step
from instaqnas.training.history import EpochClock
from instaqnas.training.interruption import Interruption, finishing_steps
from instaqnas.training.optimizers import build_optimizer, build_scheduler
from instaqnas.training.state import TrainState

log = logging.getLogger(__name__)
PICTURE_SCORE = 0.3  # lowest score of a detection in pictures
LOG_EVERY = 10  # steps between TensorBoard scalars of the training loss


@dataclass(frozen=True)
class DetectorTraining:
    """One detector in training in one stage; build it with `begin`.

    Args:
        experiment: parts of the config.
        run_dir: folder of the stage.
        detector: is trained.
        network: the detector as `distributed.parallel` returns it.
        average: its moving average, None without `ema_decay`.
        settings: of the stage.
        loader: training images.
        val_loader: the val split, or None.
        pictures: a few images to draw.
        state: of the training, saved in checkpoints.
        teacher: to distill from, or None.
        keep_best: whether the result is the epoch with the best mAP on the val split, instead of the last.
    """

    experiment: Experiment
    run_dir: RunDir
    detector: SwitchableSSD
    network: nn.Module
    average: AveragedModel | None
    settings: TrainConfig
    loader: DetectionLoader
    val_loader: DetectionLoader | None
    pictures: Batch
    state: TrainState
    teacher: Teacher | None
    keep_best: bool
    clock: EpochClock = field(default_factory=EpochClock)

    @staticmethod
    def begin(
        experiment: Experiment,
        run_dir: RunDir,
        detector: SwitchableSSD,
        settings: TrainConfig,
        teacher: Teacher | None = None,
        *,
        keep_best: bool = True,
    ) -> DetectorTraining:
        """Builds optimizer, schedule, average and data."""
        loader = experiment.train_loader(settings.batch_size, run_dir.stage.name)
        optimizer = build_optimizer(detector, settings)
        scheduler = build_scheduler(optimizer, settings, len(loader))
        use_batch_renorm(detector, on=isinstance(settings, QuantTrainConfig) and settings.batch_renorm)
        network = distributed.parallel(detector)
        networks: dict[str, nn.Module] = {"detector": detector}
        average = None
        if settings.ema_decay:
            average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
            average.update_parameters(
                detector
            )  # the first update copies, so that later ones average after a resume too
            networks = {"detector": average.module, "trained_detector": detector}
        return DetectorTraining(
            experiment=experiment,
            run_dir=run_dir,
            detector=detector,
            network=network,
            average=average,
            settings=settings,
            loader=loader,
            val_loader=experiment.val_loader(),
            pictures=experiment.picture_batch(),
            state=TrainState(networks, {"detector": optimizer}, scheduler),
            teacher=teacher,
            keep_best=keep_best,
        )

    @property
    def result(self) -> SwitchableSSD:
        """The network that is validated, drawn and handed on: the average if there is one."""
        if self.average is None:
            return self.detector
        assert isinstance(self.average.module, SwitchableSSD)
        return self.average.module

    @property
    def in_last_epoch(self) -> bool:
        """Whether the unfinished epoch is the last one."""
        return self.state.epoch == self.settings.epochs - 1

    @property
    def validates(self) -> bool:
        """Whether the epoch that has just ended is one to validate, with or without a val split."""
        return self._is_due(self.settings.eval_every)

    def epochs(self) -> Iterator[int]:
        """Yields the numbers of the epochs that are left, from 0, starting from the last checkpoint if there is one.

        Raises: InputError if that checkpoint is of another version of this program.
        """
        self._resume()
        if self.state.epoch >= self.settings.epochs:
            return
        self.run_dir.open_tensorboard(self.state.detector_steps(len(self.loader)))
        while self.state.epoch < self.settings.epochs:
            self.clock.start()
            yield self.state.epoch
        distributed.barrier()  # the next stage reads the checkpoint
        if self.val_loader is not None and self.state.best_map < LEARNED:
            log.warning(
                "warning: %s has learned nothing: val mAP never rose above %g %%; look at the losses above, at "
                "detector.box_sizes and at the labels (instaqnas.tools.preflight)",
                self.run_dir.stage.name,
                100 * LEARNED,
            )

    def train_epoch(
        self, epoch: int, choose_bits: ChooseBits, choose_student: ChooseBits | None = None
    ) -> dict[str, float]:
        """One pass over the training split, or the rest of it after an interruption; returns its mean losses.

        Args:
            epoch: its number, from 0.
            choose_bits: bit configurations of the images.
            choose_student: see `detector_step`.
        """
        state, settings = self.state, self.settings
        sums = state.sums("detector")
        self.loader.set_epoch(epoch, first_batch=sums.steps)
        text = f"{self.run_dir.stage.name} {epoch + 1}/{settings.epochs}"
        bar = distributed.progress_bar(self.loader, text, sums.steps)
        parameters = Parameters.of(self.detector)
        self.detector.train()
        begun, images = time.monotonic(), 0
        with finishing_steps() as interruption:
            for batch in bar:
                result = detector_step(
                    self.network,
                    batch.to(self.experiment.device),
                    choose_bits,
                    state.optimizers["detector"],
                    state.scheduler,
                    parameters=parameters,
                    accumulate=settings.accumulate,
                    clip_grad_norm=settings.clip_grad_norm,
                    teacher=self.teacher,
                    choose_student=choose_student,
                    step=state.detector_steps(len(self.loader)),
                )
                sums.add(result.losses, result.images, result.choices)
                images += result.images
                if self.average is not None:
                    self.average.update_parameters(self.detector)
                bar.set_postfix(loss=f"{result.losses['loss']:.3f}", refresh=False)
                done = state.detector_steps(len(self.loader))
                if done % LOG_EVERY == 0:
                    rate = float(state.scheduler.get_last_lr()[0])
                    scalars = {**result.losses, "grad_norm": result.grad_norm, "lr": rate}
                    self.run_dir.log_step(done, {f"step/{name}": value for name, value in scalars.items()})
                self.save_if_due(interruption)
        self.clock.trained(images, time.monotonic() - begun)
        return sums.means("train/")

    def validate_epoch(self, choose_bits: ChooseBits, policy_gbitops: float = 0.0) -> dict[str, float]:
        """Ends the epoch, completes a network that may be the result, and validates it when that is due.

        Args:
            choose_bits: how bits are chosen in use.
            policy_gbitops: cost of choosing them, per image.

        Returns: `eval/map` (11 points, 0 to 1) and `eval/gbitops_total`; empty without validation.
        """
        self.state.end_epoch()
        validates = self.validates and self.val_loader is not None
        if self.state.epoch == self.settings.epochs or (validates and self.keep_best):
            self._complete_result(choose_bits)
        if not validates or self.val_loader is None:
            return {}
        report = evaluate(self.experiment, self.result, self.val_loader, choose_bits, policy_gbitops)
        return {"eval/map": report.map_11pt, "eval/gbitops_total": report.gbitops_total}

    def save_epoch(self, scalars: dict[str, float], choose_bits: ChooseBits) -> None:
        """Logs the epoch that has just ended, and saves it when that is due or when it is the best so far."""
        state, settings = self.state, self.settings
        step = state.epoch * len(self.loader)
        best_map = max(state.best_map, scalars.get("eval/map", -1.0))
        improved = self.keep_best and best_map > state.best_map
        state.best_map, state.metrics = best_map, scalars
        # Before the checkpoint: a run resumed from it does not log this epoch again.
        self.run_dir.log_epoch(state.epoch, step, scalars, state.choices)
        if state.epoch == settings.epochs:
            self.run_dir.log_result(scalars)
        log.info("%s", self.clock.line(self.run_dir.stage.name, state.epoch, settings.epochs, scalars))
        if self.validates:
            self._draw_pictures(choose_bits, step)
        if improved or self._is_due(settings.save_every):
            self.run_dir.save(state.state_dict(), best=improved, keep=settings.keep_checkpoints)

    def save_if_due(self, interruption: Interruption) -> None:
        """Saves within an epoch, `save_minutes` after the last time, or at once after a signal.

        Raises: Interrupted after a signal.
        """
        due = self.settings.save_minutes and self.run_dir.minutes_unsaved >= self.settings.save_minutes
        if due or interruption.number is not None:
            self.run_dir.save(self.state.state_dict())
        interruption.end()

    def _is_due(self, every: int) -> bool:
        return self.state.epoch % every == 0 or self.state.epoch == self.settings.epochs

    def _resume(self) -> None:
        """Restores the last checkpoint, if there is one, and logs where the stage continues."""
        begun, state, name = self.run_dir.take_begun(), self.state, self.run_dir.stage.name
        if begun is None:
            return
        try:
            state.load_state_dict(begun.state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise InputError(f"{begun.path}: of another version of this program ({first_line})") from error
        if state.epoch >= self.settings.epochs:
            log.info("%s: already complete (%d epochs)", name, self.settings.epochs)
        else:
            further = "".join(f", {part} step {sums.steps} of the next" for part, sums in state.running.items())
            log.info("%s: continues after epoch %d of %d%s", name, state.epoch, self.settings.epochs, further)

    def _complete_result(self, choose_bits: ChooseBits) -> None:
        """Re-estimates the result's BatchNorm statistics if `batch_norm_batches` asks for it.

        The images are augmented, as those the weights were trained on, and the same every time. Training goes on from
        these statistics, but reads them with `batch_renorm` only.
        """
        settings = self.settings
        if not isinstance(settings, QuantTrainConfig) or not settings.batch_norm_batches:
            return
        self.loader.set_epoch(settings.epochs)

        def forward() -> None:
            for batch in islice(self.loader, settings.batch_norm_batches):
                images = batch.images.to(self.experiment.device)
                observation = self.result.observe(images)
                self.result(images, choose_bits(observation.input, batch.keys), observation.stem)

        reestimate_batch_norm(self.result, forward)

    @torch.no_grad()
    def _draw_pictures(self, choose_bits: ChooseBits, step: int) -> None:
        """Writes a few images with annotated and detected boxes to TensorBoard."""
        if not distributed.is_writer():
            return
        detector, batch = self.result, self.pictures
        was_training = detector.training
        detector.eval()
        observation = detector.observe(batch.images)
        choices = choose_bits(observation.input, batch.keys)
        found = detect(detector, batch.images, choices, self.experiment.config.eval, observation.stem)
        detector.train(was_training)
        for index in range(len(batch.images)):
            shown = found.scores[index] >= PICTURE_SCORE
            objects = batch.labels[index] > 0
            picture = draw_detections(
                draw_objects(batch.images[index].cpu(), batch.boxes_xyxy[index, objects].cpu()),
                found.boxes_xyxy[index, shown].cpu(),
                found.scores[index, shown].cpu(),
                found.labels[index, shown].cpu(),
                self.experiment.class_names,
            )
            self.run_dir.log_picture(f"detections/{index}", picture, step)


def teacher_of(experiment: Experiment, source: Checkpoint | None, weight: float) -> Teacher | None:
    """The full-precision network of a checkpoint as a teacher; None for weight 0.

    Raises: InputError if the checkpoint is not of a full-precision training, or does not fit.
    """
    if not weight or source is None:
        return None
    network = experiment.detector(DetectorBits.full_precision()).eval()
    source.load(experiment, network, "detector", FULL_PRECISION_KINDS)
    return Teacher(network, experiment.choose_fixed(network), weight)
