import math

import pytest
import torch

from instaqnas.metrics.voc import (
    DetectionRecords,
    average_precision_11_point,
    average_precision_all_point,
    precision_recall,
    voc_map,
)

A, B, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


def add_image(records, image_id, detections, objects):
    """A detection is (box, score, label), an object (box, label, difficult)."""
    records.add(
        [image_id],
        torch.tensor([d[0] for d in detections]).reshape(1, -1, 4),
        torch.tensor([d[1] for d in detections]).reshape(1, -1),
        torch.tensor([d[2] for d in detections], dtype=torch.int64).reshape(1, -1),
        torch.tensor([o[0] for o in objects]).reshape(1, -1, 4),
        torch.tensor([o[1] for o in objects], dtype=torch.int64).reshape(1, -1),
        torch.tensor([o[2] for o in objects], dtype=torch.bool).reshape(1, -1),
    )


def naive_aps(scores, true_positive, ignored, positives):
    """11-point and all-point AP, detection by detection."""
    order = [d for d in sorted(range(len(scores)), key=lambda d: -scores[d]) if not ignored[d]]
    found, table = 0, []
    for rank, d in enumerate(order, start=1):
        found += true_positive[d]
        table.append((found / rank, found / positives))
    eleven = sum(max((p for p, r in table if r >= i / 10), default=0.0) for i in range(11)) / 11
    area, last_recall = 0.0, 0.0
    for i, (_, recall) in enumerate(table):
        area += (recall - last_recall) * max(p for p, _ in table[i:])
        last_recall = recall
    return eleven, area


def test_precision_and_recall_follow_a_hand_worked_table():
    # By score: found, found, wrong, found, wrong; of 4 objects.
    scores = torch.tensor([0.5, 0.9, 0.7, 0.8, 0.6])
    precision, recall = precision_recall(scores, bools(0, 1, 0, 1, 1), bools(0, 0, 0, 0, 0), 4)
    assert precision.tolist() == [1.0, 1.0, 2 / 3, 0.75, 0.6]
    assert recall.tolist() == [0.25, 0.5, 0.5, 0.75, 0.75]
    assert precision.dtype == recall.dtype == torch.float64


def test_hand_worked_average_precisions():
    precision = torch.tensor([1.0, 1.0, 2 / 3, 0.75, 0.6], dtype=torch.float64)
    recall = torch.tensor([0.25, 0.5, 0.5, 0.75, 0.75], dtype=torch.float64)
    # Recalls 0 to 0.5 have precision 1, 0.6 and 0.7 have 0.75, 0.8 to 1 are not reached.
    assert average_precision_11_point(precision, recall).item() == pytest.approx((6 * 1.0 + 2 * 0.75) / 11)
    assert average_precision_all_point(precision, recall).item() == pytest.approx(0.5 * 1.0 + 0.25 * 0.75)


def test_average_precision_after_a_wrong_first_detection():
    # Wrong, found, found; of 2 objects: precision 0, 1/2, 2/3 at recall 0, 1/2, 1, so at most 2/3 everywhere.
    precision, recall = precision_recall(torch.tensor([3.0, 2.0, 1.0]), bools(0, 1, 1), bools(0, 0, 0), 2)
    assert average_precision_11_point(precision, recall).item() == pytest.approx(2 / 3)
    assert average_precision_all_point(precision, recall).item() == pytest.approx(2 / 3)


def test_three_of_ten_objects_reach_the_recall_point_at_three_tenths():
    precision, recall = precision_recall(torch.tensor([3.0, 2.0, 1.0]), bools(1, 1, 1), bools(0, 0, 0), 10)
    assert average_precision_11_point(precision, recall).item() == pytest.approx(4 / 11)


def test_ignored_detections_change_nothing():
    scores = torch.tensor([0.95, 0.9, 0.8, 0.7, 0.6])
    with_ignored = precision_recall(scores, bools(0, 1, 0, 0, 1), bools(1, 0, 1, 0, 0), 2)
    without = precision_recall(scores[[1, 3, 4]], bools(1, 0, 1), bools(0, 0, 0), 2)
    assert with_ignored[0].tolist() == [0.0, 1.0, 1.0, 0.5, 2 / 3]
    for average_precision in (average_precision_11_point, average_precision_all_point):
        assert average_precision(*with_ignored) == average_precision(*without)


def test_no_detections_have_no_average_precision():
    precision, recall = precision_recall(torch.zeros(0), bools(), bools(), 3)
    assert average_precision_11_point(precision, recall) == average_precision_all_point(precision, recall) == 0.0


