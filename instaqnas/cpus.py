"""How many CPUs there are to compute on."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs that this process may run on: fewer than the machine has under Slurm, taskset or a container's CPU set."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
