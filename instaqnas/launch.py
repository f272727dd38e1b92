"""Starts several processes of a stage script, as torchrun does, and ends in one line when one of them fails.

    python -m instaqnas.launch --standalone --nproc-per-node 2 -- search.py --config configs/voc.yaml

All options before `--` are torchrun's. A process that fails says why itself; torchrun would add 25 lines to that.
"""

from __future__ import annotations

import logging
import signal
import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs the processes to their end; the exit status is that of the first one that failed."""
    logging.disable(logging.CRITICAL)  # in this process; torchrun would log that the others have failed
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(sys.argv[1:] if arguments is None else arguments))
    except SignalException as error:  # Ctrl-C, or SIGTERM from a scheduler; the processes have ended
        sys.stderr.write("interrupted; the same command (without --restart) continues from the last checkpoint\n")
        sys.exit(128 + error.sigval.value)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(f"error: process {rank} was killed by {signal.Signals(-failure.exitcode).name}\n")
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


if __name__ == "__main__":
    main()
