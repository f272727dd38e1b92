"""Bootstrap over images, against mAP of splits that are resampled by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from instaqnas.errors import InputError
from instaqnas.metrics.bootstrap import (
    MatchedSplit,
    load_matches,
    map_interval,
    mean_difference,
    resampled,
    save_matches,
)
from instaqnas.metrics.voc import DetectionRecords, RecordBatch, voc_map

CLASSES = ("red", "green")


def random_batch(images: int, seed: int, noise: float) -> RecordBatch:
    """Objects, and detections that are the objects moved by `noise`, some with another label."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 60, (images, 4, 2))
    objects = np.concatenate([corners, corners + random.uniform(15, 30, (images, 4, 2))], -1)
    labels = random.integers(0, 3, (images, 4))
    found = objects + np.random.default_rng(seed + 1).normal(0, noise, objects.shape)
    guesses = np.where(random.random((images, 4)) < 0.3, random.integers(0, 3, (images, 4)), labels)
    scores, difficult = random.random((images, 4)), random.random((images, 4)) < 0.2
    as_float = [torch.from_numpy(values).float() for values in (found, scores)]
    return RecordBatch(
        *as_float, torch.from_numpy(guesses), torch.from_numpy(objects).float(), torch.from_numpy(labels),
        torch.from_numpy(difficult),
    )  # fmt: skip


def records_of(batch: RecordBatch, images: list[int]) -> DetectionRecords:
    records = DetectionRecords()
    for place, image in enumerate(images):
        records.add([f"{place}"], *(tensor[image : image + 1] for tensor in batch))
    return records


def test_a_resampled_split_has_the_map_of_its_images() -> None:
    batch = random_batch(7, seed=0, noise=3)
    split = MatchedSplit.of(records_of(batch, list(range(7))), 2)
    draws = [[0, 1, 2, 3, 4, 5, 6], [3, 3, 3, 0, 1, 1, 6], [5, 5, 5, 5, 5, 5, 5]]
    counts = torch.tensor([[images.count(image) for image in range(7)] for images in draws]).double()
    expected = [voc_map(records_of(batch, images), CLASSES).map_11pt for images in draws]
    assert split.map_11pt(counts).tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) == 3


def test_images_or_whole_groups_are_drawn_as_often_as_there_are() -> None:
    counts = resampled(5, seed=1, replicates=400)
    assert counts.shape == (400, 5)
    assert (counts.sum(1) == 5).all()
    assert counts.mean(0).tolist() == pytest.approx([1] * 5, abs=0.2)
    groups = resampled(5, seed=1, groups=[7, 7, 2, 2, 9], replicates=400)
    assert torch.equal(groups[:, 0], groups[:, 1])
    assert torch.equal(groups[:, 2], groups[:, 3])
    assert ((groups[:, 0] + groups[:, 2] + groups[:, 4]) == 3).all()
    assert torch.equal(resampled(5, seed=1, replicates=400), counts)


def test_the_interval_holds_the_middle_95_percent_of_the_resampled_splits() -> None:
    """One object an image, found or not: precision is 1 up to a recall of the share found, so AP follows by hand."""
    hit = np.random.default_rng(0).random(50) < 0.45
    box = torch.tensor([[[0.0, 0, 10, 10]]]).expand(50, -1, -1)
    ones, found = torch.ones(50, 1, dtype=torch.int64), torch.from_numpy(hit)[:, None].long()
    records = DetectionRecords()
    ids = [str(image) for image in range(50)]
    records.add(ids, box, torch.full((50, 1), 0.5), found, box, ones, torch.zeros(50, 1).bool())
    counts = resampled(50, seed=0)
    recalls = (counts.numpy() @ hit).round().astype(int) * 10 // 50  # in tenths, rounded down
    low, high = np.quantile((recalls + 1) / 11, [0.025, 0.975])
    interval = map_interval(MatchedSplit.of(records, 1), counts)
    assert interval == pytest.approx(((hit.sum() * 10 // 50 + 1) / 11, low, high))
    assert interval.low < interval.value < interval.high


def test_a_detector_minus_itself_is_exactly_zero_and_minus_a_worse_one_more() -> None:
    images, counts = list(range(60)), resampled(60, seed=3, replicates=200)
    good, bad = (MatchedSplit.of(records_of(random_batch(60, 5, noise), images), 2) for noise in (1, 8))
    assert mean_difference([good], [good], counts) == (0, 0, 0)
    found = mean_difference([good], [bad], counts)
    assert 0 < found.low < found.value < found.high
    assert mean_difference([good, good], [bad, good], counts) == pytest.approx([value / 2 for value in found])
    other = MatchedSplit(["x"] * 60, bad.detections, bad.positives)
    with pytest.raises(ValueError, match="different images"):
        mean_difference([good], [other], counts)


def test_without_objects_there_is_no_map_and_no_interval() -> None:
    batch = random_batch(3, seed=0, noise=1)
    split = MatchedSplit.of(records_of(batch._replace(gt_labels=torch.zeros_like(batch.gt_labels)), [0, 1, 2]), 2)
    assert all(math.isnan(value) for value in map_interval(split, resampled(3, seed=0, replicates=10)))


def test_matches_come_back_from_their_file(tmp_path: Path) -> None:
    split = MatchedSplit.of(records_of(random_batch(6, seed=2, noise=2), list(range(6))), 2)
    save_matches(tmp_path / "matches.npz", split)
    found = load_matches(tmp_path / "matches.npz")
    assert found.image_ids == split.image_ids
    assert torch.equal(found.positives, split.positives)
    for ours, theirs in zip(found.detections, split.detections, strict=True):
        assert torch.equal(ours, theirs)
    (tmp_path / "matches.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(InputError, match="not a file of matched detections"):
        load_matches(tmp_path / "matches.npz")
