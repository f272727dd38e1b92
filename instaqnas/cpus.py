"""The number of CPUs available to this process."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs that this process may run on; Slurm, taskset or a container's CPU set can leave it fewer than exist."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
