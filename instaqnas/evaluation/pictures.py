"""Draws boxes on images: annotated ones in white, detections in one colour per class."""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes


def class_colour(label: int, classes: int) -> tuple[int, int, int]:
    """RGB colour, 0 to 255, of a class; hues are evenly spread over the labels 1 to `classes`."""
    red, green, blue = colorsys.hsv_to_rgb((label - 1) / classes, 0.9, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(image: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """`image`, uint8 [3, H, W], with boxes [N, 4] in white."""
    return _draw(image, boxes_xyxy, colors=(255, 255, 255))


def draw_detections(
    image: Tensor, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, class_names: tuple[str, ...]
) -> Tensor:
    """`image`, uint8 [3, H, W], with boxes [D, 4], each with its class (labels [D] from 1) and score [D]."""
    names = [f"{class_names[label - 1]} {score:.2f}" for label, score in zip(labels.tolist(), scores, strict=True)]
    colours = [class_colour(label, len(class_names)) for label in labels.tolist()]
    return _draw(image, boxes_xyxy, labels=names, colors=colours)


def _draw(image: Tensor, boxes_xyxy: Tensor, **style: object) -> Tensor:
    if len(boxes_xyxy) == 0:
        return image.clone()
    return draw_bounding_boxes(image, boxes_xyxy.round().to(torch.int64), width=1, **style)
