"""What torchrun starts in tests/training/test_distributed.py: commands of stages, one after the other, in each process.

    torchrun --nproc-per-node 2 tests/distributed_commands.py COMMANDS

COMMANDS is JSON, [[name, words], ...]. Beside stages there are the names below, which change or check something first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instaqnas import distributed  # noqa: E402
from instaqnas.config.command import parse_command
from instaqnas.distributed import total
from instaqnas.errors import exit_on_input_error  # noqa: E402
from instaqnas.experiment.run_dir import RunDir  # noqa: E402
from instaqnas.training import detector_training, stages  # noqa: E402


def check_parallel(folder: str) -> None:
    """Leaves what `parallel` and `total` make of values that differ between the processes: FOLDER/parallel_RANK."""
    distributed.start("cpu")
    number = distributed.rank() + 1.0
    norm = nn.BatchNorm1d(1)
    for value in norm.state_dict().values():
        value.fill_(number)
    share = torch.tensor([number], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        distributed.parallel(norm)
        whole = total(share)
        (number * whole).sum().backward()
    found = {name: value.sum().item() for name, value in norm.state_dict().items()}
    found |= {"total": whole.item(), "gradient": share.grad.item(), "share": share.item()}
    Path(folder, f"parallel_{distributed.rank()}").write_text(json.dumps(found))


def forget_gradients_of_others() -> None:
    """From here on every process learns from its own images only."""
    distributed.parallel = lambda network: network


def die_after_saves(process: str, saves: str) -> None:
    """The process of this number kills itself at its so manieth checkpoint."""
    count = 0

    def save_or_die(run_dir: RunDir, *args: Any, **settings: Any) -> None:
        nonlocal count
        save(run_dir, *args, **settings)
        count += 1
        if (distributed.rank(), count) == (int(process), int(saves)):
            os.kill(os.getpid(), signal.SIGKILL)

    save, RunDir.save = RunDir.save, save_or_die


def main() -> None:
    """See the docstring of the file."""
    detector_training.LOG_EVERY = 1
    others = {f.__name__: f for f in (check_parallel, forget_gradients_of_others, die_after_saves)}
    with exit_on_input_error():
        for name, words in json.loads(sys.argv[1]):
            if name in others:
                others[name](*words)
            else:
                getattr(stages, f"run_{name}")(parse_command(name, words))


if __name__ == "__main__":
    main()
