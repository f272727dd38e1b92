"""The processes that train one network together under torchrun: how many they are, and sums over all of them.

Without torchrun it is one. All processes must call `total` in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, from which gradients flow back to each of them."""
    return values if world_size() == 1 else _Total.apply(values)


class _Total(torch.autograd.Function):
    """Each process's share goes into the sum that every process has, so its gradient is the sum of theirs."""

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


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what all processes compute alike, each on its own: here there is only this one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False
