"""Everything that one stage of a run writes: resolved config, checkpoints, metrics and TensorBoard events.

RUN/STAGE/config.yaml      the resolved config, seed and versions
RUN/STAGE/last.pt          the last checkpoint; with it the stage goes on
RUN/STAGE/best.pt          the best on the val split, where there is one
RUN/STAGE/epoch_0007.pt    those of the last epochs, as many as `keep_checkpoints` says
RUN/STAGE/metrics.jsonl    one line per epoch
RUN/STAGE/tensorboard/     events
RUN/STAGE/.lock            locked by the process that writes all this

Of several processes that train together one writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config import completed, differences
from instaqnas.errors import InputError
from instaqnas.training import distributed

# The sections of the config that the result of a stage depends on, beside its own.
DECISIVE_SECTIONS = {
    "pretrain_fp32": ("seed", "data", "detector"),
    "pretrain_quant": ("seed", "data", "detector", "bits"),
    "search": ("seed", "data", "detector", "bits", "policy", "reward"),
    "finetune": ("seed", "data", "detector", "bits", "policy"),
    "finetune_fixed": ("seed", "data", "detector", "bits"),
}
HARMLESS_KEYS = {  # of a section, or of every stage
    "data": ("workers", "test_roots", "test_split"),
    "eval": ("batch_size",),
    "stage": ("save_every", "save_minutes", "keep_checkpoints"),
}


def kind_of(stage: str) -> str:
    """`finetune_fixed` for a stage under a fixed bit configuration, such as finetune_static; else the stage itself."""
    return "finetune_fixed" if stage.startswith("finetune_") else stage


def section_of(stage: str) -> str:
    """The section of the config that a stage follows."""
    return "finetune" if kind_of(stage) == "finetune_fixed" else stage


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
        source: the file of weights that the stage starts from, if it does.
        teacher: the checkpoint that it distills from, if that is another.
        images: ids of the training images.
        configuration: names of the bit choices of all positions, where the stage trains under one fixed configuration.
        restart: set an earlier beginning of this stage aside, as STAGE.old-1, and begin anew.

    Raises: InputError if the folder holds the same stage of another config or bit configuration, other classes, images,
    source or teacher, if another training writes there, or if not all processes find the same files.
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
        images: Sequence[str] = (),
        configuration: Sequence[str] | None = None,
        restart: bool = False,
    ) -> None:
        self.stage, self.path, self.config, self.classes = stage, run / stage, config, list(classes)
        self.configuration = None if configuration is None else list(configuration)
        sources = [path for path in (source, teacher) if path is not None]
        self.source = " ".join(map(file_digest, sources))
        self.images = {"count": len(images), "sha256": hashlib.sha256("\n".join(images).encode()).hexdigest()}
        self._writer: SummaryWriter | None = None
        self._saved_at = time.monotonic()
        if restart:
            set_aside(self.path)
        self._lock = self._locked() if distributed.is_writer() else None
        self._check_same_files()
        if self.last.exists():
            self._check_same_beginning(sources)
            return
        if not distributed.is_writer():
            return
        record = yaml.safe_dump({"config": config, "versions": versions()}, sort_keys=False)
        write_text(self.path / "config.yaml", record)

    @property
    def last(self) -> Path:
        """Where the last checkpoint is or will be."""
        return self.path / "last.pt"

    def load_last(self) -> dict[str, Any] | None:
        """The last checkpoint of this stage, None if it has not begun."""
        return load_checkpoint(self.last) if self.last.exists() else None

    @property
    def minutes_unsaved(self) -> float:
        """Minutes since the last checkpoint of this process, or since it began."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, state: dict[str, Any], *, best: bool = False, keep: int = 0) -> None:
        """Writes the last checkpoint, and the best one if it is.

        `keep` above 0 also keeps it under the number of its epoch, with so many as the newest of that kind.
        """
        self._saved_at = time.monotonic()
        if not distributed.is_writer():
            return
        if self._writer is not None:
            self._writer.flush()  # what was logged before this checkpoint will not be logged again
        names = ("stage", "config", "classes", "source", "images", "configuration")
        state = {**{name: getattr(self, name) for name in names}, **state}
        if keep:
            save_checkpoint(self.path / f"epoch_{state['epoch']:04d}.pt", state)
            for old in sorted(self.path.glob("epoch_*.pt"))[:-keep]:
                old.unlink()
        if best:
            save_checkpoint(self.path / "best.pt", state)
        save_checkpoint(self.last, state)

    def open_tensorboard(self, step: int) -> None:
        """Begins an event file; what an interrupted run logged after `step` is hidden."""
        if distributed.is_writer():
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log_step(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars to TensorBoard."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def log_epoch(self, epoch: int, step: int, scalars: dict[str, float], choices: Tensor | None) -> None:
        """One line of metrics.jsonl; the same scalars, and how often the detector trained with which choice, [L, K], to
        TensorBoard.

        Lines of this epoch and later ones, which an interrupted run may have left, go.
        """
        if self._writer is None:
            return
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines()[: epoch - 1] if file.exists() else []
        write_text(file, "\n".join([*lines, json.dumps({"epoch": epoch, "step": step, **scalars})]) + "\n")
        self.log_step(step, scalars)
        if choices is not None and choices.shape[1] > 1:
            for position, counts in enumerate(choices):
                values = torch.arange(len(counts)).repeat_interleave(counts)
                self._writer.add_histogram(f"bits/position_{position:02d}", values, step, bins="auto")

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """A picture uint8 [3, H, W] to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step)

    def close(self) -> None:
        """Ends the event file, and lets others write here."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        """Creates the folder and locks it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be created ({error.strerror})") from None
        return lock_folder(self.path)

    def _check_same_files(self) -> None:
        """Raises InputError unless this process finds what the writer does: each decides by it where to go on."""
        found = [self.source, self.images, file_digest(self.last) if self.last.exists() else ""]
        if distributed.from_writer(found) != found:
            raise InputError(f"{self.path}: not the files that the first process finds; all need the same folders")

    def _check_same_beginning(self, sources: Sequence[Path]) -> None:
        """Raises InputError unless the last checkpoint is of this stage, config, classes and sources."""
        state = load_checkpoint(self.last)
        try:
            old = _decisive(completed(state["config"], _compared_sections(self.stage)), self.stage)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{self.last}: of another version of this program ({error})") from error
        was = {"stage": state["stage"], **old, "classes": state["classes"], "configuration": state.get("configuration")}
        now = {"stage": self.stage, **_decisive(self.config, self.stage), "classes": self.classes}
        changed = differences(was, {**now, "configuration": self.configuration})
        if state.get("source", "") != self.source:
            changed.append(f"from other weights than {', '.join(map(str, sources)) or 'none'}")
        images = state.get("images", self.images)  # of before they were recorded
        if images != self.images:
            changed.append(f"with other training images: {images['count']} then, {self.images['count']} now")
        if changed:
            raise InputError(
                f"{self.path}: was begun otherwise ({'; '.join(changed)}); "
                "take another --run, or --restart to begin this stage anew"
            )


def set_aside(folder: Path) -> None:
    """Renames a folder, if it exists, to FOLDER.old-1, or the first number that is free.

    Raises: InputError if another training writes there.
    """
    distributed.barrier()  # others may still look at it
    if distributed.is_writer() and folder.exists():
        lock, number = lock_folder(folder), 1
        while (kept := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(kept)
        os.close(lock)
    distributed.barrier()


def lock_folder(folder: Path) -> int:
    """Keeps other processes from writing to a folder until the returned file descriptor is closed, or this one dies.

    Raises: InputError if another process has it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock: the loader's workers would inherit that, and hold it for seconds after this process was killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise InputError(f"{folder}: another process is training this stage") from None
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _compared_sections(stage: str) -> list[str]:
    return [*DECISIVE_SECTIONS[kind_of(stage)], section_of(stage), "eval", "runtime"]


def _decisive(config: dict[str, Any], stage: str) -> dict[str, Any]:
    own = section_of(stage)
    kept = {section: config[section] for section in _compared_sections(stage) if section != "runtime"}
    if stage != "search" and not config["data"]["val_split"]:  # it judges no images, nor picks the best epoch
        del kept["eval"]
    for section in ("data", "eval", own):
        if section in kept:
            harmless = HARMLESS_KEYS.get(section, HARMLESS_KEYS["stage"])
            kept[section] = {key: value for key, value in kept[section].items() if key not in harmless}
    return {**kept, "runtime.amp": config["runtime"]["amp"]}
