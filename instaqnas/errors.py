"""Errors that the user sees as one line, without a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from functools import cache
from typing import NoReturn

OTHER_RANKS_WAIT = 2.0  # seconds


class InputError(Exception):
    """Wrong input; the message names the file, key or box. Never raised for a bug."""


class TrainingError(Exception):
    """Training cannot go on, for example after an infinite loss; the message names the step and the images."""


class Interrupted(Exception):
    """A signal asked to end the training, which has been saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@cache
def warn_once(text: str) -> None:
    """Warns of `text` the first time in this process; Python's own record is reset by whoever changes its filters."""
    warnings.warn(text, stacklevel=3)


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` or `OSError` (exit status 2) or a `TrainingError` (1) into one line on standard error.

    An `OSError` that arrives here is a folder without permission or a full disk. Warnings are one line too, without the
    place in the code.
    """
    warnings.formatwarning = _one_line
    warnings.showwarning = _show
    try:
        yield
    except (InputError, TrainingError) as error:
        _exit(str(error), 2 if isinstance(error, InputError) else 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _exit(f"{where}{error.strerror or error}", 2)


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """The text of a warning for the log, which ends lines itself."""
    return f"warning: {message}"


def _show(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"{_one_line(message)}\n")


def _exit(message: str, status: int) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        # The first process mostly meets the same error, and torchrun then ends this one before it says so again.
        time.sleep(OTHER_RANKS_WAIT)
    sys.stderr.write(f"error: {message}\n")
    sys.exit(status)
