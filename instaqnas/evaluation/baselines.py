"""Baselines of a policy: fixed bit configurations, and statistics of the policy's own choices.

RUN/static.json   the best fixed configuration at the policy's cost, and how it was found

Nothing here reads the test split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from instaqnas.bits import MODAL, STATIC, uniform_name
from instaqnas.config.command import Command
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import detector_costs, position_count
from instaqnas.evaluation.sensitivity import (
    LOSS_FORMULA,
    PretrainedLoss,
    pretrained_loss,
    read_record,
    sensitivity_of,
    write_record,
)
from instaqnas.evaluation.static_search import Candidate, best_within
from instaqnas.evaluation.survey import Survey, survey
from instaqnas.experiment.handover import Checkpoint, latest_policy_checkpoint, pretrained_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import POLICY_KINDS
from instaqnas.policy.diagnostics import choice_frequencies, modal_configuration
from instaqnas.policy.network import PolicyNet, policy_gbitops


@dataclass(frozen=True)
class PolicyStatistics:
    """Choices of a greedy policy on the images of a split.

    Args:
        choices: its bit configuration for each of N images, [N, L].
        frequencies: how often it takes each choice at each position, float64 [L, K].
        modal: its most frequent bit configuration.
        gbitops: mean GBitOps of detector and policy.
    """

    choices: Tensor
    frequencies: Tensor
    modal: list[int]
    gbitops: float


class Baselines:
    """Baselines of the policy of one run.

    Args:
        experiment: parts of the config.
        command: names the run.
    """

    def __init__(self, experiment: Experiment, command: Command) -> None:
        self.experiment, self.command = experiment, command

    def configuration(self, bits: str) -> list[int]:
        """The index of a choice at each position, for `static`, `modal` or `uniform:w3a4`.

        Raises: InputError if the run lacks the policy or the pretrained network that this needs.
        """
        if bits == STATIC:
            return self._static()
        if bits == MODAL:
            return self.statistics.modal
        names = [uniform_name(name) for name in self.experiment.config.bits.names]
        return [names.index(bits)] * position_count(self.experiment.config.bits.positions)

    def names(self, configuration: Sequence[int]) -> list[str]:
        """Name of the choice at every position, such as w3a4."""
        return [self.experiment.config.bits.names[choice] for choice in configuration]

    @cached_property
    def policy_source(self) -> Checkpoint:
        """The run's latest checkpoint with a policy.

        Raises: InputError if there is none, or the stage has not ended.
        """
        return latest_policy_checkpoint(self.command)

    @cached_property
    def policy(self) -> PolicyNet:
        """The run's latest policy, in eval mode, at the command's budget.

        Raises: InputError if it has no such budget, or if its search trained the detector and the search of the config
            does not, or the reverse.
        """
        self.policy_source.check_search(self.experiment.config)
        policy = self.experiment.policy()
        self.policy_source.load(self.experiment, policy, "policy", POLICY_KINDS)
        if self.command.budget is not None:
            costs = detector_costs(self.experiment.adaptive_detector())
            self.policy_source.shift_to_budget(policy, costs, self.command.budget)
        return policy.eval()

    @cached_property
    def statistics(self) -> PolicyStatistics:
        """Choices of the policy on `Experiment.tuning_split`."""
        detector = self.experiment.adaptive_detector()
        choices = self.survey(self.experiment.tuning_loader()).logits.argmax(-1)
        return PolicyStatistics(
            choices,
            choice_frequencies(choices, len(detector.choice_names)),
            modal_configuration(choices).tolist(),
            detector_costs(detector).gbitops(choices).mean().item() + policy_gbitops(self.policy, detector.image_size),
        )

    def survey(self, loader: DetectionLoader) -> Survey:
        """Runs the policy on the images of a split."""
        detector = self.experiment.adaptive_detector().eval()
        self.policy_source.load(self.experiment, detector, "detector", POLICY_KINDS)
        return survey(self.policy, detector, loader, self.experiment.device)

    @cached_property
    def pretrained(self) -> Checkpoint:
        """The run's quantized pretraining."""
        return pretrained_checkpoint(self.command)

    def _static(self) -> list[int]:
        """The configuration of static.json if it was found for this policy and network; else it is searched for."""
        found_for = {
            "formula": LOSS_FORMULA,
            "network": self.pretrained.digest,
            "policy": _digest(self.policy),
            "split": self.experiment.tuning_split,
        }
        path = self.command.run / "static.json"
        record = read_record(path, found_for)
        if record is None:
            record = self._search_static(found_for)
            write_record(path, record)
        names = self.experiment.config.bits.names
        return [names.index(name) for name in record["configuration"]]

    def _search_static(self, found_for: dict[str, str]) -> dict[str, Any]:
        limit = self.statistics.gbitops
        found = fixed_within(self.experiment, pretrained_loss(self.experiment, self.pretrained), limit)
        return {
            "found_for": found_for,
            "limit_gbitops": limit,
            "gbitops": found[0].gbitops,
            "configuration": self.names(found[0].configuration),
            "candidates": [{**c.plain(), "configuration": self.names(c.configuration)} for c in found],
        }


def fixed_within(experiment: Experiment, pretrained: PretrainedLoss, limit_gbitops: float) -> list[Candidate]:
    """Fixed configurations of at most `limit_gbitops` for a pretrained network, best first; see `static_search`."""
    sensitivity = sensitivity_of(experiment, pretrained)
    return best_within(limit_gbitops, pretrained.costs, sensitivity, pretrained.mean_loss)


def _digest(network: nn.Module) -> str:
    """SHA-256 of the weights, equal for the policies of a search and of the finetuning that follows it."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()
