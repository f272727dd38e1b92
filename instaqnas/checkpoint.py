"""Checkpoints: written so that a crash leaves the old one whole, read so that a damaged one is refused."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from instaqnas.errors import InputError, TrainingError

# What the readers of zip files and pickles raise for damaged ones.
_DAMAGES = (
    OSError, zipfile.BadZipFile, NotImplementedError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError,
    KeyError, IndexError, AttributeError, TypeError, OverflowError, struct.error,
)  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain Python values; the file appears under its name only when it is complete on disk."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: that of a killed run is written over
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer on a full disk
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"{path}: cannot be written ({_first_line(error)}); what was there is untouched") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, onto the CPU.

    Raises: InputError if the file is missing, is not a checkpoint or is damaged. `torch.load` itself would accept most
    flipped bits; the checksums of the zip container tell. Compressed entries are refused: they could be of any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), path.stat().st_size
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries):
                raise InputError(f"{path}: not a checkpoint of this program (compressed entries)")
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged checkpoint (checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except _DAMAGES as error:
        raise InputError(f"{path}: not a readable checkpoint ({_first_line(error)})") from None
    if not isinstance(state, dict) or "stage" not in state:
        raise InputError(f"{path}: not a checkpoint of this program (no stage in it)")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
