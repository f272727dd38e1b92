"""Independent random streams from one seed: whoever needs randomness names its purpose; no state is carried along."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SampleKey(NamedTuple):
    """An image in an epoch: what its random numbers depend on, beside the seed and their purpose.

    epoch: from 0.
    index: in the dataset.
    place: in the batch of its step; nothing random depends on it.
    """

    epoch: int
    index: int
    place: int = 0


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed made of all parts, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def uniform_numbers(keys: Sequence[SampleKey], count: int, *parts: int | str) -> Tensor:
    """Random numbers in [0, 1), float64 [B, count], made of all parts and each image's own key.

    They are the same in whatever batch, process or resumed run an image comes.
    """
    rows = [torch.rand(count, generator=generator(*parts, k.epoch, k.index), dtype=torch.float64) for k in keys]
    return torch.stack(rows)
