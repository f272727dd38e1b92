"""Independent random streams derived from one seed.

A stream is named by its purpose (and, for an image, by its `SampleKey`), and no generator state is carried along: a
resumed run, another number of workers or another batch draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleKey:
    """An image in an epoch. Its random numbers depend on the seed, their purpose, `epoch` and `index`.

    epoch: from 0.
    index: of the image in the dataset.
    place: in the batch of its step, from 0; no random number depends on it.
    """

    epoch: int
    index: int
    place: int = 0


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed derived from all parts (SHA-256), the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def uniform_numbers(keys: Sequence[SampleKey], count: int, *parts: int | str) -> Tensor:
    """Random numbers in [0, 1), float64 [B, count]; row b depends on the parts and on `keys[b]` alone."""
    rows = []
    for key in keys:
        rows.append(torch.rand(count, generator=generator(*parts, key.epoch, key.index), dtype=torch.float64))
    return torch.stack(rows)
