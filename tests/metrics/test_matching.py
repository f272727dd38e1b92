import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instaqnas.metrics.matching import match_detections

UNIT = [0.0, 0.0, 10.0, 10.0]
TALL = [0.0, 0.0, 10.0, 20.0]  # IoU with UNIT exactly 0.5
FAR = [50.0, 50.0, 60.0, 60.0]


def match_one_image(detections, objects, **kwargs):
    """Lists of true positives and ignored; a detection is (box, score, label), an object (box, label, difficult)."""
    matches = match_detections(
        torch.tensor([d[0] for d in detections]).reshape(1, -1, 4),
        torch.tensor([d[1] for d in detections]).reshape(1, -1),
        torch.tensor([d[2] for d in detections], dtype=torch.int64).reshape(1, -1),
        torch.tensor([o[0] for o in objects]).reshape(1, -1, 4),
        torch.tensor([o[1] for o in objects], dtype=torch.int64).reshape(1, -1),
        torch.tensor([o[2] for o in objects], dtype=torch.bool).reshape(1, -1),
        **kwargs,
    )
    return matches.true_positive[0].tolist(), matches.ignored[0].tolist()


def naive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def devkit_match(det_boxes, det_scores, det_labels, gt_boxes, gt_labels, gt_difficult, iou_threshold=0.5):
    """VOCevaldet.m for one image, box by box."""
    true_positive, ignored = [False] * len(det_labels), [False] * len(det_labels)
    taken = set()
    for d in sorted(range(len(det_labels)), key=lambda d: -det_scores[d]):
        best_iou, best = -1.0, None
        for g in range(len(gt_labels)):
            if gt_labels[g] != det_labels[d] or det_labels[d] == 0:
                continue
            iou = naive_iou(det_boxes[d], gt_boxes[g])
            if iou > best_iou:
                best_iou, best = iou, g
        if best is None or best_iou < iou_threshold:
            continue
        if gt_difficult[best]:
            ignored[d] = True
        elif best not in taken:
            true_positive[d] = True
            taken.add(best)
    return true_positive, ignored


def draw_batch(seed, images=6, detections=12, objects=5, classes=3):
    """Boxes on a coarse grid, so that equal overlaps, equal scores, duplicates and IoU 0.5 are frequent."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    def boxes(count):
        corner = integers(3, images, count, 2).float() * 2
        return torch.cat([corner, corner + 2 * (1 + integers(3, images, count, 2)).float()], dim=-1)

    return (
        boxes(detections),
        integers(8, images, detections).float() / 8,
        integers(classes + 1, images, detections),
        boxes(objects),
        integers(classes + 1, images, objects),
        integers(3, images, objects) == 0,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 14), st.integers(0, 6))
def test_matches_equal_those_of_the_devkit_loop(seed, detections, objects):
    batch = draw_batch(seed, detections=detections, objects=objects)
    matches = match_detections(*batch)
    expected = [devkit_match(*image) for image in zip(*(tensor.tolist() for tensor in batch), strict=True)]
    assert matches.true_positive.tolist() == [tp for tp, _ in expected]
    assert matches.ignored.tolist() == [ignored for _, ignored in expected]


def test_the_random_batches_contain_all_outcomes():
    batch = draw_batch(0, images=40)
    matches = match_detections(*batch)
    false_positive = (batch[2] > 0) & ~matches.true_positive & ~matches.ignored
    assert matches.true_positive.any() and matches.ignored.any() and false_positive.any()


def test_the_lower_scored_duplicate_is_a_false_positive():
    assert match_one_image([(UNIT, 0.3, 1), (UNIT, 0.9, 1)], [(UNIT, 1, False)]) == ([False, True], [False, False])


def test_the_first_of_equally_scored_duplicates_is_the_true_positive():
    assert match_one_image([(UNIT, 0.5, 1)] * 3, [(UNIT, 1, False)])[0] == [True, False, False]


def test_of_equal_objects_only_the_first_is_taken():
    assert match_one_image([(UNIT, 0.9, 1), (UNIT, 0.8, 1)], [(UNIT, 1, False)] * 2)[0] == [True, False]
    assert match_one_image([(UNIT, 0.9, 1)], [(UNIT, 1, True), (UNIT, 1, False)]) == ([False], [True])


def test_iou_at_the_threshold_matches():
    assert match_one_image([(TALL, 0.9, 1)], [(UNIT, 1, False)])[0] == [True]
    assert match_one_image([(TALL, 0.9, 1)], [(UNIT, 1, False)], iou_threshold=0.501)[0] == [False]


def test_a_detection_gets_no_second_choice():
    near = [0.0, 0.0, 10.0, 9.0]  # IoU with UNIT 0.9, higher than with the second object
    objects = [(UNIT, 1, False), ([0.0, 0.0, 10.0, 7.0], 1, False)]
    assert match_one_image([(UNIT, 0.9, 1), (near, 0.8, 1)], objects)[0] == [True, False]


def test_all_detections_of_a_difficult_object_are_ignored():
    assert match_one_image([(UNIT, 0.9, 1), (UNIT, 0.8, 1), (FAR, 0.7, 1)], [(UNIT, 1, True)]) == (
        [False, False, False],
        [True, True, False],
    )


def test_another_class_does_not_match():
    assert match_one_image([(UNIT, 0.9, 2)], [(UNIT, 1, False)]) == ([False], [False])


def test_padding_does_not_match_padding():
    assert match_one_image([(UNIT, 0.9, 0)], [(UNIT, 0, False)]) == ([False], [False])


def test_boxes_without_area_do_not_disturb_the_match():
    point = [0.0, 0.0, 0.0, 0.0]
    detections = [(point, 0.9, 1), (UNIT, 0.8, 1), (point, 0.0, 0)]
    assert match_one_image(detections, [(point, 1, False), (UNIT, 1, False), (point, 0, False)])[0] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("detections", "objects"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_matches_where_there_are_no_detections_or_objects(detections, objects):
    matches = match_detections(*draw_batch(0, images=2, detections=detections, objects=objects))
    assert matches.true_positive.shape == matches.ignored.shape == (2, detections)
    assert not matches.true_positive.any() and not matches.ignored.any()


def test_arguments_are_left_as_they_were():
    batch, copy = draw_batch(1), draw_batch(1)
    match_detections(*batch)
    assert all(torch.equal(a, b) for a, b in zip(batch, copy, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_matches_on_a_gpu_equal_those_on_the_cpu():
    batch = draw_batch(2, images=40)
    on_gpu = match_detections(*(tensor.cuda() for tensor in batch))
    for ours, expected in zip(on_gpu, match_detections(*batch), strict=True):
        assert ours.is_cuda and torch.equal(ours.cpu(), expected)
