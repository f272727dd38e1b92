"""Training by several processes, as torchrun starts them: one per GPU, or several on a CPU.

    torchrun --standalone --nproc-per-node 2 pretrain.py --config configs/voc.yaml

Each has the whole network and its share of every batch. Gradients, BatchNorm statistics, divisors of losses and all
that is reported are those of the whole batch, so the number of processes changes nothing but rounding. The first
process writes. Without torchrun there is one process, and nothing here has an effect.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from instaqnas.errors import InputError, TrainingError
from instaqnas.ranks import world_size

# How long one process waits for the others. A dead one is noticed at once, by its connection and by torchrun; this is
# for one that hangs, and has to leave the writer time to evaluate and to save.
PATIENCE = timedelta(minutes=10)
SECONDS_IN_LOGS = 30  # between updates of a progress bar that does not go to a terminal


def start(device: str) -> None:
    """Joins the other processes, if torchrun has started this one and it has not joined yet.

    Args:
        device: the config's `device`: NCCL if that comes to CUDA, else gloo.

    Raises: InputError if this machine has fewer GPUs than processes.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        gpus, own = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if own >= gpus:
            raise InputError(f"more processes than GPUs: this machine has {gpus}; start that many, or use --device cpu")
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this is the process that writes files, logs and progress bars."""
    return rank() == 0


def processes_of_machine() -> int:
    """Number of the processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: Any) -> list[Any] | None:
    """The values of all processes, in their order, for the writer; None for the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_writer() else None
    dist.gather_object(value, values)
    return values


def from_writer(value: Any) -> Any:
    """What the writer passes, for all processes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def parallel(network: nn.Module) -> nn.Module:
    """`network` so that its gradients become the mean over all processes, and its first state the writer's."""
    if world_size() == 1:
        return network
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for the argument, 2.6 only this one
        # From the first state on, the statistics of BatchNorm are alike without being sent.
        return DistributedDataParallel(network, broadcast_buffers=False)


def own(network: nn.Module) -> nn.Module:
    """The network itself that `parallel` was given."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def only_own_gradients(network: nn.Module) -> contextlib.AbstractContextManager:
    """Here gradients of what `parallel` returned are summed up in this process; the next backward pass joins them."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def progress_bar(batches: Any, text: str, done: int = 0) -> tqdm:
    """A progress bar over the batches of a loader, of which `done` were read before; the writer shows it.

    In a log, where every update stays, there is one every `SECONDS_IN_LOGS`.
    """
    bar = tqdm(batches, desc=text, initial=done, leave=False, disable=not is_writer())
    if not sys.stderr.isatty():
        bar.mininterval = bar.maxinterval = SECONDS_IN_LOGS
    return bar


@contextlib.contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Raises TrainingError, one line, for what torch says when another process has died or hangs.

    That is one of the training, or one that reads images for this one: of its death torch tells by an error wherever
    the main thread is.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        if "DataLoader worker" in first_line:
            raise TrainingError(f"a process that reads images has died ({first_line.strip()})") from error
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(f"another process of this training has died or hangs ({first_line})") from error
