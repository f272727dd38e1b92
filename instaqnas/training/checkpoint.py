"""Checkpoints: written so that a crash leaves the old one whole, read so that a damaged one is refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from instaqnas.errors import InputError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain Python values; the file appears under its name only when it is complete on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path}: not a checkpoint of this program (compressed entries)")
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged checkpoint (checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or "stage" not in state:
        raise InputError(f"{path}: not a checkpoint of this program (no stage in it)")
    return state
