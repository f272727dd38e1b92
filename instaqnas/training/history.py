"""The line that every epoch leaves on the terminal and in the log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class EpochClock:
    """Times epochs: `start` when one begins, `trained` after its training, and `line` at its end.

    images, seconds: of the detector's training in this epoch, in all processes; an epoch that was interrupted counts
        from its resumption.
    """

    images: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Begins an epoch."""
        self.images, self.seconds, self.started = 0, 0.0, time.monotonic()

    def trained(self, images: int, seconds: float) -> None:
        """Notes how long the training on some images took."""
        self.images, self.seconds = images, seconds

    def line(self, stage: str, epoch: int, epochs: int, scalars: Mapping[str, float]) -> str:
        """The line of an epoch that has just ended.

        Args:
            stage: its name.
            epoch: finished epochs.
            epochs: of the stage in all.
            scalars: of the epoch, by their names in TensorBoard; those that are there are shown.
        """
        parts = [f"{name} {scalars[key]:.3f}" for key, name in _SHOWN.items() if key in scalars]
        if "eval/map" in scalars:
            parts.append(f"val mAP {100 * scalars['eval/map']:.1f} %")
        gbitops = scalars.get("eval/gbitops_total", scalars.get("cost/gbitops_greedy"))
        if gbitops is not None:
            parts.append(f"{gbitops:.4g} GBitOps")
        if self.seconds > 0:
            parts.append(f"{self.images / self.seconds:.3g} images/s")
        if epoch < epochs:
            parts.append(f"{_duration((epochs - epoch) * (time.monotonic() - self.started))} left")
        return f"{stage} {epoch}/{epochs}: {', '.join(parts)}"


_SHOWN = {
    "train/loss": "loss",
    "train/loss_box": "box",
    "train/loss_class": "class",
    "train/loss_distill": "distill",
    "reward/sampled": "reward",
}


def _duration(seconds: float) -> str:
    """Two digits or so: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
