"""Confidence intervals of mAP by a bootstrap over images (Efron and Tibshirani, 1993, chapters 6 and 13).

Detections are matched image by image, so that a resampled split needs no new matching: an image that is drawn n times
counts n times. Differences of two detectors are paired: both see the same resampled images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from instaqnas.errors import InputError
from instaqnas.files import DAMAGES, write_bytes
from instaqnas.metrics.voc import (
    DetectionRecords,
    MatchedDetections,
    average_precision_11_point,
    count_objects,
    match_all,
)

REPLICATES = 1000
CHUNK = 2**22  # numbers in memory at once: replicates x detections of a class
COVERAGE = 0.95


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MatchedSplit:
    """Matched detections of a split, and its images.

    Args:
        image_ids: of N images.
        detections: of all images.
        positives: number of objects that count, of each image and class, int64 [N, C] without background.
    """

    image_ids: list[str]
    detections: MatchedDetections
    positives: Tensor

    @staticmethod
    def of(records: DetectionRecords, classes: int) -> MatchedSplit:
        """Matches the detections of `records`; `classes` counts without background."""
        return MatchedSplit(list(records.image_ids), match_all(records), count_objects(records, classes))

    def whole_map(self) -> float:
        """mAP (11 points, 0 to 1) of all images, each counted once."""
        return self.map_11pt(torch.ones(1, len(self.image_ids), dtype=torch.float64)).item()

    def map_11pt(self, counts: Tensor) -> Tensor:
        """mAP (11 points, 0 to 1) of R resampled splits, float64 [R]; NaN for one without objects that count.

        Args:
            counts: how often each image was drawn, float64 [R, N].
        """
        found = self.detections
        of_classes = []
        for label in range(1, self.positives.shape[1] + 1):
            own = (found.labels == label).nonzero()[:, 0]
            own = own[found.scores[own].argsort(descending=True, stable=True)]
            positives = counts @ self.positives[:, label - 1].double()
            size = max(1, CHUNK // max(1, len(own)))
            parts = [
                _average_precision(part[:, found.images[own]], found.true_positive[own], found.ignored[own], of_part)
                for part, of_part in zip(counts.split(size), positives.split(size), strict=True)
            ]
            of_classes.append(torch.cat(parts))
        return torch.stack(of_classes).nanmean(0)


def _average_precision(counts: Tensor, true_positive: Tensor, ignored: Tensor, positives: Tensor) -> Tensor:
    """AP [R] of one class, NaN without objects; its D detections by falling score count `counts[r, d]` times."""
    found = (counts * true_positive).cumsum(1)
    counted = (counts * ~ignored).cumsum(1)
    average = average_precision_11_point(found / counted.clamp(min=1), found / positives.clamp(min=1)[:, None])
    return torch.where(positives > 0, average, torch.nan)


def resampled(images: int, seed: int, groups: Sequence[int] | None = None, replicates: int = REPLICATES) -> Tensor:
    """How often each of N images is drawn in R resampled splits, float64 [R, N].

    Args:
        images: N.
        seed: of the draws.
        groups: number of the group of each image, [N]; groups are drawn as a whole, such as all pictures of one part.
            None: every image is a group.
        replicates: R.
    """
    of_image = np.arange(images) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(of_image.max()) + 1
    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=replicates)
    return torch.from_numpy(drawn[:, of_image].astype(np.float64))


def interval_of(value: float, replicates: Tensor) -> Interval:
    """A value with the middle 95 % of its R replicates [R]; NaN replicates are left out."""
    known = replicates[~replicates.isnan()]
    if not len(known):
        return Interval(value, math.nan, math.nan)
    tail = (1 - COVERAGE) / 2
    low, high = known.quantile(torch.tensor([tail, 1 - tail], dtype=known.dtype)).tolist()
    return Interval(value, low, high)


def map_interval(split: MatchedSplit, counts: Tensor) -> Interval:
    """mAP of a split with its interval over resampled splits; `counts` as `resampled` returns them."""
    return interval_of(split.whole_map(), split.map_11pt(counts))


def mean_difference(splits: Sequence[MatchedSplit], baselines: Sequence[MatchedSplit], counts: Tensor) -> Interval:
    """Mean over pairs, such as seeds, of a split's mAP minus the mAP of its baseline, with the paired interval.

    Args:
        splits: of equal images.
        baselines: one for each split, of the same images.
        counts: as `resampled` returns them, the same for all pairs.

    Raises: ValueError if the images differ.
    """
    if any(split.image_ids != splits[0].image_ids for split in (*splits, *baselines)):
        raise ValueError("the splits have different images")
    pairs = list(zip(splits, baselines, strict=True))
    differences = torch.stack([a.map_11pt(counts) - b.map_11pt(counts) for a, b in pairs])
    value = sum(a.whole_map() - b.whole_map() for a, b in pairs) / len(pairs)
    return interval_of(value, differences.mean(0))


def save_matches(path: Path, split: MatchedSplit) -> None:
    """Writes a split as a compressed NumPy archive, for `load_matches`."""
    buffer = io.BytesIO()
    arrays = {name: tensor.numpy() for name, tensor in split.detections._asdict().items()}
    np.savez_compressed(buffer, image_ids=np.array(split.image_ids), positives=split.positives.numpy(), **arrays)
    write_bytes(path, buffer.getvalue())


def load_matches(path: Path) -> MatchedSplit:
    """Reads a file of `save_matches`.

    Raises: InputError if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            tensors = {name: torch.from_numpy(content[name]) for name in (*MatchedDetections._fields, "positives")}
            image_ids = content["image_ids"].tolist()
    except DAMAGES as error:
        raise InputError(f"{path}: not a file of matched detections ({error})") from None
    positives = tensors.pop("positives")
    return MatchedSplit(image_ids, MatchedDetections(**tensors), positives)
