"""Default boxes, matching and encoding against hand-worked figures and a naive double loop."""

from __future__ import annotations

import math

import pytest
import torch
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
    """Labels, and the index of the object, of every default box: the rules of the SSD paper one by one."""
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
