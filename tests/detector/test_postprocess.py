"""Post-processing against a loop over images and classes with a textbook non-maximum suppression."""

from __future__ import annotations

import math

import pytest
import torch

from instaqnas.detector.default_boxes import default_boxes
from instaqnas.detector.postprocess import Detections, postprocess

DEFAULTS = default_boxes(64, [4, 2, 1, 1, 1, 1])
SETTINGS = {"score_threshold": 0.05, "nms_iou": 0.45, "candidates_per_class": 200, "max_detections": 200}


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def naive(offsets: torch.Tensor, logits: torch.Tensor, settings: dict) -> list[list[tuple]]:
    """Per image (score, label, box), best first."""
    results = []
    for image in range(len(logits)):
        found = []
        for label in range(1, logits.shape[2]):
            candidates = []
            for p, default in enumerate(DEFAULTS.tolist()):
                exps = [math.exp(v) for v in logits[image, p].tolist()]
                score = exps[label] / sum(exps)
                dx, dy, dw, dh = offsets[image, p].tolist()
                cx, cy = default[0] + 0.1 * dx * default[2], default[1] + 0.1 * dy * default[3]
                w, h = default[2] * math.exp(0.2 * dw), default[3] * math.exp(0.2 * dh)
                box = [min(64.0, max(0.0, 64 * v)) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)]
                if score >= settings["score_threshold"]:
                    candidates.append((score, label, box))
            candidates.sort(key=lambda c: -c[0])
            kept: list[tuple] = []
            for candidate in candidates[: settings["candidates_per_class"]]:
                if all(iou(candidate[2], other[2]) <= settings["nms_iou"] for other in kept):
                    kept.append(candidate)
            found += kept
        found.sort(key=lambda c: -c[0])
        results.append(found[: settings["max_detections"]])
    return results


def run(offsets: torch.Tensor, logits: torch.Tensor, **changed: float) -> Detections:
    return postprocess(offsets, logits, DEFAULTS, 64, **{**SETTINGS, **changed})


@pytest.mark.parametrize(
    "changed", [{}, {"candidates_per_class": 5}, {"max_detections": 7}, {"score_threshold": 0.4}, {"nms_iou": 0.2}]
)
def test_detections_equal_a_naive_loop(changed: dict) -> None:
    random = torch.Generator().manual_seed(1)
    offsets = torch.randn(3, len(DEFAULTS), 4, generator=random)
    logits = 2 * torch.randn(3, len(DEFAULTS), 4, generator=random)
    logits[1, :, 0] += 20  # an image of background only
    got = run(offsets, logits, **changed)
    expected = naive(offsets, logits, {**SETTINGS, **changed})
    assert got.labels.shape[1] == max(len(found) for found in expected)
    for image, found in enumerate(expected):
        count = len(found)
        assert got.labels[image].tolist() == [label for _, label, _ in found] + [0] * (got.labels.shape[1] - count)
        torch.testing.assert_close(got.scores[image, :count], torch.tensor([score for score, _, _ in found]))
        boxes = torch.tensor([box for _, _, box in found]).reshape(-1, 4)
        torch.testing.assert_close(got.boxes_xyxy[image, :count], boxes, rtol=1e-4, atol=1e-3)


def test_nothing_found_gives_empty_tensors() -> None:
    logits = torch.zeros(2, len(DEFAULTS), 3)
    logits[..., 0] = 50
    got = run(torch.zeros(2, len(DEFAULTS), 4), logits)
    assert got.boxes_xyxy.shape == (2, 0, 4)
    assert got.scores.shape == got.labels.shape == (2, 0)


def test_boxes_of_different_classes_do_not_suppress_each_other() -> None:
    logits = torch.full((1, len(DEFAULTS), 3), -50.0)
    logits[..., 0] = 0.0
    logits[0, 10] = torch.tensor([-50.0, 0.0, 0.0])  # one place, two classes at 0.5 each
    got = run(torch.zeros(1, len(DEFAULTS), 4), logits)
    assert sorted(got.labels[0].tolist()) == [1, 2]


