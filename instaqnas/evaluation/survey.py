"""Runs a policy on all images of a split and summarises its choices: entropy, frequencies, rank correlations."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instaqnas import distributed
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.policy.diagnostics import (
    choice_frequencies,
    distinct_configurations,
    modal_configuration,
    mutual_information,
    position_entropy,
    rank_correlation,
)
from instaqnas.policy.network import PolicyNet
from instaqnas.quant.bitops import CostTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Logits of a policy and difficulty measures of N images, in the order of the data set.

    Args:
        logits: of the policy in eval mode, [N, L, K], on the CPU.
        difficulty: from the data set, [N]; NaN if unknown.
        objects: number of objects, [N].
        smallest_side: shortest side of any object in pixels of the network's input, [N]; NaN without objects.
    """

    logits: Tensor
    difficulty: Tensor
    objects: Tensor
    smallest_side: Tensor


@torch.no_grad()
def survey(policy: PolicyNet, detector: SwitchableSSD, loader: DetectionLoader, device: torch.device) -> Survey:
    """Runs `policy` in eval mode on every image of `loader`; every process gets all images.

    Args:
        policy: its training mode is restored.
        detector: only computes the input of the policy.
        loader: images in order; this process's share of each batch.
        device: of policy and detector.
    """
    was_training = policy.training
    policy.eval()
    share = []
    for batch in distributed.progress_bar(loader, "survey"):
        logits = policy(detector.observe(batch.images.to(device)).input).cpu()
        indices = torch.tensor([key.index for key in batch.keys])
        share.append((indices, logits, batch.objects.double(), batch.smallest_side.double()))
    policy.train(was_training)
    shares = distributed.gathered(share)
    joined = None
    if shares is not None:
        parts = [part for own in shares for part in own]
        order = torch.cat([part[0] for part in parts]).argsort()
        joined = [torch.cat([part[column] for part in parts])[order] for column in (1, 2, 3)]
    logits, objects, smallest_side = distributed.from_writer(joined)
    difficulty = torch.tensor([a.difficulty for a in loader.annotations], dtype=torch.float64)
    return Survey(logits, difficulty, objects, smallest_side)


@dataclass(frozen=True)
class Diagnosis:
    """Figures of a policy on the N images of a survey.

    Args:
        images: N.
        entropy: of each of L positions in nats, see `instaqnas.policy.diagnostics`.
        mutual_information: of each of L positions in nats, likewise.
        frequencies: fraction of images whose most likely choice is k, [L][K].
        modal: the most frequent configuration.
        distinct: number of different configurations.
        rank_correlation: of an image's GBitOps with its `difficulty`, its number of `objects`, and the negative of its
            `smallest_side`; NaN if one of them is unknown or constant.
        gbitops: mean, policy included.
        target_gbitops: target of the reward `budget`, else None.
    """

    images: int
    entropy: list[float]
    mutual_information: list[float]
    frequencies: list[list[float]]
    modal: list[int]
    distinct: int
    rank_correlation: dict[str, float]
    gbitops: float
    target_gbitops: float | None

    @property
    def mean_entropy(self) -> float:
        """Mean over positions."""
        return sum(self.entropy) / len(self.entropy)

    @property
    def mean_mutual_information(self) -> float:
        """Mean over positions."""
        return sum(self.mutual_information) / len(self.mutual_information)

    @property
    def cost_to_target(self) -> float:
        """Mean cost as a multiple of the target, NaN without one."""
        return self.gbitops / self.target_gbitops if self.target_gbitops else math.nan

    def plain(self) -> dict[str, Any]:
        """Plain values for report.json, which adds `modal` by the names of the choices."""
        return {
            "images": self.images,
            "entropy": self.entropy,
            "entropy_mean": self.mean_entropy,
            "mutual_information": self.mutual_information,
            "mutual_information_mean": self.mean_mutual_information,
            "choice_frequencies": self.frequencies,
            "distinct_configs": self.distinct,
            "rank_correlation": self.rank_correlation,
            "gbitops_total": self.gbitops,
            "target_gbitops": self.target_gbitops,
            "cost_to_target": self.cost_to_target,
        }

    def scalars(self) -> dict[str, float]:
        """Figures over all positions by name; NaN values are left out."""
        found = {
            "entropy": self.mean_entropy,
            "mutual_information": self.mean_mutual_information,
            "distinct_configs": float(self.distinct),
            "gbitops": self.gbitops,
            "cost_to_target": self.cost_to_target,
            **{f"rank_correlation_{name}": value for name, value in self.rank_correlation.items()},
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def position_scalars(self) -> dict[str, float]:
        """Figures of each position by name."""
        columns = {"entropy": self.entropy, "mutual_information": self.mutual_information}
        return {f"{name}/position_{place:02d}": v for name, row in columns.items() for place, v in enumerate(row)}

    def log_collapse(self, split: str) -> None:
        """Logs one line if all images, more than one, get the same bits."""
        if self.distinct == 1 and self.images > 1:
            log.info("collapsed policy: one configuration for all %d images of %s", self.images, split)


def diagnose(found: Survey, costs: CostTable, policy_gbitops: float, target_gbitops: float | None) -> Diagnosis:
    """Summarises a survey.

    Args:
        found: the survey.
        costs: GBitOps of the detector's configurations.
        policy_gbitops: GBitOps of the policy per image.
        target_gbitops: see `Diagnosis`.
    """
    probabilities, choices = found.logits.double().softmax(-1), found.logits.argmax(-1)
    gbitops = costs.gbitops(choices)
    hard = {"difficulty": found.difficulty, "objects": found.objects, "smallest_side": -found.smallest_side}
    return Diagnosis(
        images=len(choices),
        entropy=position_entropy(probabilities).tolist(),
        mutual_information=mutual_information(probabilities).tolist(),
        frequencies=choice_frequencies(choices, probabilities.shape[-1]).tolist(),
        modal=modal_configuration(choices).tolist(),
        distinct=distinct_configurations(choices),
        rank_correlation={name: rank_correlation(gbitops, values) for name, values in hard.items()},
        gbitops=gbitops.mean().item() + policy_gbitops,
        target_gbitops=target_gbitops,
    )
