"""What an epoch has measured so far: part of a checkpoint, so that a resumed epoch reports what a whole one does."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class EpochSums:
    """Sums over the images of an epoch that are done, those of all processes.

    steps, images: how many.
    scalars: by name, each step's times its images.
    choices: how many images had which choice at which position, int64 [L, K]; None where that is not counted.
    """

    steps: int = 0
    images: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    choices: Tensor | None = None

    def add(self, scalars: dict[str, float], images: int, choices: Tensor | None = None) -> None:
        """Adds a step: its means over `images`, and its own count of choices [L, K]."""
        self.steps += 1
        self.images += images
        for name, value in scalars.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value * images
        if choices is not None:
            self.choices = choices if self.choices is None else self.choices + choices

    def means(self, prefix: str = "") -> dict[str, float]:
        """Means over images by name, each with `prefix` before its name."""
        return {prefix + name: value / self.images for name, value in self.scalars.items()}
