"""The stages of an experiment, each a function that reads top to bottom.

pretrain -> pretrain_fp32, pretrain_quant; search; finetune; eval. All trainings are one loop over the detector's epochs
under different ways to choose bits: uniformly random, sampled by the policy, greedy by the policy, or, for a baseline
of the policy, one fixed configuration.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

from instaqnas import distributed
from instaqnas.bits import POLICY
from instaqnas.config.command import SEVERAL_BITS, Command
from instaqnas.config.settings import Config
from instaqnas.detector.pretrained import load_pretrained
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, copy_weights, detector_costs
from instaqnas.errors import InputError
from instaqnas.evaluation.baselines import Baselines
from instaqnas.evaluation.comparison import measured_row, row_names, row_source
from instaqnas.evaluation.report import format_classes, format_table, write_report
from instaqnas.evaluation.sensitivity import cheapest_and_most_expensive
from instaqnas.experiment.checks import quick_preflight
from instaqnas.experiment.handover import (
    Checkpoint,
    finished_checkpoint,
    initial_checkpoint,
    pretrained_checkpoint,
    teacher_checkpoint,
)
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.run_dir import open_stage, set_aside
from instaqnas.experiment.stage import (
    EVAL,
    FINETUNE,
    PRETRAIN_FP32,
    PRETRAIN_QUANT,
    SEARCH,
    Stage,
    fixed_config,
    fixed_stage,
)
from instaqnas.policy.bit_config import ChooseBits, fixed, greedy_by, sampled_by
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.fused import compile_passes
from instaqnas.quant.switchable import calibrate
from instaqnas.training.budgets import choose_at_budgets, measured_prices
from instaqnas.training.detector_training import DetectorTraining, teacher_of
from instaqnas.training.policy_start import begin_by_effort, begin_policy
from instaqnas.training.policy_training import PolicyTraining
from instaqnas.training.runtime import keep_freed_memory

log = logging.getLogger(__name__)
CHEAP_POLICY = 0.005  # of the detector's cost


@distributed.reporting_lost_processes()
def run_pretrain(command: Command) -> None:
    """Trains in full precision, then quantized; with `--init` only quantized, from that checkpoint."""
    stages = [PRETRAIN_QUANT] if command.init else [PRETRAIN_FP32, PRETRAIN_QUANT]
    experiment = start(command, stages)
    if command.restart:  # both before the first begins: an interruption must not leave a new one with an old one
        for stage in stages:
            set_aside(command.run / stage.name)
    if command.init is None:
        run_pretrain_fp32(command, experiment)
    run_pretrain_quant(command, experiment)


def run_pretrain_fp32(command: Command, experiment: Experiment) -> None:
    """Trains the detector in full precision, from the seed or from weights of another project."""
    settings = command.config.pretrain_fp32
    weights = Path(settings.pretrained) if settings.pretrained else None
    with open_stage(experiment, command.run, PRETRAIN_FP32, source=weights) as run_dir:
        detector = experiment.detector(DetectorBits.full_precision())
        if weights is not None and not run_dir.has_begun:
            log.info("%s: %s", weights, load_pretrained(detector, settings.pretrained))
        training = DetectorTraining.begin(experiment, run_dir, detector, settings)
        choose = experiment.choose_fixed(detector)
        _train(training, choose, choose)


def run_pretrain_quant(command: Command, experiment: Experiment) -> None:
    """Trains the quantized detector under many bit configurations, from a full-precision network."""
    settings = command.config.pretrain_quant
    source = initial_checkpoint(command) or finished_checkpoint(command.run, PRETRAIN_FP32, command.config)
    with open_stage(experiment, command.run, PRETRAIN_QUANT, source=source) as run_dir:
        detector = experiment.quantized_detector()
        policy = experiment.policy() if settings.configurations == "policy" else None
        own_gbitops = policy_gbitops(policy, detector.image_size) if policy is not None else 0.0
        if not run_dir.has_begun:
            source.check_held_out(experiment)
            _quantize(experiment, source, detector)
            if policy is not None:
                _calibrate_policy(experiment, detector, policy)
                begin_by_effort(experiment, source, detector, policy, own_gbitops)
        teacher = teacher_of(experiment, source, settings.distill_weight)
        training = DetectorTraining.begin(experiment, run_dir, detector, settings, teacher)
        if settings.configurations == "ends":
            ends = cheapest_and_most_expensive(detector_costs(detector))
            validated = fixed(ends.most_expensive)
            _train(training, validated, validated, choose_student=fixed(ends.cheapest))
            return
        if policy is None:
            draw = experiment.choose_sandwich if settings.configurations == "sandwich" else experiment.choose_random
            _train(training, draw(PRETRAIN_QUANT.name), experiment.choose_random("validate"))
            return
        policy.eval().requires_grad_(False)  # noqa: FBT003
        training.state.networks["policy"] = policy
        sampled = sampled_by(policy, settings.explore, experiment.draw(PRETRAIN_QUANT.name))
        _train(training, sampled, greedy_by(policy), own_gbitops)


@distributed.reporting_lost_processes()
def run_search(command: Command, experiment: Experiment | None = None) -> None:
    """Every epoch trains the policy, then the detector under the policy's samples if `train_detector` says so."""
    experiment = experiment or start(command, [SEARCH])
    settings = command.config.search
    source = initial_checkpoint(command) or pretrained_checkpoint(command)
    teacher = teacher_checkpoint(command, SEARCH.section, settings) if settings.train_detector else None
    with open_stage(
        experiment, command.run, SEARCH, source=source, teacher=teacher, restart=command.restart
    ) as run_dir:
        detector, policy = experiment.adaptive_detector(), experiment.policy()
        own_gbitops = policy_gbitops(policy, detector.image_size)
        _note_expensive_policy(detector_costs(detector), own_gbitops)
        multiplier = None
        if not run_dir.has_begun:
            source.check_held_out(experiment)
            source.load(experiment, detector, "detector", SEARCH.starts_from)
            _calibrate_policy(experiment, detector, policy)
            multiplier = begin_policy(experiment, source, detector, policy, own_gbitops)
        training = DetectorTraining.begin(
            experiment,
            run_dir,
            detector,
            settings,
            teacher_of(experiment, teacher, settings.distill_weight),
            keep_best=False,  # the highest mAP would belong to an early policy that has not met its budget
        )
        if multiplier is not None:
            training.state.multiplier = multiplier
        learning = PolicyTraining.begin(training, policy)
        policy.eval()
        choose = greedy_by(policy)
        for epoch in training.epochs():
            scalars = learning.train_epoch(epoch)
            if settings.train_detector:
                sampled = sampled_by(policy, learning.epsilon(epoch), experiment.draw(SEARCH.name))
                scalars |= training.train_epoch(epoch, sampled)
            if training.in_last_epoch:
                learning.meet_budget()
                training.state.prices = measured_prices(experiment, training.result, policy, own_gbitops)
            scalars |= training.validate_epoch(choose, own_gbitops)
            if training.validates:
                scalars |= learning.diagnose()
            training.save_epoch(scalars, choose)