def test_average_precisions_equal_the_naive_loop_in_batches():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 30, generator=generator)
    outcome = torch.randint(0, 4, (50, 30), generator=generator)  # 0 ignored, 1 found, otherwise wrong
    positives = (outcome == 1).sum(1) + torch.randint(1, 12, (50,), generator=generator)
    precision, recall = precision_recall(scores, outcome == 1, outcome == 0, positives)
    expected = [
        naive_aps(*row)
        for row in zip(*(t.tolist() for t in (scores, outcome == 1, outcome == 0, positives)), strict=True)
    ]
    assert average_precision_11_point(precision, recall).tolist() == pytest.approx([e[0] for e in expected])
    assert average_precision_all_point(precision, recall).tolist() == pytest.approx([e[1] for e in expected])


def test_perfect_detections_have_map_one():
    records = DetectionRecords()
    add_image(records, "a", [(A, 0.9, 1), (B, 0.2, 2)], [(A, 1, False), (B, 2, False)])
    add_image(records, "b", [(B, 0.6, 1)], [(B, 1, False), (A, 1, True)])
    result = voc_map(records, ["cat", "dog"])
    assert (result.map_11pt, result.map_all_point) == pytest.approx((1.0, 1.0))
    assert result.ap_11pt == pytest.approx({"cat": 1.0, "dog": 1.0})


def test_map_over_images_equals_a_hand_worked_case():
    records = DetectionRecords()
    # cat, 4 objects that count, by score: found in a, found in b, duplicate in a, ignored in b, found in c, wrong in a.
    add_image(records, "a", [(A, 0.9, 1), (A, 0.7, 1), (FAR, 0.4, 1)], [(A, 1, False), (B, 1, False)])
    add_image(records, "b", [(B, 0.8, 1), (A, 0.65, 1)], [(B, 1, False), (A, 1, True)])
    add_image(records, "c", [(A, 0.6, 1), (B, 0.5, 2)], [(A, 1, False), (A, 2, False)])
    result = voc_map(records, ["cat", "dog"])
    assert result.ap_11pt == pytest.approx({"cat": 7.5 / 11, "dog": 0.0})
    assert result.ap_all_point == pytest.approx({"cat": 0.6875, "dog": 0.0})
    assert (result.map_11pt, result.map_all_point) == pytest.approx((7.5 / 22, 0.34375))


def test_one_padded_batch_equals_images_one_by_one():
    one_by_one, together = DetectionRecords(), DetectionRecords()
    add_image(one_by_one, "a", [(A, 0.9, 1), (FAR, 0.8, 1)], [(A, 1, False)])
    add_image(one_by_one, "b", [(B, 0.7, 1)], [(A, 1, False), (B, 1, False)])
    none = [0.0] * 4
    together.add(
        ["a", "b"],
        torch.tensor([[A, FAR], [B, none]]),
        torch.tensor([[0.9, 0.8], [0.7, 0.0]]),
        torch.tensor([[1, 1], [1, 0]]),
        torch.tensor([[A, none], [A, B]]),
        torch.tensor([[1, 0], [1, 1]]),
        torch.zeros(2, 2, dtype=torch.bool),
    )
    assert together.image_ids == one_by_one.image_ids == ["a", "b"]
    assert voc_map(together, ["cat"]) == voc_map(one_by_one, ["cat"])


def test_classes_without_objects_that_count_are_left_out_of_the_mean():
    records = DetectionRecords()
    add_image(records, "a", [(A, 0.9, 1), (B, 0.9, 2), (FAR, 0.9, 3)], [(A, 1, False), (B, 3, True)])
    result = voc_map(records, ["cat", "dog", "cow"])
    assert result.map_11pt == result.map_all_point == 1.0
    assert math.isnan(result.ap_11pt["dog"]) and math.isnan(result.ap_all_point["cow"])


def test_map_without_any_object_is_not_a_number():
    result = voc_map(DetectionRecords(), ["cat"])
    assert math.isnan(result.map_11pt) and math.isnan(result.map_all_point)


def test_map_without_any_detection_is_zero():
    records = DetectionRecords()
    add_image(records, "a", [], [(A, 1, False)])
    assert voc_map(records, ["cat"]).map_11pt == 0.0


def test_ids_that_do_not_fit_the_batch_are_refused():
    records = DetectionRecords()
    empty = torch.zeros(1, 0)
    with pytest.raises(ValueError, match="2 image ids"):
        records.add(
            ["a", "b"], torch.zeros(1, 0, 4), empty, empty.long(), torch.zeros(1, 0, 4), empty.long(), empty > 0
        )
