"""The rows of a comparison: the ways to choose bits, and the detector that each of them runs on.

row                      detector, if it was not trained under that very configuration (finetune.py --bits)
fp32                     of the full-precision training
uniform:..., static      of the quantized training, which knows all configurations; also what finetuning starts from
random                   the same
policy                   its own: of the search, which may have trained it along, then finetuned
shuffled, frequencies,   the policy's: it has seen these choices for as long as the policy has been trained
modal
"""

from __future__ import annotations

import logging
from pathlib import Path

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config import Command
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import DetectorBits, detector_costs
from instaqnas.errors import InputError
from instaqnas.policy.bit_config import fixed, greedy_by, handed_out, with_frequencies
from instaqnas.policy.network import policy_gbitops
from instaqnas.training.experiment import (
    FULL_PRECISION_STAGES,
    POLICY_STAGES,
    QUANTIZED_STAGES,
    Experiment,
    finished_checkpoint,
    has_policy,
    latest_policy_checkpoint,
    load_network,
    pretrained_checkpoint,
)
from instaqnas.training.report import ReportRow, choice_name
from instaqnas.training.rivals import Rivals, fixed_config, fixed_stage, further_epochs
from instaqnas.training.run_dir import best_checkpoint
from instaqnas.training.survey import diagnose, survey

log = logging.getLogger(__name__)
OF_SEARCH = ("reward/", "quality/", "policy/multiplier")


def row_names(command: Command) -> list[str]:
    """The ways to choose bits of `--bits basic` or `all` that the run has networks for; a note tells what it lacks."""
    names = [*(f"uniform:{choice_name(choice)}" for choice in command.config.bits.choices), "random"]
    if best_checkpoint(command.run, "pretrain_fp32").exists():
        names.insert(0, "fp32")
    else:
        log.info("note: no row fp32, %s has no full-precision training", command.run)
    of_policy = ["policy"] if command.bits == "basic" else ["shuffled", "frequencies", "modal", "static", "policy"]
    if has_policy(command.run):
        names += of_policy
    else:
        log.info("note: no policy (%s): %s has no search", ", ".join(of_policy), command.run)
    return names


def row_source(rivals: Rivals, name: str) -> Path:
    """The checkpoint of the detector of a row.

    Raises: InputError if it has not been trained, or not to the end, or under a fixed configuration that is not the one
        to compare with any more.
    """
    command, config = rivals.command, rivals.command.config
    if best_checkpoint(command.run, fixed_stage(name)).exists():
        settings = fixed_config(config).finetune
        path = finished_checkpoint(command.run, fixed_stage(name), settings, f"finetune.py --bits {name}")
        _check_configuration(path, rivals, name)
        return path
    match name:
        case "fp32":
            return finished_checkpoint(command.run, "pretrain_fp32", config.pretrain_fp32, "pretrain.py")
        case "policy" | "shuffled" | "frequencies" | "modal":
            return latest_policy_checkpoint(command)
        case _:
            return pretrained_checkpoint(command)


def measured_row(rivals: Rivals, name: str, source: Path, loader: DetectionLoader) -> ReportRow:
    """The figures of a way to choose bits with the detector of a checkpoint.

    Raises: InputError if the checkpoint is of another config.
    """
    experiment, epochs = rivals.experiment, further_epochs(load_checkpoint(source))
    if name == "fp32":
        detector = experiment.detector(DetectorBits.full_precision())
        load_network(experiment, detector, "detector", source, stages=FULL_PRECISION_STAGES)
        report = experiment.evaluate(detector, loader, experiment.choose_fixed(detector))
        return ReportRow(name, source, detector.choices, report, epochs)
    if name == "policy":
        return _row_of_policy(experiment, source, loader, epochs, _of_search(rivals.command))
    detector = experiment.quantized_detector()
    load_network(experiment, detector, "detector", source, stages=QUANTIZED_STAGES)
    match name:
        case "random":
            choose = experiment.choose_random("eval")
        case "shuffled":
            choose = handed_out(rivals.habits.choices, experiment.draw("shuffled"))
        case "frequencies":
            choose = with_frequencies(rivals.habits.frequencies, experiment.draw("frequencies"))
        case _:
            choose = fixed(rivals.configuration(name))
    return ReportRow(name, source, detector.choices, experiment.evaluate(detector, loader, choose), epochs)


def _row_of_policy(
    experiment: Experiment, source: Path, loader: DetectionLoader, epochs: int, search: dict[str, float]
) -> ReportRow:
    detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
    load_network(experiment, detector, "detector", source, stages=POLICY_STAGES)
    load_network(experiment, policy, "policy", source, stages=POLICY_STAGES)
    reward, cost = experiment.config.reward, policy_gbitops(policy, detector.image_size)
    report = experiment.evaluate(detector, loader, greedy_by(policy), cost)
    diagnosis = diagnose(
        survey(policy, detector, loader, experiment.device),
        detector_costs(detector),
        cost,
        reward.target_gbitops if reward.name == "budget" else None,
    )
    diagnosis.log_collapse("the test split")
    return ReportRow("policy", source, detector.choices, report, epochs, diagnosis, search)


def _of_search(command: Command) -> dict[str, float]:
    """What the run's search has logged last of rewards; nothing for a policy that comes by `--init`."""
    path = best_checkpoint(command.run, "search")
    if command.init or not path.exists():
        return {}
    return {name: value for name, value in load_checkpoint(path)["metrics"].items() if name.startswith(OF_SEARCH)}


def _check_configuration(path: Path, rivals: Rivals, bits: str) -> None:
    """Raises InputError if a checkpoint was finetuned under another configuration than the one that `bits` is now."""
    if load_checkpoint(path)["configuration"] != rivals.names(rivals.configuration(bits)):
        raise InputError(
            f"{path}: finetuned under another configuration than what {bits} is now, of another policy or network; "
            f"repeat finetune.py --bits {bits} with --restart"
        )
