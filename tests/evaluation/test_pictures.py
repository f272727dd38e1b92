"""Boxes and strips of bits on pictures."""

from __future__ import annotations

import pytest
import torch

from instaqnas.evaluation.pictures import add_bits, class_colour, draw_detections, draw_objects, enlarged

GREY = 90


@pytest.mark.parametrize("side, line", [(100, 1), (640, 2), (3200, 10)])
def test_lines_grow_with_the_picture(side: int, line: int) -> None:
    image = torch.full((3, side, side), GREY, dtype=torch.uint8)
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * side
    row = draw_objects(image, box)[0, side // 2]
    assert (row[: side // 2] == 255).sum() == line
    assert (image == GREY).all()


def test_a_detection_has_the_colour_of_its_class_and_text_within_the_picture() -> None:
    image = torch.full((3, 200, 200), GREY, dtype=torch.uint8)
    boxes = torch.tensor([[190.0, 2, 199, 60], [20, 100, 60, 150]])
    drawn = draw_detections(image, boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 2]), ("cup", "jug"))
    assert drawn[:, 125, 20].tolist() == list(class_colour(2, 2))
    assert drawn[:, 30, 190].tolist() == list(class_colour(1, 2))
    assert draw_detections(image, boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64), ("cup",)).equal(image)


def test_more_bits_are_darker_and_the_bar_is_as_long_as_the_cost() -> None:
    image = torch.full((3, 40, 400), GREY, dtype=torch.uint8)
    strip = add_bits(image, [(2, 8), (8, 2)], gbitops=2.0, lowest=1.0, highest=3.0)[:, 40:].float()
    assert add_bits(image, [(2, 8)], 1.0, 1.0, 1.0)[:, :40].equal(image)
    row = strip.shape[1] // 3
    first, second = strip[:, :, 20].mean(0), strip[:, :, 220].mean(0)
    assert first[2] > first[row + 2]
    assert second[2] < second[row + 2]
    assert first[2] == second[row + 2]
    bar = strip[0, 3 * row - 3]
    assert (bar < 255).sum() == pytest.approx(200, abs=1)  # half of the width


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    larger, factor = enlarged(image, 5)
    assert factor == 3
    assert larger.shape == (3, 6, 6)
    assert larger[:, 2, 5].tolist() == image[:, 0, 1].tolist()
    assert enlarged(larger, 6)[1] == 1
