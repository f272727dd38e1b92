"""Memory of this process, and calls in a fresh process: shared by `benchmark` and `preflight`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from instaqnas.errors import InputError

Result = TypeVar("Result")


def in_fresh_process(call: Callable[[], Result], *, preload: str, killed: str) -> Result:
    """Returns `call()` from a new process that has done nothing but imports, so its peak memory is that of the call.

    Args:
        call: can be pickled, such as a `functools.partial` of a function of a module.
        preload: module that the fork server imports before it forks. The server starts once in the life of this
            process: the module of the first call counts.
        killed: message for a process that ends without a result, as one that has run out of memory does.

    Raises: what `call` raises, and InputError with the message `killed`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(call).result()
        except BrokenExecutor:
            raise InputError(killed) from None


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Highest memory of this process so far (Linux)."""
    # Not resource.getrusage: its maximum starts from the parent's.
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
