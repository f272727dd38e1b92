"""The exceptions that are shown to the user as one line, without a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class InputError(Exception):
    """Wrong input: a file, key or box that the message names. Never used for bugs of ours."""


class TrainingError(Exception):
    """Training cannot go on, as after an infinite loss; the message names the step and the images."""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` or `OSError` (exit status 2) or a `TrainingError` (1) into one line on standard error.

    An `OSError` that nobody has turned into something better is a folder without permission or a full disk.
    """
    try:
        yield
    except (InputError, TrainingError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        sys.exit(2)
