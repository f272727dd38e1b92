import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instaqnas.metrics.image_quality import image_quality

KINDS = ("precision", "recall", "f1", "ap")
A, B, C = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]


def quality_of(kind, detections, objects, score_threshold=0.1):
    """A detection is (box, score, label), an object (box, label) or (box, label, difficult)."""
    quality = image_quality(
        kind,
        torch.tensor([d[0] for d in detections]).reshape(1, -1, 4),
        torch.tensor([d[1] for d in detections]).reshape(1, -1),
        torch.tensor([d[2] for d in detections], dtype=torch.int64).reshape(1, -1),
        torch.tensor([o[0] for o in objects]).reshape(1, -1, 4),
        torch.tensor([o[1] for o in objects], dtype=torch.int64).reshape(1, -1),
        torch.tensor([len(o) > 2 and o[2] for o in objects], dtype=torch.bool).reshape(1, -1),
        score_threshold,
    )
    return quality.item()


def naive_iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def naive_outcomes(detections, objects):
    """For each detection that counts, best first: whether it is right."""
    outcomes, taken = [], set()
    for box, _, label in sorted(detections, key=lambda d: -d[1]):
        overlaps = [naive_iou(box, o[0]) if o[1] == label else 0.0 for o in objects]
        best = max(range(len(objects)), key=overlaps.__getitem__, default=None)
        found = best is not None and overlaps[best] >= 0.5
        if found and objects[best][2]:
            continue
        outcomes.append(found and best not in taken)
        if found:
            taken.add(best)
    return outcomes


def naive_quality(kind, detections, objects, score_threshold):
    detections = [d for d in detections if d[2] and d[1] >= score_threshold]
    objects = [o for o in objects if o[1]]
    outcomes = naive_outcomes(detections, objects)
    positives = sum(not o[2] for o in objects)
    if not positives:
        return 0.0 if outcomes else 1.0
    precision = sum(outcomes) / len(outcomes) if outcomes else 0.0
    recall = sum(outcomes) / positives
    if kind == "ap":
        precisions = [sum(outcomes[: i + 1]) / (i + 1) for i in range(len(outcomes))]
        return sum(max(precisions[i:]) for i, right in enumerate(outcomes) if right) / positives
    if kind == "f1":
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall}[kind]


def draw_batch(seed, images, detections, objects):
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    def boxes(count):
        corner = integers(3, images, count, 2).float() * 2
        return torch.cat([corner, corner + 2 * (1 + integers(3, images, count, 2)).float()], dim=-1)

    return (
        boxes(detections),
        integers(9, images, detections).float() / 8,
        integers(4, images, detections),
        boxes(objects),
        integers(4, images, objects),
        integers(3, images, objects) == 0,
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 14), st.integers(0, 5))
def test_quality_equals_the_naive_loop(kind, seed, detections, objects):
    batch = draw_batch(seed, 6, detections, objects)
    quality = image_quality(kind, *batch, 0.25)
    expected = []
    for image in zip(*(tensor.tolist() for tensor in batch), strict=True):
        own = list(zip(*image[:3], strict=True)), list(zip(*image[3:], strict=True))
        expected.append(naive_quality(kind, *own, 0.25))
    assert quality.dtype == torch.float32 and quality.shape == (6,)
    assert quality.tolist() == pytest.approx(expected, abs=1e-6)
    assert ((quality >= 0) & (quality <= 1)).all()


def test_three_perfect_same_class_detections_have_precision_one():
    objects = [(A, 1), (B, 1), (C, 1)]
    assert quality_of("precision", [(box, 0.9, label) for box, label in objects], objects) == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_number_of_perfect_detections_has_quality_one(kind, n):
    boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(n)]
    assert quality_of(kind, [(b, 0.5, 1) for b in boxes], [(b, 1) for b in boxes]) == 1.0


@pytest.mark.parametrize("kind", ["recall", "f1", "ap"])
def test_two_objects_of_two_found_is_better_than_one_of_two(kind):
    objects = [(A, 1), (B, 1)]
    assert quality_of(kind, [(A, 0.9, 1), (B, 0.8, 1)], objects) > quality_of(kind, [(A, 0.9, 1)], objects)


@pytest.mark.parametrize(("kind", "expected"), [("precision", 0.5), ("recall", 1.0), ("f1", 2 / 3), ("ap", 1.0)])
def test_a_lower_scored_duplicate_is_a_false_positive(kind, expected):
    assert quality_of(kind, [(A, 0.9, 1), (A, 0.8, 1)], [(A, 1)]) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "expected"), [("precision", 0.5), ("recall", 1.0), ("f1", 2 / 3), ("ap", 0.5)])
def test_a_detection_of_an_absent_class_is_a_false_positive(kind, expected):
    assert quality_of(kind, [(A, 0.8, 1), (A, 0.9, 2)], [(A, 1)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "expected"), [("precision", 2 / 3), ("recall", 0.5), ("f1", 4 / 7), ("ap", 0.25 + 0.25 * 2 / 3)]
)
def test_two_of_four_objects_and_one_wrong_detection_by_hand(kind, expected):
    objects = [(A, 1), (B, 2), (C, 1), ([40.0, 20.0, 50.0, 30.0], 3)]
    assert quality_of(kind, [(A, 0.9, 1), (FAR, 0.8, 1), (B, 0.7, 2)], objects) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_below_the_score_threshold_do_not_count(kind):
    detections = [(FAR, 0.49, 1), (A, 0.5, 1)]
    assert quality_of(kind, detections, [(A, 1)], score_threshold=0.5) == 1.0
    assert quality_of(kind, detections, [(A, 1)], score_threshold=0.51) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_objects_has_quality_one_only_if_nothing_is_detected(kind):
    assert quality_of(kind, [], []) == 1.0
    assert quality_of(kind, [(A, 0.05, 1)], []) == 1.0
    assert quality_of(kind, [(A, 0.9, 1)], []) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_with_objects_and_no_detections_has_quality_zero(kind):
    assert quality_of(kind, [], [(A, 1)]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_difficult_objects_count_neither_way(kind):
    objects = [(A, 1, False), (B, 1, True)]
    assert quality_of(kind, [(A, 0.8, 1)], objects) == 1.0
    assert quality_of(kind, [(B, 0.9, 1), (B, 0.85, 1), (A, 0.8, 1)], objects) == 1.0
    assert quality_of(kind, [(B, 0.9, 1)], [(B, 1, True)]) == 1.0
    assert quality_of(kind, [(A, 0.9, 1)], [(B, 1, True)]) == 0.0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="precison"):
        quality_of("precison", [], [(A, 1)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_quality_on_a_gpu_equals_that_on_the_cpu(kind):
    batch = draw_batch(3, 40, 12, 5)
    on_gpu = image_quality(kind, *(tensor.cuda() for tensor in batch), 0.25)
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), image_quality(kind, *batch, 0.25))
