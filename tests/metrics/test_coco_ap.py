import math

import pytest
import torch

from instaqnas.metrics.coco import coco_ap
from instaqnas.metrics.voc import DetectionRecords

A, B = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]
A_AT_IOU_06 = [0.0, 0.0, 10.0, 6.0]


def records_of(*images):
    """One batch an image; an image is (detections, objects) of (box, score, label) and (box, label, difficult)."""
    records = DetectionRecords()
    for number, (detections, objects) in enumerate(images):
        records.add(
            [f"image_{number}"],
            torch.tensor([d[0] for d in detections]).reshape(1, -1, 4),
            torch.tensor([d[1] for d in detections]).reshape(1, -1),
            torch.tensor([d[2] for d in detections], dtype=torch.int64).reshape(1, -1),
            torch.tensor([o[0] for o in objects]).reshape(1, -1, 4),
            torch.tensor([o[1] for o in objects], dtype=torch.int64).reshape(1, -1),
            torch.tensor([o[2] for o in objects], dtype=torch.bool).reshape(1, -1),
        )
    return records


def test_perfect_detections_have_ap_one():
    first = ([(A, 0.9, 1), (B, 0.8, 2)], [(A, 1, False), (B, 2, False)])
    assert coco_ap(records_of(first, ([(B, 0.1, 1)], [(B, 1, False)]))) == pytest.approx(1.0)


def test_a_box_at_iou_06_counts_at_three_of_ten_thresholds():
    assert coco_ap(records_of(([(A_AT_IOU_06, 0.9, 1)], [(A, 1, False)]))) == pytest.approx(0.3)


def test_half_of_the_objects_found_is_51_of_101_recall_points():
    assert coco_ap(records_of(([(A, 0.9, 1)], [(A, 1, False), (B, 1, False)]))) == pytest.approx(51 / 101)


def test_a_detection_of_another_image_finds_nothing():
    assert coco_ap(records_of(([(A, 0.9, 1)], []), ([], [(A, 1, False)]))) == 0.0


def test_the_mean_is_over_the_classes_that_have_objects():
    image = ([(A, 0.9, 1), (A, 0.9, 3)], [(A, 1, False), (B, 2, False)])
    assert coco_ap(records_of(image)) == pytest.approx(0.5)


def test_difficult_objects_count_neither_way():
    found = ([(B, 0.9, 1), (B, 0.85, 1), (A, 0.8, 1)], [(A, 1, False), (B, 1, True)])
    missed = ([(A, 0.8, 1)], [(A, 1, False), (B, 1, True)])
    assert coco_ap(records_of(found)) == coco_ap(records_of(missed)) == pytest.approx(1.0)


def test_a_wrong_detection_above_the_right_one_halves_ap():
    assert coco_ap(records_of(([(B, 0.9, 1), (A, 0.8, 1)], [(A, 1, False)]))) == pytest.approx(0.5)


def test_padding_is_no_detection_and_no_object():
    padded = ([(A, 0.9, 1), (B, 0.95, 0)], [(A, 1, False), (B, 0, False)])
    assert coco_ap(records_of(padded)) == pytest.approx(1.0)


def test_no_detections_at_all_is_zero():
    assert coco_ap(records_of(([], [(A, 1, False)]))) == 0.0


def test_no_objects_is_not_a_number():
    assert math.isnan(coco_ap(records_of(([(A, 0.9, 1)], [(A, 1, True)]))))


def test_nothing_is_printed(capfd):
    coco_ap(records_of(([(A, 0.9, 1)], [(A, 1, False)])))
    assert capfd.readouterr() == ("", "")
