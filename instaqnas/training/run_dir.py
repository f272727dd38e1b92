"""Everything that one stage of a run writes: resolved config, checkpoints, metrics and TensorBoard events.

RUN/STAGE/config.yaml      the resolved config, seed and versions
RUN/STAGE/last.pt          the last checkpoint; with it the stage goes on
RUN/STAGE/best.pt          the best on the val split, where there is one
RUN/STAGE/metrics.jsonl    one line per epoch
RUN/STAGE/tensorboard/     events
"""

from __future__ import annotations

import hashlib
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

from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config import completed, differences
from instaqnas.errors import InputError

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
        source: the checkpoint that the stage starts from, if it does.
        teacher: the checkpoint that it distills from, if that is another.
        restart: set an earlier beginning of this stage aside, as STAGE.old-1, and begin anew.

    Raises: InputError if the folder holds the same stage of another config, other classes or another source or teacher.
    """

    def __init__(
        self,
        run: Path,
        stage: str,
        config: dict[str, Any],
        classes: Sequence[str],
        *,
        source: Path | None = None,
        teacher: Path | None = None,
        restart: bool = False,
    ) -> None:
        self.stage, self.path, self.config, self.classes = stage, run / stage, config, list(classes)
        sources = [path for path in (source, teacher) if path is not None]
        self.source = " ".join(map(_sha256, sources))
        self._writer: SummaryWriter | None = None
        if restart:
            set_aside(self.path)
        if self.last.exists():
            self._check_same_beginning(sources)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be created ({error.strerror})") from None
        record = yaml.safe_dump({"config": config, "versions": versions()}, sort_keys=False)
        write_text(self.path / "config.yaml", record)

    @property
    def last(self) -> Path:
        """Where the last checkpoint is or will be."""
        return self.path / "last.pt"

    def load_last(self) -> dict[str, Any] | None:
        """The last checkpoint of this stage, None if it has not begun."""
        return load_checkpoint(self.last) if self.last.exists() else None

    def save(self, state: dict[str, Any], *, best: bool) -> None:
        """Writes the last checkpoint, and the best one if it is."""
        begun = {"stage": self.stage, "config": self.config, "classes": self.classes, "source": self.source}
        state = {**begun, **state}
        if best:
            save_checkpoint(self.path / "best.pt", state)
        save_checkpoint(self.last, state)

    def open_tensorboard(self, step: int) -> SummaryWriter:
        """The event writer; what an interrupted run logged after `step` is hidden."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)
        return self._writer

    def log_epoch(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same scalars to TensorBoard.

        Lines of this epoch and later ones, which an interrupted run may have left, go.
        """
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines()[: epoch - 1] if file.exists() else []
        write_text(file, "\n".join([*lines, json.dumps({"epoch": epoch, "step": step, **scalars})]) + "\n")
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        if self._writer is not None:
            self._writer.close()

    def _check_same_beginning(self, sources: Sequence[Path]) -> None:
        """Raises InputError unless the last checkpoint is of this stage, config, classes and sources."""
        state = load_checkpoint(self.last)
        try:
            old = _decisive(completed(state["config"]), self.stage)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{self.last}: of another version of this program ({error})") from error
        changed = differences(
            {"stage": state["stage"], **old, "classes": state["classes"]},
            {"stage": self.stage, **_decisive(self.config, self.stage), "classes": self.classes},
        )
        if state.get("source", "") != self.source:
            changed.append(f"from other checkpoints than {', '.join(map(str, sources))}")
        if changed:
            raise InputError(
                f"{self.path}: was begun otherwise ({'; '.join(changed)}); "
                "take another --run, or --restart to begin this stage anew"
            )


def set_aside(folder: Path) -> None:
    """Renames a folder, if it exists, to FOLDER.old-1, or the first number that is free."""
    if folder.exists():
        number = 1
        while (kept := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(kept)


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _decisive(config: dict[str, Any], stage: str) -> dict[str, Any]:
    kept = {section: config[section] for section in (*DECISIVE_SECTIONS[stage], stage)}
    kept["runtime.amp"] = config["runtime"]["amp"]
    if stage == "search" or config["data"]["val_split"]:  # it judges images, or picks the best epoch
        kept["eval"] = {key: value for key, value in config["eval"].items() if key != "batch_size"}
    kept["data"] = {key: value for key, value in config["data"].items() if key not in HARMLESS_DATA_KEYS}
    return kept
