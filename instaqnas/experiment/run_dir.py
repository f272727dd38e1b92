"""The folder of one stage in a run: resolved config, checkpoints, metrics and TensorBoard events.

RUN/STAGE/config.yaml      the resolved config, seed and versions
RUN/STAGE/last.pt          the last checkpoint; the stage continues from it
RUN/STAGE/best.pt          the best checkpoint on the val split, where there is one
RUN/STAGE/epoch_0007.pt    the newest checkpoints of epochs, as many as `keep_checkpoints` says
RUN/STAGE/metrics.jsonl    one line per epoch
RUN/STAGE/tensorboard/     events
RUN/STAGE/.lock            locked by the process that writes here

With several processes only the first one writes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
import torchvision
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from instaqnas import distributed
from instaqnas.checkpoint import save_checkpoint
from instaqnas.config.reading import completed, differences, flatten
from instaqnas.errors import InputError
from instaqnas.experiment.handover import BEST_FILE, LAST_FILE, Checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import Stage
from instaqnas.files import file_digest, lock_folder, write_text

# Of a run folder, part of its checkpoints.
_RECORDED = ("config", "classes", "source", "images", "configuration")


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


def open_stage(
    experiment: Experiment,
    run: Path,
    stage: Stage,
    *,
    source: Checkpoint | Path | None = None,
    teacher: Checkpoint | None = None,
    configuration: Sequence[str] | None = None,
    restart: bool = False,
) -> RunDir:
    """Opens the folder of a stage; use it as a context manager, which closes it.

    Args:
        experiment: parts of the config.
        run: folder of the run.
        stage: a training stage.
        source: the weights that the stage starts from, if any.
        teacher: the checkpoint that it distills from, if any.
        configuration: names of the bit choices of all positions, for a stage under one fixed configuration.
        restart: set an earlier beginning of this stage aside, as STAGE.old-1, and begin anew.

    Raises: InputError as `RunDir`.
    """
    sources: dict[Path, str] = {}
    if isinstance(source, Checkpoint):
        sources[source.path] = source.digest
    elif source is not None:
        sources[source] = file_digest(source)
    if teacher is not None:
        sources[teacher.path] = teacher.digest
    if restart:
        set_aside(run / stage.name)
    return RunDir(
        run,
        stage,
        experiment.plain,
        experiment.class_names,
        sources=sources,
        images=experiment.train_images(),
        configuration=configuration,
    )


class RunDir:
    """The folder of one stage, locked by this process until `close`.

    Args:
        run: folder of the run.
        stage: a training stage.
        config: resolved config as plain values.
        classes: class names, which checkpoints carry.
        sources: digests of the files of weights that the stage depends on, by path.
        images: number and digest of the training images, as `Experiment.train_images` returns them.
        configuration: names of the bit choices of all positions, for a stage under one fixed configuration.

    `begun` is the last checkpoint of the stage, None if it has not begun or has been handed over (`take_begun`).

    Raises: InputError if the folder holds the same stage of another config or bit configuration, other classes, images
        or sources, if another training writes there, or if not all processes find the same files.
    """

    def __init__(
        self,
        run: Path,
        stage: Stage,
        config: dict[str, Any],
        classes: Sequence[str],
        *,
        sources: dict[Path, str] | None = None,
        images: dict[str, Any] | None = None,
        configuration: Sequence[str] | None = None,
    ) -> None:
        self.stage, self.path, self.config, self.classes = stage, run / stage.name, config, list(classes)
        self.configuration = None if configuration is None else list(configuration)
        self.source = " ".join((sources or {}).values())
        self.images = images or {}
        self._writer: SummaryWriter | None = None
        self._saved_at = time.monotonic()
        self._lock = self._locked() if distributed.is_writer() else None
        try:
            self._check_same_files()
            self._begun = Checkpoint.read(self.last) if self.last.exists() else None
            if self._begun is not None:
                self._check_same_beginning(self._begun, list(sources or {}))
            elif distributed.is_writer():
                record = yaml.safe_dump({"config": config, "versions": versions()}, sort_keys=False)
                write_text(self.path / "config.yaml", record)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def last(self) -> Path:
        """Path of the last checkpoint."""
        return self.path / LAST_FILE

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint of this stage."""
        return self.last.exists()

    def take_begun(self) -> Checkpoint | None:
        """The last checkpoint when the folder was opened, or None; handed out once, so that its memory can be freed."""
        begun, self._begun = self._begun, None
        return begun

    @property
    def minutes_unsaved(self) -> float:
        """Minutes since this process wrote a checkpoint, or since it opened the folder."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, state: dict[str, Any], *, best: bool = False, keep: int = 0) -> None:
        """Writes the last checkpoint.

        Args:
            state: of the training; needs `epoch`.
            best: also write it as the best one.
            keep: above 0, also write it under the number of its epoch, and keep that many of these.
        """
        self._saved_at = time.monotonic()
        if not distributed.is_writer():
            return
        if self._writer is not None:
            self._writer.flush()  # a resumed run does not log again what came before this checkpoint
        state = {"stage": self.stage.name, **{name: getattr(self, name) for name in _RECORDED}, **state}
        if keep:
            save_checkpoint(self.path / f"epoch_{state['epoch']:04d}.pt", state)
            for old in sorted(self.path.glob("epoch_*.pt"))[:-keep]:
                old.unlink()
        if best:
            save_checkpoint(self.path / BEST_FILE, state)
        save_checkpoint(self.last, state)

    def open_tensorboard(self, step: int) -> None:
        """Begins an event file and hides events that an interrupted run logged after `step`."""
        if distributed.is_writer():
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log_step(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars to TensorBoard."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def log_epoch(self, epoch: int, step: int, scalars: dict[str, float], choices: Tensor | None) -> None:
        """Writes one line of metrics.jsonl, and the same scalars with pictures of the choices to TensorBoard.

        In the file, null stands for a scalar that is not finite, such as the mAP of a split where no object counts, and
        `choices` holds the counts. Lines of this epoch and later ones, which an interrupted run may have left, are
        removed. The picture `bits/positions` has a row for each position and a column for each epoch, from dark for the
        first choice to bright for the last.

        Args:
            epoch: from 1.
            step: of the detector in this stage.
            scalars: by name.
            choices: how many images the detector was trained on with each choice at each position, int64 [L, K].
        """
        if self._writer is None:
            return
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines()[: epoch - 1] if file.exists() else []
        numbers = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
        counts = {} if choices is None or choices.shape[1] == 1 else {"choices": choices.tolist()}
        lines.append(json.dumps({"epoch": epoch, "step": step, **numbers, **counts}, allow_nan=False))
        write_text(file, "\n".join(lines) + "\n")
        self.log_step(step, scalars)
        if choices is not None and counts:
            history = [json.loads(line).get("choices") for line in lines]
            self.log_picture("bits/positions", picture_of_choices([h for h in history if h is not None]), step)
            for position, images in enumerate(choices):
                values = torch.arange(len(images)).repeat_interleave(images)
                self._writer.add_histogram(f"bits/position_{position:02d}", values, step, bins="auto")

    def log_result(self, metrics: dict[str, float]) -> None:
        """Writes the settings of the stage and its final figures to TensorBoard's HParams."""
        if self._writer is None:
            return
        settings = dict(flatten(self.stage.decisive(self.config)))
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
        }
        final = {f"final/{name}": value for name, value in metrics.items() if math.isfinite(value)}
        self._writer.add_hparams(plain, final, run_name=".")

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """Writes a picture, uint8 [3, H, W], to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step)

    def close(self) -> None:
        """Closes the event file and unlocks the folder; may be called again."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
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
        """Raises InputError unless this process finds the files that the writer finds: both decide by them."""
        found = [self.source, self.images, file_digest(self.last) if self.last.exists() else ""]
        if distributed.from_writer(found) != found:
            raise InputError(f"{self.path}: not the files that the first process finds; all need the same folders")

    def _check_same_beginning(self, begun: Checkpoint, sources: Sequence[Path]) -> None:
        """Raises InputError unless `begun` is of this stage, config, classes, images and sources."""
        state, stage = begun.state, self.stage
        try:
            old = stage.decisive(completed(state["config"], stage.compared_sections))
            source, images, configuration = state["source"], state["images"], state["configuration"]
            if images and "annotations" not in images:
                raise KeyError("annotations")
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{self.last}: of another version of this program ({error})") from error
        was = {"stage": state["stage"], **old, "classes": state["classes"], "configuration": configuration}
        now = {"stage": stage.name, **stage.decisive(self.config), "classes": self.classes}
        changed = differences(was, {**now, "configuration": self.configuration})
        if source != self.source:
            changed.append(f"from other weights than {', '.join(map(str, sources)) or 'none'}")
        if images != self.images:
            changed.append(f"with other training images: {images['count']} then, {self.images['count']} now")
        if changed:
            longer = any(line.startswith(f"{stage.section}.epochs: ") for line in changed)
            reason = "the learning rate falls to 0 at the last epoch, so other epochs are another training; "
            raise InputError(
                f"{self.path}: was begun otherwise ({'; '.join(changed)}); {reason if longer else ''}"
                "take another --run, or --restart to begin this stage anew"
            )


def picture_of_choices(history: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Mean index of the choice at each position and epoch as a picture, uint8 [3, 8 L, 12 E].

    Args:
        history: E epochs of counts [L][K]; dark blue for choice 0, yellow for choice K - 1.
    """
    counts = torch.tensor(history, dtype=torch.float32)  # [E, L, K]
    share = (counts * torch.arange(counts.shape[2])).sum(2) / counts.sum(2).clamp(min=1) / (counts.shape[2] - 1)
    dark, bright = torch.tensor([40.0, 30.0, 110.0]), torch.tensor([250.0, 230.0, 60.0])
    colours = dark + share.T[..., None] * (bright - dark)  # [L, E, 3]
    return colours.repeat_interleave(8, 0).repeat_interleave(12, 1).permute(2, 0, 1).round().to(torch.uint8)


def set_aside(folder: Path) -> None:
    """Renames a folder, if it exists, to FOLDER.old-1 or the first free number.

    Raises: InputError if another training writes there.
    """
    distributed.barrier()  # other processes may still be reading it
    if distributed.is_writer() and folder.exists():
        lock, number = lock_folder(folder), 1
        while (kept := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(kept)
        os.close(lock)
    distributed.barrier()
