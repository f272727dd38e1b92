"""Checkpoint files: a crash while writing keeps the old file, and reading detects damage."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from instaqnas.errors import InputError, TrainingError
from instaqnas.files import DAMAGES


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain Python values; the file gets its name only when it is complete on disk.

    Raises: TrainingError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # always the same name: overwrites the rest of a killed run
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # `torch.save` raises RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"{path}: cannot be written ({_first_line(error)}); what was there is untouched") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a file of `save_checkpoint` onto the CPU.

    Raises: InputError if the file is missing, is not a checkpoint or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            for entry in archive.infolist():  # before any is read: a compressed entry can expand to any size
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise InputError(f"{path}: not a checkpoint of this program (compressed entries)")
            damaged = archive.testzip()  # by checksums: `torch.load` accepts most flipped bits
        if damaged is not None:
            raise InputError(f"{path}: damaged checkpoint (checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except DAMAGES as error:
        raise InputError(f"{path}: not a readable checkpoint ({_first_line(error)})") from None
    if not isinstance(state, dict) or "stage" not in state:
        raise InputError(f"{path}: not a checkpoint of this program (no stage in it)")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
