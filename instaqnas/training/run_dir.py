"""Everything that one stage of a run writes: resolved config, checkpoints, metrics and TensorBoard events.

RUN/STAGE/config.yaml      the resolved config, seed and versions
RUN/STAGE/last.pt          the last checkpoint; with it the stage goes on
RUN/STAGE/best.pt          the best on the val split, where there is one
RUN/STAGE/metrics.jsonl    one line per epoch
RUN/STAGE/tensorboard/     events
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
import yaml
from torch.utils.tensorboard import SummaryWriter

from instaqnas.config import completed, differences
from instaqnas.errors import InputError
from instaqnas.training.checkpoint import load_checkpoint, save_checkpoint

# The sections of the config that the result of a stage depends on, beside its own.
DECISIVE_SECTIONS = {
    "pretrain_fp32": ("seed", "data", "detector"),
    "pretrain_quant": ("seed", "data", "detector", "bits"),
    "search": ("seed", "data", "detector", "bits", "policy", "reward"),
    "finetune": ("seed", "data", "detector", "bits", "policy"),
}
HARMLESS_DATA_KEYS = ("workers", "test_roots", "test_split")


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


def best_checkpoint(run: Path, stage: str) -> Path:
    """The checkpoint of a finished stage that later stages start from: best on the val split, else the last."""
    best = run / stage / "best.pt"
    return best if best.exists() else run / stage / "last.pt"


class RunDir:
    """The folder of one stage.

    Args:
        run: folder of the run.
        stage: name of the stage.
        config: resolved config as plain values.
        classes: class names, which checkpoints carry.
        restart: set an earlier beginning of this stage aside, as STAGE.old-1, and begin anew.

    Raises: InputError if the folder holds the same stage of another config.
    """

    def __init__(
        self, run: Path, stage: str, config: dict[str, Any], classes: Sequence[str], *, restart: bool = False
    ) -> None:
        self.stage, self.path, self.config, self.classes = stage, run / stage, config, list(classes)
        if restart:
            self._set_aside()
        self._check_same_config()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be created ({error.strerror})") from None
        record = {"config": config, "versions": versions()}
        (self.path / "config.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
        self._writer: SummaryWriter | None = None

    @property
    def last(self) -> Path:
        """Where the last checkpoint is or will be."""
        return self.path / "last.pt"

    def load_last(self) -> dict[str, Any] | None:
        """The last checkpoint of this stage, None if it has not begun."""
        return load_checkpoint(self.last) if self.last.exists() else None

    def save(self, state: dict[str, Any], *, best: bool) -> None:
        """Writes the last checkpoint, and the best one if it is."""
        state = {"stage": self.stage, "config": self.config, "classes": self.classes, **state}
        if best:
            save_checkpoint(self.path / "best.pt", state)
        save_checkpoint(self.last, state)

    def open_tensorboard(self, step: int) -> SummaryWriter:
        """The event writer; what an interrupted run logged from `step` on is hidden."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step or None)
        return self._writer

    def log_epoch(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same scalars to TensorBoard."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, "step": step, **scalars}) + "\n")
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        if self._writer is not None:
            self._writer.close()

    def _set_aside(self) -> None:
        if self.path.exists():
            number = 1
            while (kept := self.path.with_name(f"{self.stage}.old-{number}")).exists():
                number += 1
            self.path.rename(kept)

    def _check_same_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.exists() or not self.last.exists():
            return
        old = completed(yaml.safe_load(file.read_text())["config"])
        changed = differences(_decisive(old, self.stage), _decisive(self.config, self.stage))
        if changed:
            raise InputError(
                f"{self.path}: was begun with another config ({'; '.join(changed)}); "
                "take another --run, or --restart to begin this stage anew"
            )


def _decisive(config: dict[str, Any], stage: str) -> dict[str, Any]:
    kept = {section: config[section] for section in (*DECISIVE_SECTIONS[stage], stage)}
    kept["data"] = {key: value for key, value in config["data"].items() if key not in HARMLESS_DATA_KEYS}
    return kept
