"""How much detection loss each position costs at few bits, on images that the detector has not been tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.bitops import CostTable
from instaqnas.ranks import total
from instaqnas.training import distributed

MOST_IMAGES = 512  # that a loss is measured on, rounded up to whole batches

ANY = -1  # instead of a choice: a random one for every image
Configuration = Sequence[int]  # the index of a choice at each of L positions, or ANY
MeanLoss = Callable[[Configuration], float]


@dataclass(frozen=True)
class Sensitivity:
    """Mean losses [L][K] with one position at each choice and all others at random ones, or at the cheapest.

    Random ones are what BatchNorm has its statistics of, and what the network has seen most, but for `sandwich`.
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


def mean_loss_on(
    detector: SwitchableSSD, batches: Iterable[Batch], batch_size: int, random_bits: ChooseBits, device: torch.device
) -> MeanLoss:
    """A function from a bit configuration to the mean loss of `detector`, in eval mode, on the first images.

    The loss is the multibox loss of each image alone, see `SwitchableSSD.image_losses`.

    Args:
        detector: it is in eval mode whenever the function is called.
        batches: this process's shares of batches without augmentation; as many are kept as make `MOST_IMAGES` images.
        batch_size: images of a batch, those of all processes.
        random_bits: what `ANY` comes from, the same every time.
        device: where the detector is.
    """
    kept = [batch.to(device) for batch in islice(batches, -(-MOST_IMAGES // batch_size))]

    @torch.no_grad()
    def mean_loss(configuration: Configuration) -> float:
        wanted = torch.tensor(configuration, device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of images
        for batch in kept:
            choices = torch.where(wanted == ANY, random_bits(batch.images, batch.keys), wanted)
            losses = detector.image_losses(detector(batch.images, choices), batch.boxes_xyxy, batch.labels)
            sums += torch.stack([losses.double().sum(), sums.new_tensor(len(losses))])
        loss, images = total(sums).tolist()
        return loss / images

    return mean_loss


def ends(costs: CostTable) -> tuple[list[int], list[int]]:
    """The dearest and the cheapest configuration, of equal choices the first."""
    rows = costs.table.tolist()
    return [row.index(max(row)) for row in rows], [row.index(min(row)) for row in rows]


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
    """Losses among random configurations and around the cheapest."""
    positions, choices = costs.table.shape
    bases = [ANY] * positions, ends(costs)[1]
    return Sensitivity(*(losses_around(base, choices, mean_loss) for base in bases))