def test_huge_offsets_stay_inside_the_image() -> None:
    offsets = torch.full((1, len(DEFAULTS), 4), 100.0)
    logits = torch.zeros(1, len(DEFAULTS), 2)
    boxes = run(offsets, logits).boxes_xyxy
    assert boxes.min() >= 0
    assert boxes.max() <= 64


def certain(*labels: int, classes: int = 3) -> torch.Tensor:
    """Logits [1, P, C] with a probability of almost 1 for `labels`, descending from box to box."""
    logits = torch.zeros(1, len(labels), classes)
    for p, label in enumerate(labels):
        logits[0, p, label] = 12.0 - p
    return logits


SIDE_BY_SIDE = torch.tensor([[0.2, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]])


def run_on(defaults: torch.Tensor, logits: torch.Tensor, image_size: int = 100, **changed: float) -> Detections:
    offsets = torch.zeros(*logits.shape[:2], 4)
    return postprocess(offsets, logits, defaults, image_size, **{**SETTINGS, "score_threshold": 0.5, **changed})


def test_boxes_come_in_pixels_best_first() -> None:
    got = run_on(SIDE_BY_SIDE, certain(1, 2, 1)[:, [2, 0, 1]], 200)
    assert got.labels.tolist() == [[1, 2, 1]]
    expected = torch.tensor([[[80.0, 80, 120, 120], [140, 80, 180, 120], [20, 80, 60, 120]]])
    torch.testing.assert_close(got.boxes_xyxy, expected)
    assert (got.scores.diff() < 0).all()


def test_boxes_are_clipped_to_the_image() -> None:
    got = run_on(torch.tensor([[0.05, 0.95, 0.4, 0.2]]), certain(1))
    torch.testing.assert_close(got.boxes_xyxy[0, 0], torch.tensor([0.0, 85.0, 25.0, 100.0]))


def test_a_score_at_the_threshold_is_kept() -> None:
    assert run_on(SIDE_BY_SIDE[:1], torch.zeros(1, 1, 2)).labels.tolist() == [[1]]  # both classes at 0.5


def test_an_image_with_fewer_detections_is_padded() -> None:
    got = run_on(SIDE_BY_SIDE, torch.cat([certain(0, 0, 0), certain(1, 0, 0), certain(2, 1, 1)]))
    assert got.labels.tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 1]]
    assert torch.equal(got.scores > 0, got.labels > 0)
    assert not got.boxes_xyxy[0].any()


def test_at_most_the_best_are_kept_of_each_image() -> None:
    got = run_on(SIDE_BY_SIDE, torch.cat([certain(1, 1, 2), certain(0, 1, 0)]), max_detections=2)
    assert got.labels.tolist() == [[1, 1], [1, 0]]


def test_suppression_does_not_depend_on_the_place_in_the_batch() -> None:
    # Two boxes of 20 pixels with an IoU of 0.4499, just below the limit, and of the last of 20 classes: an offset per
    # image and class, added to float32 coordinates, would lose the digits that decide.
    shift = 20 * (1 - 0.4499) / (1 + 0.4499)
    defaults = torch.tensor([[100.0, 100, 20, 20], [100 + shift, 100, 20, 20]]) / 300
    got = run_on(defaults, certain(20, 20, classes=21).expand(32, -1, -1), 300)
    assert got.labels.tolist() == [[20, 20]] * 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu() -> None:
    logits = 2 * torch.randn(3, len(DEFAULTS), 4, generator=torch.Generator().manual_seed(2))
    cpu = run(torch.zeros(3, len(DEFAULTS), 4), logits)
    cuda = postprocess(torch.zeros(3, len(DEFAULTS), 4).cuda(), logits.cuda(), DEFAULTS.cuda(), 64, **SETTINGS)
    assert torch.equal(cuda.labels.cpu(), cpu.labels)
    torch.testing.assert_close(cuda.boxes_xyxy.cpu(), cpu.boxes_xyxy, rtol=1e-4, atol=1e-3)
