"""The rows of a comparison: each way to choose bits, and the detector it is measured with.

row                             detector, unless one was trained under that very configuration (finetune.py --bits)
fp32                            full-precision training
uniform:..., static, random     quantized pretraining, which has trained all configurations; with `bits.positions`
                                network the policy's, whose levels are part of one adaptive detector
policy                          the policy's own: of the search, or of the finetuning after it
shuffled, frequencies, modal    the policy's, trained under these choices as long as under the policy
"""

from __future__ import annotations

import logging

from instaqnas.bits import FP32, FREQUENCIES, MODAL, POLICY, RANDOM, SHUFFLED, STATIC, uniform_name
from instaqnas.config.command import BASIC_ROWS, Command
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import DetectorBits, detector_costs
from instaqnas.errors import InputError
from instaqnas.evaluation.baselines import Baselines
from instaqnas.evaluation.measure import evaluate
from instaqnas.evaluation.report import ReportRow
from instaqnas.evaluation.survey import diagnose, survey
from instaqnas.experiment.handover import (
    Checkpoint,
    best_checkpoint,
    finished_checkpoint,
    has_policy,
)
from instaqnas.experiment.stage import (
    FULL_PRECISION_KINDS,
    POLICY_KINDS,
    PRETRAIN_FP32,
    QUANTIZED_KINDS,
    SEARCH,
    fixed_config,
    fixed_stage,
)
from instaqnas.policy.bit_config import fixed, greedy_by, handed_out, with_frequencies
from instaqnas.policy.network import policy_gbitops

log = logging.getLogger(__name__)
SEARCH_METRICS = ("reward/", "quality/", "policy/multiplier")  # of the search, shown with its policy


def row_names(command: Command) -> list[str]:
    """The ways to choose bits of `--bits basic` or `all` that the run has networks for; notes name the others."""
    names = [*(uniform_name(name) for name in command.config.bits.names), RANDOM]
    if best_checkpoint(command.run, PRETRAIN_FP32).exists():
        names.insert(0, FP32)
    else:
        log.info("note: no row %s, %s has no full-precision training", FP32, command.run)
    of_policy = [POLICY] if command.bits == BASIC_ROWS else [SHUFFLED, FREQUENCIES, MODAL, STATIC, POLICY]
    if has_policy(command.run):
        names += of_policy
    else:
        log.info("note: no policy (%s): %s has no search", ", ".join(of_policy), command.run)
    return names


def row_source(baselines: Baselines, name: str) -> Checkpoint:
    """The checkpoint of the detector of a row.

    Raises: InputError if it was not trained, or not to the end, or under a fixed configuration that has changed since.
    """
    command, config, stage = baselines.command, baselines.command.config, fixed_stage(name)
    if best_checkpoint(command.run, stage).exists():
        checkpoint = finished_checkpoint(command.run, stage, fixed_config(config), f"finetune.py --bits {name}")
        _check_configuration(checkpoint, baselines, name)
        return checkpoint
    if name == FP32:
        return finished_checkpoint(command.run, PRETRAIN_FP32, config)
    adaptive = config.bits.positions == "network" and has_policy(command.run)
    if adaptive or name in (POLICY, SHUFFLED, FREQUENCIES, MODAL):
        return baselines.policy_source
    return baselines.pretrained


def measured_row(baselines: Baselines, name: str, source: Checkpoint, loader: DetectionLoader) -> ReportRow:
    """Figures of one way to choose bits with the detector of a checkpoint.

    Args:
        baselines: of the run.
        name: of the row, as in `--bits`.
        source: checkpoint of the detector.
        loader: of the test split.

    Raises: InputError if the checkpoint is of another config.
    """
    experiment = baselines.experiment
    if name == FP32:
        detector = experiment.detector(DetectorBits.full_precision())
        source.load(experiment, detector, "detector", FULL_PRECISION_KINDS)
        report = evaluate(experiment, detector, loader, experiment.choose_fixed(detector))
        return ReportRow(name, source.path, detector.choice_names, report, source.further_epochs)
    if name == POLICY:
        return _policy_row(baselines, source, loader)
    detector = experiment.quantized_detector()
    source.load(experiment, detector, "detector", QUANTIZED_KINDS)
    if name == RANDOM:
        choose = experiment.choose_random("eval")
    elif name == SHUFFLED:
        choose = handed_out(baselines.statistics.choices, experiment.draw(SHUFFLED))
    elif name == FREQUENCIES:
        choose = with_frequencies(baselines.statistics.frequencies, experiment.draw(FREQUENCIES))
    else:
        choose = fixed(baselines.configuration(name))
    report = evaluate(experiment, detector, loader, choose)
    return ReportRow(name, source.path, detector.choice_names, report, source.further_epochs)


def _policy_row(baselines: Baselines, source: Checkpoint, loader: DetectionLoader) -> ReportRow:
    experiment = baselines.experiment
    detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
    source.load(experiment, detector, "detector", POLICY_KINDS)
    source.load(experiment, policy, "policy", POLICY_KINDS)
    reward, cost = experiment.config.reward, policy_gbitops(policy, detector.image_size)
    target = reward.target_gbitops if reward.name == "budget" else None
    if baselines.command.budget is not None:
        target = baselines.command.budget
        source.shift_to_budget(policy, detector_costs(detector), target)
    report = evaluate(experiment, detector, loader, greedy_by(policy), cost)
    diagnosis = diagnose(
        survey(policy, detector, loader, experiment.device),
        detector_costs(detector),
        cost,
        target,
    )
    diagnosis.log_collapse("the test split")
    found = _search_metrics(baselines.command)
    return ReportRow(POLICY, source.path, detector.choice_names, report, source.further_epochs, diagnosis, found)


def _search_metrics(command: Command) -> dict[str, float]:
    """The last rewards, qualities and multiplier of the run's search; empty for a policy that comes by `--init`."""
    path = best_checkpoint(command.run, SEARCH)
    if command.init is not None or not path.exists():
        return {}
    metrics = Checkpoint.read(path).state["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith(SEARCH_METRICS)}


def _check_configuration(checkpoint: Checkpoint, baselines: Baselines, bits: str) -> None:
    """Raises InputError if a detector was finetuned under another configuration than `bits` has now."""
    if checkpoint.state["configuration"] != baselines.names(baselines.configuration(bits)):
        raise InputError(
            f"{checkpoint.path}: finetuned under another configuration than {bits} has now, of another policy or "
            f"network; repeat finetune.py --bits {bits} with --restart"
        )
