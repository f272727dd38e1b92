"""Memory of a process, and calls in a fresh process."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from instaqnas.errors import InputError
from instaqnas.tools.processes import in_fresh_process, peak_resident_bytes, resident_bytes

PRELOAD = "instaqnas.training.stages"  # as other tests: the first call of a session starts the server
HELD = 2**26


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold_and_free() -> tuple[int, int, int, int]:
    """Resident bytes before, while and after HELD bytes are held, then the peak."""
    before = resident_bytes()
    array = bytearray(b"x") * HELD
    held = resident_bytes()
    del array
    return before, held, resident_bytes(), peak_resident_bytes()


def test_a_call_runs_in_another_process_and_returns_its_result() -> None:
    assert in_fresh_process(os.getpid, preload=PRELOAD, killed="killed") != os.getpid()


def test_a_killed_process_is_an_input_error() -> None:
    with pytest.raises(InputError, match="^row fp32 was killed$"):
        in_fresh_process(kill_this_process, preload=PRELOAD, killed="row fp32 was killed")


def test_errors_of_the_call_are_raised_here() -> None:
    with pytest.raises(FileNotFoundError):
        in_fresh_process(partial(Path("/nowhere/at/all").read_text), preload=PRELOAD, killed="killed")


def test_the_peak_outlasts_memory_that_is_freed() -> None:
    # In a fresh process: this one may hold freed memory, from which the bytes would be taken.
    before, held, after, peak = in_fresh_process(hold_and_free, preload=PRELOAD, killed="killed")
    assert held > before + HELD // 2
    assert after < held - HELD // 2
    assert peak > after + HELD // 2  # not exactly `held`: the kernel counts both approximately