@distributed.reporting_lost_processes()
def run_finetune(command: Command, experiment: Experiment | None = None) -> None:
    """Trains the detector under the frozen, greedy policy, or under the fixed configuration that `--bits` names.

    Args:
        command: names the run.
        experiment: parts of the command's config; for a fixed configuration, of `fixed_config` of it.
    """
    if command.bits != POLICY:
        _finetune_fixed(command, experiment)
        return
    experiment, config = experiment or start(command, [FINETUNE]), command.config
    settings = config.finetune
    source = initial_checkpoint(command) or finished_checkpoint(command.run, SEARCH, config)
    source.check_search(config)
    teacher = teacher_checkpoint(command, FINETUNE.section, settings)
    with open_stage(
        experiment, command.run, FINETUNE, source=source, teacher=teacher, restart=command.restart
    ) as run_dir:
        detector, policy = experiment.adaptive_detector(), experiment.policy()
        if not run_dir.has_begun:
            source.load(experiment, detector, "detector", FINETUNE.starts_from)
            source.load(experiment, policy, "policy", FINETUNE.starts_from)
        policy.eval().requires_grad_(False)  # noqa: FBT003
        training = DetectorTraining.begin(
            experiment, run_dir, detector, settings, teacher_of(experiment, teacher, settings.distill_weight)
        )
        training.state.networks["policy"] = policy
        own_gbitops = policy_gbitops(policy, detector.image_size)
        prices = training.state.prices = measured_prices(experiment, detector, policy, own_gbitops)
        choose = choose_in_use = greedy_by(policy)
        if settings.budgets is not None:
            choose = choose_at_budgets(experiment, policy, detector_costs(detector), prices, settings.budgets)
        _train(training, choose, choose_in_use, own_gbitops)


