"""How much detection loss each position costs at few bits, measured on images outside the test split.

RUN/pretrain_quant/sensitivity.json   sensitivity of the network before the search, independent of any policy
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from instaqnas import distributed
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.experiment.handover import Checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import PRETRAIN_QUANT
from instaqnas.files import write_text
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.bitops import CostTable

MOST_IMAGES = 512  # that a loss is measured on
LOSS_FORMULA = "2"  # raise it whenever the same network and images give other losses: records are found anew
ANY = -1  # in place of a choice: a random one for every image

Configuration = Sequence[int]  # the index of a choice at each of L positions, or ANY
MeanLoss = Callable[[Configuration], float]


class Extremes(NamedTuple):
    """Two bit configurations, each the index of a choice at each of L positions."""

    cheapest: list[int]
    most_expensive: list[int]


def cheapest_and_most_expensive(costs: CostTable) -> Extremes:
    """The configurations that cost least and most; among equal choices the first."""
    rows = costs.table.tolist()
    return Extremes([row.index(min(row)) for row in rows], [row.index(max(row)) for row in rows])


@dataclass(frozen=True)
class Sensitivity:
    """Mean losses [L][K] with one position at each choice, and all others at random choices or at the cheapest.

    The network was trained under random choices mostly, and its BatchNorm statistics belong to them.
    """

    among_random: list[list[float]]
    from_cheapest: list[list[float]]

    @property
    def mean(self) -> list[list[float]]:
        """Means of both, [L][K]."""
        tables = zip(self.among_random, self.from_cheapest, strict=True)
        return [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in tables]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PretrainedLoss:
    """The quantized network of a pretraining, ready for measuring.

    Args:
        source: its checkpoint.
        costs: GBitOps of its configurations.
        mean_loss: mean loss under a configuration.
    """

    source: Checkpoint
    costs: CostTable
    mean_loss: MeanLoss


def pretrained_loss(experiment: Experiment, source: Checkpoint) -> PretrainedLoss:
    """Measures losses of the network of a checkpoint of `pretrain_quant` on the tuning split.

    Raises: InputError if the checkpoint does not fit.
    """
    detector = experiment.quantized_detector().eval()
    source.load(experiment, detector, "detector", (PRETRAIN_QUANT.kind,))
    random_bits = experiment.choose_random("sensitivity")
    mean_loss = mean_loss_on(detector, experiment.tuning_loader(), random_bits, experiment.device)
    return PretrainedLoss(source, detector_costs(detector), mean_loss)


def sensitivity_of(experiment: Experiment, pretrained: PretrainedLoss) -> Sensitivity:
    """Sensitivity of a pretrained network; measured once and kept next to its checkpoint.

    Raises: InputError if the file that keeps it is damaged.
    """
    found_for = {
        "formula": LOSS_FORMULA,
        "network": pretrained.source.digest,
        "split": experiment.tuning_split,
        "images": experiment.images_digest(experiment.tuning_annotations()),
    }
    path = pretrained.source.path.parent / "sensitivity.json"
    record = read_record(path, found_for)
    if record is None:
        sensitivity = measured_sensitivity(pretrained.costs, pretrained.mean_loss)
        record = {"found_for": found_for, "positions": list(pretrained.costs.positions), **sensitivity.plain()}
        write_record(path, record)
    return Sensitivity(record["among_random"], record["from_cheapest"])


def first_images(loader: DetectionLoader, device: torch.device) -> list[Batch]:
    """This process's share of the first `MOST_IMAGES` images of a loader in order, on `device`."""
    kept = []
    for batch in loader:
        if min(key.index for key in batch.keys) >= MOST_IMAGES:
            break
        kept.append(batch.first(sum(key.index < MOST_IMAGES for key in batch.keys)).to(device))
    return kept


def mean_loss_on(
    detector: SwitchableSSD, loader: DetectionLoader, random_bits: ChooseBits, device: torch.device
) -> MeanLoss:
    """A function from a bit configuration to the mean loss of `detector` on the first `MOST_IMAGES` images.

    The loss is the multibox loss of each image alone, see `SwitchableSSD.image_losses`.

    Args:
        detector: in eval mode whenever the function is called.
        loader: images in order, without augmentation.
        random_bits: draws the choices in place of `ANY`, the same on every call.
        device: of the detector.
    """
    batches = first_images(loader, device)

    @torch.no_grad()
    def mean_loss(configuration: Configuration) -> float:
        wanted = torch.tensor(configuration, device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of images
        for batch in batches:
            choices = torch.where(wanted == ANY, random_bits(batch.images, batch.keys), wanted)
            output = detector(batch.images, choices)
            losses = detector.image_losses(output, batch.boxes_xyxy, batch.labels, batch.difficult)
            sums += torch.stack([losses.double().sum(), sums.new_tensor(len(losses))])
        loss, images = distributed.total(sums).tolist()
        return loss / images

    return mean_loss


def losses_around(base: Configuration, choices: int, mean_loss: MeanLoss) -> list[list[float]]:
    """Mean losses [L][K] with one position at each of K choices and all others as in `base`."""
    of_base = mean_loss(base)
    rows = []
    for position in distributed.progress_bar(range(len(base)), "sensitivity"):
        row = []
        for choice in range(choices):
            changed = [*base[:position], choice, *base[position + 1 :]]
            row.append(of_base if changed == list(base) else mean_loss(changed))
        rows.append(row)
    return rows


def measured_sensitivity(costs: CostTable, mean_loss: MeanLoss) -> Sensitivity:
    """Losses among random configurations, and around the cheapest one."""
    positions, choices = costs.table.shape
    among_random = losses_around([ANY] * positions, choices, mean_loss)
    from_cheapest = losses_around(cheapest_and_most_expensive(costs).cheapest, choices, mean_loss)
    return Sensitivity(among_random, from_cheapest)


def read_record(path: Path, found_for: dict[str, str]) -> dict[str, Any] | None:
    """Content of a JSON file; None if it is missing or was found for something else.

    Raises: InputError if it is damaged.
    """
    try:
        record = json.loads(path.read_text())
        return record if record["found_for"] == found_for else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; remove it, and it will be made again") from None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON file that `read_record` reads; the first process writes, the others wait."""
    if distributed.is_writer():
        write_text(path, json.dumps(record, indent=1) + "\n")
    distributed.barrier()
