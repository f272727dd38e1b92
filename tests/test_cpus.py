"""The number of CPUs that a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from instaqnas.cpus import available_cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_process_confined_to_one_cpu_has_one() -> None:
    code = f"""
import os
from instaqnas.cpus import available_cpus
os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])
print(available_cpus())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    assert available_cpus() >= 1
