"""Everything that training changes: the content of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas.policy.budget import Multiplier, PricePoint


@dataclass
class EpochSums:
    """Sums over the images of an epoch so far, of all processes; a resumed epoch reports what a whole one does.

    Args:
        steps: number of steps.
        images: number of images.
        scalars: by name, the sum over steps of a mean times its images.
        choices: how many images had each choice at each position, int64 [L, K]; None if it is not counted.
    """

    steps: int = 0
    images: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    choices: Tensor | None = None

    def add(self, scalars: dict[str, float], images: int, choices: Tensor | None = None) -> None:
        """Adds a step: its means over `images`, and its count of choices [L, K]."""
        self.steps += 1
        self.images += images
        for name, value in scalars.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value * images
        if choices is not None:
            self.choices = choices if self.choices is None else self.choices + choices

    def means(self, prefix: str = "") -> dict[str, float]:
        """Means over images by name, each name with `prefix` in front."""
        return {prefix + name: value / self.images for name, value in self.scalars.items()}


@dataclass
class TrainState:
    """State of one stage.

    Random numbers are no part of it: every image derives its own from the seed (`instaqnas.seeds`).

    Args:
        networks: by name.
        optimizers: by name.
        scheduler: of the detector's optimizer.
        multiplier: price of GBitOps under the reward `budget`.
        prices: of the policy, on the tuning split; empty before the end of a search.
        epoch: number of finished epochs.
        best_map: highest mAP on the val split so far, 0 to 1; -1 before the first validation.
        metrics: scalars of the last finished epoch.
        running: sums of the unfinished epoch, one for each pass over the data.
        choices: how often the detector was trained with each choice in the last finished epoch, int64 [L, K]; not part
            of a checkpoint.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    scheduler: LRScheduler
    multiplier: Multiplier = field(default_factory=Multiplier)
    prices: list[PricePoint] = field(default_factory=list)
    epoch: int = 0
    best_map: float = -1.0
    metrics: dict[str, float] = field(default_factory=dict)
    running: dict[str, EpochSums] = field(default_factory=dict)
    choices: Tensor | None = None

    def sums(self, name: str) -> EpochSums:
        """Sums of a pass over the data in the unfinished epoch."""
        return self.running.setdefault(name, EpochSums())

    def end_epoch(self) -> None:
        """Counts the epoch as finished and forgets its sums."""
        self.choices = self.sums("detector").choices
        self.epoch += 1
        self.running = {}

    def detector_steps(self, steps_per_epoch: int) -> int:
        """Finished steps of the detector; a search that leaves the detector alone counts whole epochs."""
        return self.epoch * steps_per_epoch + self.running.get("detector", EpochSums()).steps

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scheduler": self.scheduler.state_dict(),
            "multiplier": vars(self.multiplier),
            "prices": [list(point) for point in self.prices],
            "epoch": self.epoch,
            "best_map": self.best_map,
            "metrics": self.metrics,
            "running": {name: vars(sums) for name, sums in self.running.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best_map, self.metrics = state["epoch"], state["best_map"], state["metrics"]
        self.multiplier = Multiplier(**state["multiplier"])
        self.prices = [PricePoint(*point) for point in state.get("prices", [])]
        self.running = {name: EpochSums(**sums) for name, sums in state.get("running", {}).items()}
