"""The processes that train one network together under torchrun: how many they are, and sums over all of them.

Without torchrun it is one. All processes must call `total` in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

_alone = False


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, from which gradients flow back to each of them."""
    if world_size() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce  # not there in a build of torch without torch.distributed

    return all_reduce(values)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what all processes compute alike, each on its own: here there is only this one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False