def _finetune_fixed(command: Command, experiment: Experiment | None) -> None:
    """Trains the pretrained detector under one fixed configuration, by the settings of `fixed_config`."""
    stage = fixed_stage(command.bits)
    experiment = experiment or start(replace(command, config=fixed_config(command.config)), [stage])
    settings = experiment.config.finetune
    baselines = Baselines(experiment, command)
    source = initial_checkpoint(command) or baselines.pretrained
    teacher = teacher_checkpoint(command, stage.section, settings)
    configuration = baselines.configuration(command.bits)
    with open_stage(
        experiment,
        command.run,
        stage,
        source=source,
        teacher=teacher,
        configuration=baselines.names(configuration),
        restart=command.restart,
    ) as run_dir:
        detector = experiment.quantized_detector()
        if not run_dir.has_begun:
            source.check_held_out(experiment)
            source.load(experiment, detector, "detector", stage.starts_from)
        training = DetectorTraining.begin(
            experiment, run_dir, detector, settings, teacher_of(experiment, teacher, settings.distill_weight)
        )
        choose = fixed(configuration)
        _train(training, choose, choose)


@distributed.reporting_lost_processes()
def run_eval(command: Command, experiment: Experiment | None = None) -> None:
    """Measures one way to choose bits on the test split, or compares several."""
    experiment = experiment or start(command, [EVAL])
    names = [command.bits]
    if command.bits in SEVERAL_BITS:
        if command.init is not None:
            raise InputError(
                f"--init names one checkpoint, but --bits {command.bits} compares several; name one --bits"
            )
        names = row_names(command)
    baselines, loader = Baselines(experiment, command), experiment.test_loader()
    initial = initial_checkpoint(command)
    sources = {name: initial or row_source(baselines, name) for name in names}  # all, before the first is measured
    rows = [measured_row(baselines, name, source, loader) for name, source in sources.items()]
    if not distributed.is_writer():
        return
    folder = command.run / EVAL.name
    if command.bits not in SEVERAL_BITS:
        folder = folder / command.bits.replace(":", "_")
    if command.budget is not None:
        folder = folder.with_name(f"{folder.name}_at_{command.budget:g}")
    write_report(folder, rows, loader.annotations, experiment.plain)
    plain = [row.plain() for row in rows]
    log.info("%s", format_table(plain))
    log.info("%s", format_classes(plain[-1]))
    log.info("figures, plot and COCO files: %s", folder)
    log.info("TensorBoard: .venv/bin/tensorboard --logdir %s", command.run)


def start(command: Command, stages: list[Stage]) -> Experiment:
    """Prepares this process, builds the parts of the config and runs the quick checks for `stages`.

    Raises: InputError as `quick_preflight`.
    """
    prepare_process(command.config)
    experiment = Experiment(command.config)
    quick_preflight(experiment, command.run, stages, restart=command.restart)
    return experiment


def prepare_process(config: Config) -> None:
    """Joins the other processes, and sets logging, memory, threads and compilation."""
    distributed.start(config.device)
    level = logging.INFO if distributed.is_writer() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    logging.captureWarnings(capture=True)
    keep_freed_memory()
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    compile_passes(config.runtime.compile)


def _train(
    training: DetectorTraining,
    choose_bits: ChooseBits,
    choose_in_use: ChooseBits,
    policy_gbitops: float = 0.0,
    choose_student: ChooseBits | None = None,
) -> None:
    """Trains to the last epoch under one way to choose bits, and validates under another."""
    for epoch in training.epochs():
        scalars = training.train_epoch(epoch, choose_bits, choose_student)
        scalars |= training.validate_epoch(choose_in_use, policy_gbitops)
        training.save_epoch(scalars, choose_in_use)


def _quantize(experiment: Experiment, source: Checkpoint, detector: SwitchableSSD) -> None:
    """Copies the weights of a full-precision network into `detector`, and calibrates its step sizes."""
    full = experiment.detector(DetectorBits.full_precision())
    source.load(experiment, full, "detector", PRETRAIN_QUANT.starts_from)
    copy_weights(full, detector)
    batch = experiment.calibration_batch()
    choices = experiment.choose_random("calibration")(batch.images, batch.keys)
    with distributed.alone():
        calibrate(detector, lambda: detector(batch.images, choices))


def _calibrate_policy(experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet) -> None:
    """Calibrates the step sizes of a new policy."""
    observation = detector.observe(experiment.calibration_batch().images)
    with distributed.alone():
        calibrate(policy, lambda: policy(observation.input))


def _note_expensive_policy(costs: CostTable, own_gbitops: float) -> None:
    if own_gbitops > CHEAP_POLICY * costs.lowest():
        log.info(
            "note: the policy costs %.3g GBitOps, over %g %% of the cheapest detector's %.3g; policy.width and "
            "policy.pool make it cheaper",
            own_gbitops,
            100 * CHEAP_POLICY,
            costs.lowest(),
        )
