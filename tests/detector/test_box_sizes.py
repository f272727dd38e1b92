"""How default boxes fit objects, against hand tables and naive loops; sizes that fit better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from instaqnas.config.settings import DetectorConfig
from instaqnas.detector.box_sizes import best_ious, class_coverage, coverage_by_size, fitting_box_sizes
from instaqnas.detector.default_boxes import default_boxes

SIZE, MAPS = 160, [10, 5, 3, 2, 1, 1]


def iou(first: list[float], second: list[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first, second)]
    return shared / (sum(areas) - shared)


def random_boxes(count: int, smallest: float, largest: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = smallest + (largest - smallest) * torch.rand(count, 2, generator=generator)
    corner = (SIZE - sides) * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + sides], 1)


def covered_by_loop(boxes_xyxy: Tensor, sizes: list[tuple[int, int]] | None) -> list[bool]:
    """Whether each box has a default box at IoU 0.5 or more."""
    defaults = box_convert(default_boxes(SIZE, MAPS, sizes), "cxcywh", "xyxy").tolist()
    return [max(iou(box, default) for default in defaults) >= 0.5 for box in (boxes_xyxy / SIZE).tolist()]


def test_the_best_iou_of_each_box_is_that_of_a_loop() -> None:
    defaults, boxes_xyxy = default_boxes(SIZE, [3, 1], [(20, 30), (90, 120)]), random_boxes(300, 2, 150) / SIZE
    corners = box_convert(defaults, "cxcywh", "xyxy").tolist()
    expected = [max(iou(box, default) for default in corners) for box in boxes_xyxy.tolist()]
    torch.testing.assert_close(best_ious(defaults, boxes_xyxy), torch.tensor(expected), rtol=0, atol=1e-5)
    assert best_ious(defaults, boxes_xyxy[:0]).shape == (0,)


def test_coverage_by_size_by_hand() -> None:
    boxes_xyxy = torch.tensor([[0, 0, 4, 4], [0, 0, 16, 16], [0, 0, 64, 4], [0, 0, 140, 140.0], [0, 0, 8, 2]])
    rows = coverage_by_size(torch.tensor([0.4, 0.5, 0.1, 0.9, 0.8]), boxes_xyxy)
    assert [(row.lower, row.objects, row.covered) for row in rows] == [
        (0, 2, 1),
        (16, 2, 1),  # 64 x 4 is as large as 16 x 16
        (32, 0, 0),
        (64, 0, 0),
        (128, 1, 1),
    ]


def test_class_coverage_is_a_mean_over_the_classes_that_have_objects() -> None:
    labels = torch.tensor([3, 1, 1, 1, 1])
    assert class_coverage(torch.tensor([0.49, 0.5, 0.6, 0.9, 0.1]), labels) == pytest.approx((0 + 3 / 4) / 2)
    assert class_coverage(torch.tensor([0.7]), torch.tensor([2])) == 1


def test_sizes_of_objects_in_the_middle_of_cells_are_found() -> None:
    """Squares of 11 pixels in cells of the first map and of 37 pixels in cells of the second one."""
    small = [(16 * column + 8, 16 * row + 8, 11) for row in range(10) for column in range(10)]
    large = [(32 * column + 16, 32 * row + 16, 37) for row in range(1, 4) for column in range(1, 4)]
    boxes_xyxy = torch.tensor([(x - s / 2, y - s / 2, x + s / 2, y + s / 2) for x, y, s in small + large])
    labels = torch.tensor([1] * len(small) + [2] * len(large))
    assert not any(covered_by_loop(boxes_xyxy[:100], None))
    sizes = fitting_box_sizes(boxes_xyxy, labels, SIZE, MAPS, None)
    assert all(covered_by_loop(boxes_xyxy, sizes))


@pytest.mark.parametrize("bounds", [(4, 20), (20, 150), (1, 3)], ids=str)
def test_found_sizes_are_a_setting_and_cover_no_fewer_objects(bounds: tuple[int, int]) -> None:
    boxes_xyxy = random_boxes(24, *bounds)
    for current in (None, [(8, 14), (18, 28), (40, 56), (72, 92), (112, 132), (150, 160)]):
        sizes = fitting_box_sizes(boxes_xyxy, torch.ones(24, dtype=torch.int64), SIZE, MAPS, current)
        assert sum(covered_by_loop(boxes_xyxy, sizes)) >= sum(covered_by_loop(boxes_xyxy, current))
        assert DetectorConfig(box_sizes=sizes).box_sizes == sizes
        assert [smaller for smaller, _ in sizes] == sorted(smaller for smaller, _ in sizes)


def test_a_rare_class_of_small_objects_counts_as_much_as_a_frequent_one() -> None:
    """The sizes must serve both, though one object in 101 is small."""
    small = torch.tensor([[4.0, 4, 12, 12]] * 3)
    boxes_xyxy = torch.cat([random_boxes(300, 60, 90), small])
    labels = torch.tensor([1] * 300 + [2] * 3)
    assert all(covered_by_loop(small, fitting_box_sizes(boxes_xyxy, labels, SIZE, MAPS, None)))
