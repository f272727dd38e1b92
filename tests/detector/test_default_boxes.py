"""Default boxes, matching and encoding against hand-worked values and naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from instaqnas.detector.default_boxes import decode, default_boxes, encode, match


def test_boxes_of_a_single_cell_by_hand() -> None:
    boxes = default_boxes(200, [1], [(50, 72)])
    s, m, r2, r3 = 0.25, 0.3, math.sqrt(2), math.sqrt(3)  # sqrt(50 * 72) = 60
    shapes = [(s, s), (m, m), (s * r2, s / r2), (s / r2, s * r2), (s * r3, s / r3), (s / r3, s * r3)]
    torch.testing.assert_close(boxes, torch.tensor([(0.5, 0.5, w, h) for w, h in shapes]))


def test_cells_run_row_by_row() -> None:
    centres = default_boxes(100, [2], [(10, 20)])[::6, :2]
    torch.testing.assert_close(centres, torch.tensor([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]))


def test_published_strides_place_the_centres_at_300_pixels() -> None:
    """Stride 16 on 19 cells, not 300 / 19: the last centre is at 296 pixels."""
    boxes = default_boxes(300, [19, 10, 5, 3, 2, 1])
    torch.testing.assert_close(boxes[0, :2], torch.tensor([8 / 300, 8 / 300]))
    torch.testing.assert_close(boxes[19 * 19 * 6 - 1, :2], torch.tensor([296 / 300, 296 / 300]))
    torch.testing.assert_close(boxes[-6, 2:], torch.tensor([285 / 300, 285 / 300]))
    assert boxes.min() >= 0
    assert boxes.max() <= 1  # 285 * sqrt(3) is clamped


@pytest.mark.parametrize(
    ("image_size", "maps", "count", "smallest", "largest"),
    [
        (300, [19, 10, 5, 3, 2, 1], 3000, 60, 285),
        (224, [14, 7, 4, 2, 1, 1], 1602, 44, 212),
        (112, [7, 4, 2, 1, 1, 1], 432, 22, 106),
        (128, [8, 4, 2, 1, 1, 1], 522, 25, 121),  # int(128 * (0.2 + 0.15 * k)), k = 0 and 5
    ],
)
def test_number_and_sizes_of_boxes(image_size: int, maps: list[int], count: int, smallest: int, largest: int) -> None:
    boxes = default_boxes(image_size, maps)
    assert boxes.shape == (count, 4)
    assert boxes[0, 2].item() * image_size == pytest.approx(smallest, abs=1e-4)
    assert boxes[-6, 2].item() * image_size == pytest.approx(largest, abs=1e-4)


CELLS = {300: (19, 10, 5, 3, 2, 1), 224: (14, 7, 4, 2, 1, 1), 112: (7, 4, 2, 1, 1, 1)}
STRIDES = {300: (16, 32, 64, 100, 150, 300), 224: (16, 32, 56, 112, 224, 224), 112: (16, 28, 56, 112, 112, 112)}
ENDS = {
    300: (60, 105, 150, 195, 240, 285, 330),
    224: (44, 78, 112, 145, 179, 212, 246),
    112: (22, 39, 56, 72, 89, 106, 123),
}


def looped_boxes(image_size: int, cells: tuple, strides: tuple, sizes: list[tuple[float, float]]) -> Tensor:
    boxes = []
    for count, stride, (smaller, larger) in zip(cells, strides, sizes, strict=True):
        middle = math.sqrt(smaller * larger)
        for j in range(count):
            for i in range(count):
                x, y = (i + 0.5) * stride, (j + 0.5) * stride
                boxes += [[x, y, smaller, smaller], [x, y, middle, middle]]
                for ratio in (2, 3):
                    long, short = smaller * math.sqrt(ratio), smaller / math.sqrt(ratio)
                    boxes += [[x, y, long, short], [x, y, short, long]]
    return torch.tensor([[min(value / image_size, 1.0) for value in box] for box in boxes])


@pytest.mark.parametrize("image_size", [300, 224, 112])
def test_published_boxes_equal_a_loop_over_maps_and_cells(image_size: int) -> None:
    ends, cells = ENDS[image_size], CELLS[image_size]
    expected = looped_boxes(image_size, cells, STRIDES[image_size], list(zip(ends, ends[1:], strict=False)))
    torch.testing.assert_close(default_boxes(image_size, cells), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("image_size", "cells", "ends"),
    [
        (128, (8, 4, 2, 1, 1, 1), (25, 44, 64, 83, 102, 121, 140)),  # 25.6, 44.8, 64, 83.2, 102.4, 121.6, 140.8
        (200, (13, 7, 4, 2, 1, 1), (40, 70, 100, 130, 160, 190, 220)),
    ],
)
def test_other_image_sizes_take_20_to_110_percent_of_the_image(image_size: int, cells: tuple, ends: tuple) -> None:
    strides = tuple(image_size / count for count in cells)
    expected = looped_boxes(image_size, cells, strides, list(zip(ends, ends[1:], strict=False)))
    torch.testing.assert_close(default_boxes(image_size, cells), expected, rtol=0, atol=1e-6)


def test_given_sizes_replace_the_sizes_derived_from_the_image() -> None:
    sizes = [(10, 20), (15, 30), (30, 31), (50, 80), (70, 90), (100, 110)]
    expected = looped_boxes(112, CELLS[112], STRIDES[112], sizes)
    torch.testing.assert_close(default_boxes(112, CELLS[112], sizes), expected, rtol=0, atol=1e-6)


def test_encoding_by_hand() -> None:
    default = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.4, 0.3, 0.8, 0.5]])  # centre (0.6, 0.4), size 0.4 x 0.2
    expected = torch.tensor([[0.1 / 0.2 / 0.1, -0.1 / 0.4 / 0.1, math.log(2) / 0.2, math.log(0.5) / 0.2]])
    torch.testing.assert_close(encode(box, default), expected)


def test_decoding_inverts_encoding() -> None:
    random = torch.Generator().manual_seed(0)
    defaults = default_boxes(112, [7, 4, 2, 1, 1, 1])
    corners = torch.rand(2, len(defaults), 2, 2, generator=random).sort(2).values  # ordered along each axis
    boxes = torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.01], -1)
    torch.testing.assert_close(decode(encode(boxes, defaults), defaults), boxes, rtol=1e-4, atol=1e-5)


def naive_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def naive_match(defaults: list, boxes: list, labels: list[int]) -> tuple[list[int], list[int]]:
    """Label and object index of every default box, by the rules of the SSD paper one by one."""
    objects = [n for n, label in enumerate(labels) if label > 0]
    matched_labels, matched_objects = [0] * len(defaults), [-1] * len(defaults)
    for p, default in enumerate(defaults):
        best, best_iou = -1, -1.0
        for n in objects:
            iou = naive_iou(boxes[n], default)
            if iou > best_iou:
                best, best_iou = n, iou
        if best >= 0 and best_iou >= 0.5:
            matched_labels[p], matched_objects[p] = labels[best], best
    for n in objects:  # later objects override
        ious = [naive_iou(boxes[n], default) for default in defaults]
        p = ious.index(max(ious))
        matched_labels[p], matched_objects[p] = labels[n], n
    return matched_labels, matched_objects


@pytest.mark.parametrize("seed", range(5))
def test_matching_equals_a_double_loop(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    defaults = box_convert(default_boxes(112, [7, 4, 2, 1, 1, 1]), "cxcywh", "xyxy")
    centres, sizes = torch.rand(3, 6, 2, generator=random), 0.05 + 0.5 * torch.rand(3, 6, 2, generator=random)
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], -1)
    boxes[:, 5] = boxes[:, 4]  # two objects with the same best default box
    labels = torch.randint(1, 4, (3, 6), generator=random)
    labels[1, 3:], labels[2] = 0, 0  # padding; an image without objects
    got_labels, got_boxes = match(defaults, boxes, labels)
    for b in range(3):
        want_labels, want_objects = naive_match(defaults.tolist(), boxes[b].tolist(), labels[b].tolist())
        assert got_labels[b].tolist() == want_labels
        for p, n in enumerate(want_objects):
            if n >= 0:
                assert torch.equal(got_boxes[b, p], boxes[b, n])


def test_every_object_gets_a_default_box_however_small() -> None:
    defaults = box_convert(default_boxes(300, [19, 10, 5, 3, 2, 1]), "cxcywh", "xyxy")
    tiny = torch.tensor([[[0.5, 0.5, 0.51, 0.51]]])
    labels, boxes = match(defaults, tiny, torch.tensor([[2]]))
    assert labels.sum() == 2
    assert torch.equal(boxes[labels > 0], tiny[0])


def test_batch_without_objects_is_all_background() -> None:
    defaults = torch.rand(10, 4)
    labels, boxes = match(defaults, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
    assert labels.tolist() == [[0] * 10] * 2
    assert boxes.shape == (2, 10, 4)


@pytest.mark.parametrize("seed", range(6))
def test_matching_equals_a_double_loop_on_a_coarse_grid_full_of_ties(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        corner = torch.randint(0, 5, (*shape, 2), generator=random).double()
        return torch.cat([corner, corner + torch.randint(1, 5, (*shape, 2), generator=random)], -1) / 8

    defaults, objects = boxes(20), boxes(5, 6)
    labels = torch.randint(0, 4, (5, 6), generator=random)  # a quarter is padding, anywhere
    got_labels, got_boxes = match(defaults, objects, labels)
    for b in range(5):
        want_labels, want_objects = naive_match(defaults.tolist(), objects[b].tolist(), labels[b].tolist())
        assert got_labels[b].tolist() == want_labels
        for p, n in enumerate(want_objects):
            if n >= 0:
                assert torch.equal(got_boxes[b, p], objects[b, n])


QUARTERS = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]])


def test_an_overlap_of_exactly_one_half_matches() -> None:
    objects = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]])
    defaults = torch.cat([QUARTERS, torch.tensor([[0.0, 0, 0.5, 0.25], [0.0, 0, 0.5, 0.24]])])
    labels, _ = match(defaults, objects, torch.tensor([[1, 2]]))
    assert labels.tolist() == [[1, 0, 0, 2, 1, 0]]


def test_of_two_objects_with_one_best_box_the_last_takes_it_whatever_they_overlap() -> None:
    objects = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.0, 0, 0.3, 0.3]]])
    labels, boxes = match(QUARTERS, objects, torch.tensor([[1, 2]]))
    assert labels.tolist() == [[2, 0, 0, 0]]
    assert torch.equal(boxes[0, 0], objects[0, 1])


def test_padding_never_matches_even_on_top_of_a_default_box() -> None:
    boxes = torch.stack([QUARTERS[[0, 1]], QUARTERS[[2, 3]]])
    labels, _ = match(QUARTERS, boxes, torch.tensor([[0, 5], [0, 0]]))
    assert labels.tolist() == [[0, 5, 0, 0], [0, 0, 0, 0]]
