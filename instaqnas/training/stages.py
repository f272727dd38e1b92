"""The four stages: what each trains or measures, with the parts that `experiment` builds from the config.

pretrain -> pretrain_fp32, pretrain_quant; search; finetune: all are `fit` around one detector loop, under three ways
to choose bits: uniformly random, sampled by the policy, greedy by the policy. Finetuning knows a fourth for what the
policy is compared with, a fixed configuration (finetune_static...).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from instaqnas.config import SEVERAL_BITS, Command, Config, QuantTrainConfig, TrainConfig
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.detector.distillation import distillation_loss, foreground
from instaqnas.detector.pretrained import load_pretrained
from instaqnas.detector.ssd import DetectorBits, SSDOutput, SwitchableSSD, copy_weights, detector_costs
from instaqnas.errors import InputError
from instaqnas.policy.bit_config import ChooseBits, fixed, greedy_by, sampled_by
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.network import policy_gbitops, start_logits
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.fused import compile_passes
from instaqnas.quant.switchable import calibrate, reestimate_batch_norm, use_batch_renorm
from instaqnas.ranks import alone, total
from instaqnas.training import distributed
from instaqnas.training.checks import quick_preflight
from instaqnas.training.comparison import measured_row, row_names, row_source
from instaqnas.training.detector_epoch import Distill, train_detector_epoch
from instaqnas.training.evaluate import EvalReport, detect
from instaqnas.training.experiment import (
    FULL_PRECISION_STAGES,
    POLICY_STAGES,
    QUANTIZED_STAGES,
    Experiment,
    check_held_out,
    check_search,
    finished_checkpoint,
    load_network,
    pretrained_checkpoint,
    teacher_checkpoint,
)
from instaqnas.training.fit import TrainState, fit
from instaqnas.training.optimizers import build_optimizer, build_scheduler
from instaqnas.training.pictures import draw_detections, draw_objects
from instaqnas.training.policy_start import begin_by_loss
from instaqnas.training.policy_training import PolicyTraining
from instaqnas.training.report import format_table, write_report
from instaqnas.training.rivals import Rivals, fixed_config, fixed_stage, fixed_within
from instaqnas.training.run_dir import RunDir, section_of, set_aside
from instaqnas.training.runtime import keep_freed_memory

# An `Experiment` from a config; the preflight has one of its own, on a few images.
BuildExperiment = Callable[[Config], Experiment]

log = logging.getLogger(__name__)
PICTURE_SCORE = 0.3
CHEAP_POLICY = 0.005  # of the detector's cost
LOG_EVERY = 10  # steps between TensorBoard scalars of the training loss


@dataclass(frozen=True)
class DetectorTraining:
    """One detector being trained in one stage, and its moving average where `ema_decay` asks for one."""

    experiment: Experiment
    run_dir: RunDir
    detector: SwitchableSSD
    network: nn.Module  # the detector as `distributed.parallel` returns it
    average: AveragedModel | None
    settings: TrainConfig
    loader: DetectionLoader
    state: TrainState
    distill: Distill | None

    @staticmethod
    def begin(
        experiment: Experiment,
        run_dir: RunDir,
        detector: SwitchableSSD,
        settings: TrainConfig,
        distill: Distill | None = None,
    ) -> DetectorTraining:
        """Builds optimizer, schedule, average and training data."""
        experiment.check_shares(f"{section_of(run_dir.stage)}.batch_size", settings.batch_size, settings.accumulate)
        loader = experiment.train_loader(settings.batch_size, run_dir.stage)
        optimizer = build_optimizer(detector, settings)
        scheduler = build_scheduler(optimizer, settings, len(loader))
        use_batch_renorm(detector, on=isinstance(settings, QuantTrainConfig) and settings.batch_renorm)
        network = distributed.parallel(detector)
        networks, average = {"detector": detector}, None
        if settings.ema_decay:
            average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
            average.update_parameters(detector)  # the first update copies; later ones, after a resumption too, average
            networks = {"detector": average.module, "trained_detector": detector}
        state = TrainState(networks, {"detector": optimizer}, scheduler)
        return DetectorTraining(experiment, run_dir, detector, network, average, settings, loader, state, distill)

    @property
    def result(self) -> SwitchableSSD:
        """What is validated, drawn, judged and handed on: the average where there is one."""
        return self.detector if self.average is None else self.average.module

    def epoch(self, epoch: int, choose_bits: ChooseBits) -> dict[str, float]:
        """One pass over the training split, or what is left of it after an interruption; returns its mean losses."""
        sums = self.state.sums("detector")
        self.loader.set_epoch(epoch, first_batch=sums.steps)
        text = f"{self.run_dir.stage} {epoch + 1}/{self.settings.epochs}"
        bar = distributed.progress_bar(self.loader, text, sums.steps)

        def after_step(scalars: dict[str, float]) -> None:
            if self.average is not None:
                self.average.update_parameters(self.detector)
            bar.set_postfix(loss=f"{scalars['loss']:.3f}", refresh=False)
            done = self.state.detector_steps(len(self.loader))
            if done % LOG_EVERY == 0:
                self.run_dir.log_step(done, _prefixed("step", scalars))
            self.save_if_due()

        train_detector_epoch(
            self.network,
            bar,
            choose_bits,
            self.state.optimizers["detector"],
            self.state.scheduler,
            sums=sums,
            accumulate=self.settings.accumulate,
            clip_grad_norm=self.settings.clip_grad_norm,
            device=self.experiment.device,
            on_step=after_step,
            distill=self.distill,
        )
        return _prefixed("train", sums.means())

    def save_if_due(self) -> None:
        """Saves within an epoch, `save_minutes` after the last time."""
        if self.settings.save_minutes and self.run_dir.minutes_unsaved >= self.settings.save_minutes:
            self.run_dir.save(self.state.state_dict())

    def fit(
        self,
        train_epoch: Callable[[int], dict[str, float]],
        choose_bits: Callable[[], ChooseBits],
        *,
        policy_cost: float = 0.0,
        keep_best: bool = True,
        batch_norm_batches: int = 0,
        finish: Callable[[], None] = lambda: None,
        diagnose: Callable[[int], dict[str, float]] = lambda step: {},
    ) -> None:
        """Trains to the end; validates and draws each time under what `choose_bits()` returns.

        What may be the result (see `fit`) takes the statistics of BatchNorm from `batch_norm_batches` training batches
        under the same; 0 leaves them. Before that comes `finish`, which is for a stage whose result is its end and may
        change what is chosen. `diagnose` as for `fit`.
        """
        val_loader = self.experiment.val_loader()
        shown = self.experiment.picture_batch()

        def prepare_result() -> None:
            finish()
            if batch_norm_batches:
                self._reestimate_batch_norm(choose_bits(), batch_norm_batches)

        def validate() -> EvalReport:
            return self.experiment.evaluate(self.result, val_loader, choose_bits(), policy_cost)

        def add_pictures(step: int) -> None:
            _add_pictures(self.experiment, self.run_dir, self.result, shown, choose_bits(), step)

        fit(
            self.run_dir,
            self.state,
            self.settings,
            steps_per_epoch=len(self.loader),
            train_epoch=train_epoch,
            prepare_result=prepare_result,
            validate=None if val_loader is None else validate,
            keep_best=keep_best,
            diagnose=diagnose,
            add_pictures=add_pictures,
        )

    def _reestimate_batch_norm(self, choose_bits: ChooseBits, batches: int) -> None:
        """The result's statistics, from augmented images: what the weights have been trained for.

        They are the same images each time. Training goes on from these statistics, which it does not read but with
        `batch_renorm`.
        """
        self.loader.set_epoch(self.settings.epochs)

        def forward() -> None:
            for batch in islice(self.loader, batches):
                images = batch.images.to(self.experiment.device)
                look = self.result.look(images)
                self.result(images, choose_bits(look.seen, batch.keys), look.stem)

        reestimate_batch_norm(self.result, forward)


@distributed.reporting_lost_processes()
def run_pretrain(command: Command, build: BuildExperiment = Experiment) -> None:
    """Full precision, then quantized under uniformly random bit configurations."""
    stages = ("pretrain_quant",) if command.init else ("pretrain_fp32", "pretrain_quant")
    experiment = _start(command, build, *stages)
    if command.restart:  # both before the first begins: an interruption must not leave the new one beside the old
        for stage in stages:
            set_aside(command.run / stage)
    source = command.init
    if source is None:
        _pretrain_fp32(experiment, command)
        source = finished_checkpoint(command.run, "pretrain_fp32", command.config.pretrain_fp32, "pretrain.py")
    _pretrain_quant(experiment, command, source)


def _pretrain_fp32(experiment: Experiment, command: Command) -> None:
    pretrained = command.config.pretrain_fp32.pretrained
    run_dir = RunDir(
        command.run,
        "pretrain_fp32",
        experiment.plain,
        experiment.class_names,
        source=Path(pretrained) if pretrained else None,
        images=experiment.train_image_ids(),
    )
    detector = experiment.detector(DetectorBits.full_precision())
    if pretrained and not run_dir.last.exists():
        log.info("%s: %s", pretrained, load_pretrained(detector, pretrained))
    training = DetectorTraining.begin(experiment, run_dir, detector, command.config.pretrain_fp32)
    choose = experiment.choose_fixed(detector)
    training.fit(lambda epoch: training.epoch(epoch, choose), lambda: choose)


def _pretrain_quant(experiment: Experiment, command: Command, source: Path) -> None:
    settings = command.config.pretrain_quant
    run_dir = RunDir(
        command.run,
        "pretrain_quant",
        experiment.plain,
        experiment.class_names,
        source=source,
        images=experiment.train_image_ids(),
    )
    detector = experiment.quantized_detector()
    if not run_dir.last.exists():
        check_held_out(experiment, source)
        full = experiment.detector(DetectorBits.full_precision())
        load_network(experiment, full, "detector", source, stages=FULL_PRECISION_STAGES)
        copy_weights(full, detector)
        batch = experiment.calibration_batch()
        choices = experiment.choose_random("calibration")(batch.images, batch.keys)
        with alone():
            calibrate(detector, lambda: detector(batch.images, choices))
    distill = _distillation(experiment, source, settings.distill_weight)
    training = DetectorTraining.begin(experiment, run_dir, detector, settings, distill)
    choose = (experiment.choose_sandwich if settings.sandwich else experiment.choose_random)("pretrain_quant")
    training.fit(
        lambda epoch: training.epoch(epoch, choose),
        lambda: experiment.choose_random("validate"),
        batch_norm_batches=settings.batch_norm_batches,
    )


@distributed.reporting_lost_processes()
def run_search(command: Command, build: BuildExperiment = Experiment) -> None:
    """Every epoch trains the policy, then, if `train_detector` says so, the detector under what it samples."""
    experiment, config = _start(command, build, "search"), command.config
    settings = config.search
    source = command.init or pretrained_checkpoint(command)
    detector, policy = experiment.adaptive_detector(), experiment.policy()
    policy_cost = policy_gbitops(policy, detector.image_size)
    _note_dear_policy(detector_costs(detector), policy_cost)
    teacher = teacher_checkpoint(command, "search", settings) if settings.train_detector else None
    run_dir = RunDir(
        command.run,
        "search",
        experiment.plain,
        experiment.class_names,
        source=source,
        teacher=teacher,
        images=experiment.train_image_ids(),
        restart=command.restart,
    )
    first_multiplier = Multiplier()
    if not run_dir.last.exists():
        check_held_out(experiment, source)
        load_network(experiment, detector, "detector", source, stages=QUANTIZED_STAGES)
        seen = detector.look(experiment.calibration_batch().images).seen
        with alone():
            calibrate(policy, lambda: policy(seen))
        if settings.start == "sensitivity":
            first_multiplier = begin_by_loss(experiment, source, detector.eval(), policy, policy_cost)
        elif settings.start == "static":
            best = fixed_within(experiment, source, config.reward.target_gbitops - policy_cost)[0]
            policy.add_to_logits(start_logits(best.configuration, len(detector.choices)))
            log.info("search: starts from a fixed configuration of %.4g GBitOps, policy not counted", best.gbitops)
    distill = _distillation(experiment, teacher, settings.distill_weight) if teacher else None
    training = DetectorTraining.begin(experiment, run_dir, detector, settings, distill)
    training.state.multiplier = first_multiplier
    learning = PolicyTraining.begin(experiment, run_dir, training.state, training.result, policy)

    def train_epoch(epoch: int) -> dict[str, float]:
        scalars = learning.epoch(epoch, training.save_if_due)
        if not settings.train_detector:
            return scalars
        choose = sampled_by(policy, learning.epsilon(epoch), experiment.draw("search"))
        return {**scalars, **training.epoch(epoch, choose)}

    policy.eval()
    # The highest mAP would be that of an early, expensive policy: what counts is where the search ends.
    training.fit(
        train_epoch,
        lambda: greedy_by(policy),
        policy_cost=policy_cost,
        keep_best=False,
        batch_norm_batches=settings.batch_norm_batches,
        finish=learning.meet_budget,
        diagnose=learning.diagnose,
    )


def _note_dear_policy(costs: CostTable, policy_cost: float) -> None:
    if policy_cost > CHEAP_POLICY * costs.lowest():
        log.info(
            "note: the policy costs %.3g GBitOps, over %g %% of the cheapest detector's %.3g; policy.width and "
            "policy.pool make it cheaper",
            policy_cost,
            100 * CHEAP_POLICY,
            costs.lowest(),
        )


@distributed.reporting_lost_processes()
def run_finetune(command: Command, build: BuildExperiment = Experiment) -> None:
    """The detector under the frozen, greedy policy, or under one fixed bit configuration."""
    if command.bits != "policy":
        _finetune_fixed(command, build)
        return
    experiment, config = _start(command, build, "finetune"), command.config
    settings = config.finetune
    source = command.init or finished_checkpoint(command.run, "search", config.search, "search.py")
    check_search(config, source)
    teacher = teacher_checkpoint(command, "finetune", settings)
    run_dir = RunDir(
        command.run,
        "finetune",
        experiment.plain,
        experiment.class_names,
        source=source,
        teacher=teacher,
        images=experiment.train_image_ids(),
        restart=command.restart,
    )
    detector, policy = experiment.adaptive_detector(), experiment.policy()
    if not run_dir.last.exists():
        load_network(experiment, detector, "detector", source, stages=POLICY_STAGES)
        load_network(experiment, policy, "policy", source, stages=POLICY_STAGES)
    policy.eval().requires_grad_(False)  # noqa: FBT003
    distill = _distillation(experiment, teacher, settings.distill_weight)
    training = DetectorTraining.begin(experiment, run_dir, detector, settings, distill)
    training.state.networks["policy"] = policy
    choose = greedy_by(policy)
    training.fit(
        lambda epoch: training.epoch(epoch, choose),
        lambda: choose,
        policy_cost=policy_gbitops(policy, detector.image_size),
        batch_norm_batches=settings.batch_norm_batches,
    )


def _finetune_fixed(command: Command, build: BuildExperiment) -> None:
    """The pretrained detector under the fixed configuration that `command.bits` names; follows `fixed_config`."""
    stage, config = fixed_stage(command.bits), fixed_config(command.config)
    settings = config.finetune
    experiment = _start(replace(command, config=config), build, stage)
    source = command.init or pretrained_checkpoint(command)
    teacher = teacher_checkpoint(command, "finetune", settings)
    rivals = Rivals(experiment, command)
    configuration = rivals.configuration(command.bits)
    run_dir = RunDir(
        command.run,
        stage,
        experiment.plain,
        experiment.class_names,
        source=source,
        teacher=teacher,
        images=experiment.train_image_ids(),
        configuration=rivals.names(configuration),
        restart=command.restart,
    )
    detector = experiment.quantized_detector()
    if not run_dir.last.exists():
        check_held_out(experiment, source)
        load_network(experiment, detector, "detector", source, stages=QUANTIZED_STAGES)
    distill = _distillation(experiment, teacher, settings.distill_weight)
    training = DetectorTraining.begin(experiment, run_dir, detector, settings, distill)
    choose = fixed(configuration)
    training.fit(
        lambda epoch: training.epoch(epoch, choose),
        lambda: choose,
        batch_norm_batches=settings.batch_norm_batches,
    )


@distributed.reporting_lost_processes()
def run_eval(command: Command, build: BuildExperiment = Experiment) -> None:
    """Measures one way to choose bits, or compares all, on the test split."""
    experiment = _start(command, build, "eval")
    names = [command.bits]
    if command.bits in SEVERAL_BITS:
        if command.init is not None:
            raise InputError(
                f"--init names one checkpoint, but --bits {command.bits} compares several; name one --bits"
            )
        names = row_names(command)
    rivals, loader = Rivals(experiment, command), experiment.test_loader()
    sources = {name: command.init or row_source(rivals, name) for name in names}  # all, before the first is measured
    rows = [measured_row(rivals, name, source, loader) for name, source in sources.items()]
    if not distributed.is_writer():
        return
    folder = command.run / "eval"
    if command.bits not in SEVERAL_BITS:
        folder = folder / command.bits.replace(":", "_")
    write_report(folder, rows, experiment.plain)
    log.info("%s", format_table([row.plain() for row in rows]))
    log.info("report and plot: %s", folder)
    log.info("TensorBoard: .venv/bin/tensorboard --logdir %s", command.run)


def _start(command: Command, build: BuildExperiment, *stages: str) -> Experiment:
    """The parts, once it is known that the data of `stages` is whole and the disk has room for them."""
    distributed.start(command.config.device)
    level = logging.INFO if distributed.is_writer() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    logging.captureWarnings(capture=True)
    keep_freed_memory()
    if command.config.runtime.threads:
        torch.set_num_threads(command.config.runtime.threads)
    compile_passes(command.config.runtime.compile)
    experiment = build(command.config)
    quick_preflight(experiment, command.run, *stages, restart=command.restart)
    return experiment


def _distillation(experiment: Experiment, teacher: Path | None, weight: float) -> Distill | None:
    """`weight` times the distance to the outputs of the full-precision network of a checkpoint, None for weight 0."""
    if not weight:
        return None
    network = experiment.detector(DetectorBits.full_precision()).eval()
    load_network(experiment, network, "detector", teacher, stages=FULL_PRECISION_STAGES)
    choose = experiment.choose_fixed(network)

    def distill(parts: Sequence[Tensor]) -> list[Callable[[SSDOutput], Tensor]]:
        with torch.no_grad():
            teachers = [network(images, choose(images, ())) for images in parts]
            positives = total(torch.stack([foreground(teacher).sum() for teacher in teachers]).sum())
        return [lambda output, teacher=t: weight * distillation_loss(output, teacher, positives) for t in teachers]

    return distill


@torch.no_grad()
def _add_pictures(
    experiment: Experiment,
    run_dir: RunDir,
    detector: SwitchableSSD,
    batch: Batch,
    choose_bits: ChooseBits,
    step: int,
) -> None:
    """A few images with true and predicted boxes, to TensorBoard."""
    if not distributed.is_writer():
        return
    was_training = detector.training
    detector.eval()
    look = detector.look(batch.images)
    found = detect(detector, batch.images, choose_bits(look.seen, batch.keys), experiment.config.eval, look.stem)
    detector.train(was_training)
    for index in range(len(batch.images)):
        shown = found.scores[index] >= PICTURE_SCORE
        objects = batch.labels[index] > 0
        picture = draw_detections(
            draw_objects(batch.images[index].cpu(), batch.boxes_xyxy[index, objects].cpu()),
            found.boxes_xyxy[index, shown].cpu(),
            found.scores[index, shown].cpu(),
            found.labels[index, shown].cpu(),
            experiment.class_names,
        )
        run_dir.log_picture(f"detections/{index}", picture, step)


def _prefixed(prefix: str, scalars: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in scalars.items()}
