"""Files and folders: atomic writes, digests, locks and free space."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import secrets
import shutil
import struct
import zipfile
from itertools import chain
from pathlib import Path

from instaqnas.errors import InputError

GB = 1e9  # bytes
# Raised by the readers of zip files and pickles for damaged files.
DAMAGES = (
    OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, LookupError, ArithmeticError,
    AttributeError, TypeError, ValueError, struct.error,
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when it is complete; of several writers the last one wins."""
    # A name of its own: with a fixed one, a second writer would take the first one's file away.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:  # an interruption too must not leave a file of a unique name
        temporary.unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises: InputError if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def lock_folder(folder: Path) -> int:
    """Keeps other processes from writing to a folder until the returned file descriptor is closed or this one dies.

    Raises: InputError if another process has locked it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock: the loader's workers would inherit it, and hold it for seconds after this process was killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise InputError(f"{folder}: another process is training this stage") from None
    return descriptor


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    return next(path for path in chain([folder.absolute()], folder.absolute().parents) if path.exists())
