"""SIGINT and SIGTERM while steps are trained: the step is finished and saved, then the training ends.

with finishing_steps() as interruption:
    for batch in loader:
        ...
        save_if_due(interruption)  # raises Interrupted after a signal

A second signal ends the process at once. With several processes, signals end them at once too: they could not agree on
the step. Outside of `with`, signals do as they always do.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from instaqnas import distributed
from instaqnas.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interruption:
    """The first signal that came, None before."""

    number: int | None = None

    def end(self) -> None:
        """Ends the training. Raises: Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextlib.contextmanager
def finishing_steps() -> Iterator[Interruption]:
    """Notes the first signal instead of ending the process, and restores the handlers of before at the end."""
    interruption = Interruption()
    if distributed.world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, _frame: FrameType | None) -> None:
        interruption.number = number
        for other, handler in before.items():
            signal.signal(other, handler)
        sys.stderr.write("interrupted; this step is finished and saved first, a second signal ends at once\n")

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
