"""Drawn images: boxes that fit their objects, and a difficulty that shows."""

from __future__ import annotations

import cv2
import numpy as np

from instaqnas.data.drawing import draw_image

IMAGE_SIZE = 96


def background_clutter(image: np.ndarray, boxes: np.ndarray) -> float:
    """Mean grey-level step between neighbours, a pixel or more away from every box."""
    grey = image.astype(float).mean(axis=2)
    steps = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    outside = np.ones(steps.shape, dtype=bool)
    for xmin, ymin, xmax, ymax in boxes:
        outside[max(ymin - 4, 0) : ymax + 3, max(xmin - 4, 0) : xmax + 3] = False
    return steps[outside].mean()


def test_difficulty_raises_background_clutter() -> None:
    difficulties = np.linspace(0, 1, 60)
    drawings = [draw_image(np.random.default_rng([7, i]), IMAGE_SIZE, d) for i, d in enumerate(difficulties)]
    clutter = [background_clutter(drawing.image, drawing.boxes) for drawing in drawings]
    assert np.corrcoef(difficulties, clutter)[0, 1] > 0.7


def test_easy_objects_are_larger_than_hard_ones() -> None:
    def mean_side(difficulty: float) -> float:
        boxes = [draw_image(np.random.default_rng([8, i]), IMAGE_SIZE, difficulty).boxes for i in range(40)]
        sides = np.concatenate(boxes)
        return (sides[:, 2:] - sides[:, :2] + 1).max(axis=1).mean() / IMAGE_SIZE

    assert 0.30 < mean_side(0.0) < 0.55
    assert 0.14 < mean_side(1.0) < 0.30


def test_easiest_image_is_one_colour_outside_the_boxes() -> None:
    for index in range(10):
        image, boxes, _ = draw_image(np.random.default_rng([9, index]), IMAGE_SIZE, 0.0)
        assert len(boxes) <= 2
        assert background_clutter(image, boxes) == 0


def test_box_touches_the_object_on_every_side() -> None:
    """On a plain background a single object's extent can be read off the pixels, to one pixel of soft edge."""
    checked = 0
    for index in range(40):
        image, boxes, _ = draw_image(np.random.default_rng([10, index]), IMAGE_SIZE, 0.0)
        if len(boxes) > 1:
            continue
        corner = image[0, 0] if boxes[0, 0] > 2 else image[0, -1]
        differs = np.abs(image.astype(int) - corner).max(axis=2) > 12
        ys, xs = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
        extent = np.array([xs[0], ys[0], xs[-1], ys[-1]]) + 1
        assert np.abs(extent - boxes[0]).max() <= 1
        checked += 1
    assert checked >= 5


def test_every_object_is_nearest_in_hue_to_its_own_class() -> None:
    hues: dict[str, list[complex]] = {}
    for index in range(160):
        image, boxes, names = draw_image(np.random.default_rng([11, index]), IMAGE_SIZE, 0.0)
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        for name, (xmin, ymin, xmax, ymax) in zip(names, boxes, strict=True):
            inside = hsv[ymin - 1 : ymax, xmin - 1 : xmax].reshape(-1, 3)
            saturated = inside[inside[:, 1] > 100, 0]
            hues.setdefault(name, []).append(np.exp(1j * np.median(saturated) * np.pi / 90))
    typical = {name: np.mean(values) for name, values in hues.items()}
    for name, values in hues.items():
        for value in values:
            assert min(typical, key=lambda other, value=value: abs(typical[other] - value)) == name
