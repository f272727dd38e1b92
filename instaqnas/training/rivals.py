"""What a policy is compared with: fixed bit configurations, how they are found, and how they are trained.

RUN/pretrain_quant/sensitivity.json   of the network before the search, whatever the policy
RUN/static.json                       the best fixed configuration at the policy's cost, and how it was found

Nothing here looks at the test split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from instaqnas.config import Command, Config
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import detector_costs, position_count
from instaqnas.errors import InputError
from instaqnas.policy.diagnostics import choice_frequencies, modal_configuration
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.training import distributed
from instaqnas.training.experiment import (
    POLICY_STAGES,
    Experiment,
    check_search,
    latest_policy_checkpoint,
    load_network,
    pretrained_checkpoint,
)
from instaqnas.training.report import choice_name
from instaqnas.training.run_dir import file_digest, kind_of, write_text
from instaqnas.training.sensitivity import MeanLoss, Sensitivity, mean_loss_on, measured_sensitivity
from instaqnas.training.static_search import Candidate, best_within
from instaqnas.training.survey import Survey, survey

# The sections whose epochs a detector was trained for after pretraining, by the kind of its stage.
FURTHER_SECTIONS = {"search": ("search",), "finetune": ("search", "finetune"), "finetune_fixed": ("finetune",)}


@dataclass(frozen=True)
class Habits:
    """What a greedy policy does with the images of a split.

    Args:
        choices: the configuration it picks for each of the N images, [N, L].
        frequencies: how often it picks each choice at each position, float64 [L, K].
        modal: its most frequent bit configuration.
        gbitops: mean GBitOps of detector and policy.
    """

    choices: Tensor
    frequencies: Tensor
    modal: list[int]
    gbitops: float


def fixed_stage(bits: str) -> str:
    """The stage that trains under the fixed configuration `static`, `modal` or `uniform:w3a4`: finetune_static..."""
    return f"finetune_{bits.replace(':', '_')}"


def fixed_config(config: Config) -> Config:
    """`config` with the section `finetune` that a detector under a fixed configuration follows.

    If the search trains the detector, that has as many epochs as search and finetuning together, in one cosine from the
    higher of the two learning rates, and distills if one of them does; all else is as in `finetune`. If it does not,
    the section stays as it is.
    """
    search, finetune = config.search, config.finetune
    if not search.train_detector:
        return config
    section = replace(
        finetune,
        epochs=search.epochs + finetune.epochs,
        lr=max(search.lr, finetune.lr),
        distill_weight=max(search.distill_weight, finetune.distill_weight),
    )
    return replace(config, finetune=section)


def further_epochs(state: dict[str, Any]) -> int:
    """Epochs that the detector of a checkpoint was trained for after pretraining, up to that checkpoint."""
    names, count = FURTHER_SECTIONS.get(kind_of(state["stage"]), ()), 0
    for name in names:
        section = state["config"][name]
        if section.get("train_detector", True):
            count += state["epoch"] if name == names[-1] else section["epochs"]
    return count


class Rivals:
    """The fixed configurations of one run.

    Args:
        experiment: the parts.
        command: names the run.
    """

    def __init__(self, experiment: Experiment, command: Command) -> None:
        self.experiment, self.command = experiment, command

    def configuration(self, bits: str) -> list[int]:
        """The index of a choice at each position, for `static`, `modal` or `uniform:w3a4`.

        Raises: InputError if that needs a policy or a pretrained network that the run does not have.
        """
        match bits:
            case "static":
                return self._static()
            case "modal":
                return self.habits.modal
        names = [choice_name(choice) for choice in self.experiment.config.bits.choices]
        return [names.index(bits.removeprefix("uniform:"))] * position_count(self.experiment.config.bits.positions)

    def names(self, configuration: Sequence[int]) -> list[str]:
        """Such as w3a4, of every position."""
        return [choice_name(self.experiment.config.bits.choices[choice]) for choice in configuration]

    @cached_property
    def policy(self) -> PolicyNet:
        """The run's latest policy, in eval mode."""
        policy = self.experiment.policy()
        source = latest_policy_checkpoint(self.command)
        check_search(self.experiment.config, source)
        load_network(self.experiment, policy, "policy", source, stages=POLICY_STAGES)
        return policy.eval()

    @cached_property
    def habits(self) -> Habits:
        """What the policy does with `Experiment.tuning_split`."""
        detector = self.experiment.adaptive_detector()
        choices = self.survey(self.experiment.tuning_loader()).logits.argmax(-1)
        return Habits(
            choices,
            choice_frequencies(choices, len(detector.choices)),
            modal_configuration(choices).tolist(),
            detector_costs(detector).gbitops(choices).mean().item() + policy_gbitops(self.policy, detector.image_size),
        )

    def survey(self, loader: DetectionLoader) -> Survey:
        """What the policy makes of the images of a split, in their order."""
        detector = self.experiment.adaptive_detector().eval()
        source = latest_policy_checkpoint(self.command)
        load_network(self.experiment, detector, "detector", source, stages=POLICY_STAGES)
        return survey(self.policy, detector, loader, self.experiment.device)

    def _static(self) -> list[int]:
        """That of static.json if it was found for this policy and network; else it is searched for."""
        source = pretrained_checkpoint(self.command)
        found_for = {
            "network": file_digest(source),
            "policy": _digest(self.policy),
            "split": self.experiment.tuning_split,
        }
        path = self.command.run / "static.json"
        record = _read_record(path, found_for)
        if record is None:
            record = self._search_static(source, found_for)
            _write_record(path, record)
        names = self.names(range(len(self.experiment.config.bits.choices)))
        return [names.index(name) for name in record["configuration"]]

    def _search_static(self, source: Path, found_for: dict[str, str]) -> dict[str, Any]:
        found = fixed_within(self.experiment, source, self.habits.gbitops)
        return {
            "found_for": found_for,
            "limit_gbitops": self.habits.gbitops,
            "gbitops": found[0].gbitops,
            "configuration": self.names(found[0].configuration),
            "candidates": [{**c.plain(), "configuration": self.names(c.configuration)} for c in found],
        }


