"""Training by several processes that torchrun starts: one per GPU, or several on a CPU.

    NPROC=2 scripts/pretrain.sh --config configs/voc.yaml
    torchrun --standalone --nproc-per-node 2 -- pretrain.py --config configs/voc.yaml

Every process has the whole network and its share of every batch. Gradients, BatchNorm statistics, divisors of losses
and all reported figures are those of the whole batch, so the number of processes changes rounding only. The first
process writes files. Without torchrun there is one process, and nothing here has an effect.

All processes must call `total`, `barrier`, `gathered` and `from_writer` in the same order.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from instaqnas.errors import InputError, TrainingError

# How long one process waits for another. A dead one is noticed at once, by its connection and by torchrun; this limit
# is for one that hangs, and leaves the writer time to evaluate and to save.
PATIENCE = timedelta(minutes=10)

T = TypeVar("T")
_alone = False


def start(device: str) -> None:
    """Joins the other processes if torchrun has started this one and it has not joined yet.

    Args:
        device: of the config; NCCL for CUDA, else gloo.

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


def leave() -> None:
    """Ends what `start` began; call it once, when the process has nothing more to do with the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turns torch's errors about a process that has died or hangs into a TrainingError of one line.

    That process is another one of the training, or one that reads images for this one. Also a decorator.
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


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this process writes files, logs and progress bars."""
    return rank() == 0


def processes_of_machine() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Treats this process as a world of one, for work that every process repeats."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes; gradients flow back to each of them."""
    return values if world_size() == 1 else _Total.apply(values)


def gathered(value: T) -> list[T] | None:
    """The values of all processes in their order, for the writer; None for the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_writer() else None
    dist.gather_object(value, values)
    return values


def from_writer(value: Any) -> Any:
    """The value that the writer passes, for all processes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def parallel(network: nn.Module) -> nn.Module:
    """Wraps `network` so that its gradients are the mean over all processes; all start from the writer's state."""
    if world_size() == 1:
        return network
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.13 renamed the argument; torch 2.6 knows this name only
        # BatchNorm statistics start equal and stay equal, without being sent.
        return DistributedDataParallel(network, broadcast_buffers=False)


def own(network: nn.Module) -> Any:
    """The network that was passed to `parallel`."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def only_own_gradients(network: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which gradients of a `parallel` network add up locally, until a backward pass outside joins them."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def progress_bar(items: Iterable[T], text: str, done: int = 0) -> tqdm[T]:
    """A progress bar over `items`, shown by the writer on a terminal; a log would keep every update.

    Args:
        items: of a loader, or others with a length.
        text: in front of the bar.
        done: items of an earlier run, counted as done.
    """
    return tqdm(items, desc=text, initial=done, leave=False, disable=not (is_writer() and sys.stderr.isatty()))


class _Total(torch.autograd.Function):
    """Every process has the sum of all shares, so the gradient of a share is the sum of all gradients."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values