def fixed_within(experiment: Experiment, source: Path, limit_gbitops: float) -> list[Candidate]:
    """Fixed configurations of at most `limit_gbitops` for the pretrained network of a checkpoint, best first.

    See `static_search`.
    """
    costs, mean_loss = _measuring(experiment, source)
    return best_within(limit_gbitops, costs, _sensitivity(experiment, source, costs, mean_loss), mean_loss)


def sensitivity_of(experiment: Experiment, source: Path) -> Sensitivity:
    """That of the pretrained network of a checkpoint; it is measured once and kept beside the checkpoint."""
    return _sensitivity(experiment, source, *_measuring(experiment, source))


def _measuring(experiment: Experiment, source: Path) -> tuple[CostTable, MeanLoss]:
    """Costs of a checkpoint's network, and what measures its loss."""
    detector = experiment.quantized_detector().eval()
    load_network(experiment, detector, "detector", source, stages=("pretrain_quant",))
    batch_size = experiment.config.eval.batch_size
    random_bits = experiment.choose_random("sensitivity")
    mean_loss = mean_loss_on(detector, experiment.tuning_loader(), batch_size, random_bits, experiment.device)
    return detector_costs(detector), mean_loss


def _sensitivity(experiment: Experiment, source: Path, costs: CostTable, mean_loss: MeanLoss) -> Sensitivity:
    found_for = {"network": file_digest(source), "split": experiment.tuning_split}
    path = source.parent / "sensitivity.json"
    record = _read_record(path, found_for)
    if record is None:
        sensitivity = measured_sensitivity(costs, mean_loss)
        record = {"found_for": found_for, "positions": list(costs.positions), **sensitivity.plain()}
        _write_record(path, record)
    return Sensitivity(record["among_random"], record["from_cheapest"])


def _digest(network: nn.Module) -> str:
    """SHA-256 of the weights, which search and finetuning have in common for a policy."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_record(path: Path, found_for: dict[str, str]) -> dict[str, Any] | None:
    """What a JSON file holds; None if there is none, or if it was found for something else.

    Raises: InputError if it is damaged.
    """
    try:
        record = json.loads(path.read_text())
        return record if record["found_for"] == found_for else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; remove it, and it will be made again") from None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    if distributed.is_writer():
        write_text(path, json.dumps(record, indent=1) + "\n")
    distributed.barrier()
