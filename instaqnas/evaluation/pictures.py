"""Draws boxes on images, annotated ones in white and detections in one colour per class, and the bits of each layer.

Lines and text grow with the picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from instaqnas.bits import BitChoice

Colour = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
FEW_BITS, MANY_BITS = (225, 235, 250), (20, 50, 130)  # shades of 1 and of 8 bits in a strip
SMALLEST_FONT = 10  # pixels


def class_colour(label: int, classes: int) -> Colour:
    """RGB colour, 0 to 255, of a class; hues are evenly spread over the labels 1 to `classes`."""
    red, green, blue = colorsys.hsv_to_rgb((label - 1) / classes, 0.9, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(image: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """`image`, uint8 [3, H, W], with boxes [N, 4] in white."""
    return _draw(image, boxes_xyxy, [WHITE] * len(boxes_xyxy), [""] * len(boxes_xyxy))


def draw_detections(
    image: Tensor, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, class_names: tuple[str, ...]
) -> Tensor:
    """`image`, uint8 [3, H, W], with boxes [D, 4], each with its class (labels [D] from 1) and score [D]."""
    names = [f"{class_names[label - 1]} {score:.2f}" for label, score in zip(labels.tolist(), scores, strict=True)]
    return _draw(image, boxes_xyxy, [class_colour(label, len(class_names)) for label in labels.tolist()], names)


def add_bits(image: Tensor, bits: Sequence[BitChoice], gbitops: float, lowest: float, highest: float) -> Tensor:
    """`image`, uint8 [3, H, W], with a strip below: a cell for each layer, and a bar for the cost of the image.

    Args:
        image: the picture.
        bits: (weight bits, activation bits) of each layer, in the order of the network. The upper half of a cell shows
            the weight bits, the lower half the activation bits; the darker, the more.
        gbitops: of the image.
        lowest, highest: GBitOps of the cheapest and the most expensive configuration.
    """
    height, width = image.shape[1:]
    font = _font(width, 44)
    row = round(1.6 * font.size)
    strip = Image.new("RGB", (width, 3 * row), WHITE)
    drawing = ImageDraw.Draw(strip)
    cell = width / len(bits)
    for place, pair in enumerate(bits):
        for half, value in enumerate(pair):
            left, top = round(place * cell), half * row
            shade = min(value, 8) / 8
            colour = tuple(round(few + shade * (many - few)) for few, many in zip(FEW_BITS, MANY_BITS, strict=True))
            drawing.rectangle((left, top, round((place + 1) * cell) - 2, top + row - 2), fill=colour)
            if cell > 0.9 * font.size:
                text_colour = WHITE if shade > 0.4 else BLACK
                centre = (left + cell / 2, top + row / 2)
                drawing.text(centre, str(value), font=font, fill=text_colour, anchor="mm")
    share = (gbitops - lowest) / (highest - lowest) if highest > lowest else 1.0
    drawing.rectangle(
        (0, 2 * row + 2, round(min(max(share, 0.0), 1.0) * (width - 1)), 3 * row - 2), fill=(190, 205, 235)
    )
    text = f"{gbitops:.3g} GBitOps of {lowest:.3g} to {highest:.3g}"
    drawing.text((font.size / 2, 2.5 * row), text, font=font, fill=BLACK, anchor="lm")
    return torch.cat([image, _tensor(strip)], dim=1)


def enlarged(image: Tensor, least: int) -> tuple[Tensor, int]:
    """`image`, uint8 [3, H, W], its pixels repeated until the longer side has at least `least`; and how often."""
    factor = max(1, -(-least // max(image.shape[1:])))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2), factor


def _draw(image: Tensor, boxes_xyxy: Tensor, colours: Sequence[Colour], texts: Sequence[str]) -> Tensor:
    height, width = image.shape[1:]
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    drawing, font = ImageDraw.Draw(picture), _font(max(height, width), 45)
    line = max(1, round(max(height, width) / 320))
    for (left, top, right, bottom), colour, text in zip(boxes_xyxy.tolist(), colours, texts, strict=True):
        corners = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        drawing.rectangle(corners, outline=colour, width=line)
        if text:
            x = min(max(0.0, left), width - drawing.textlength(text, font) - 2)
            y = top - font.size - 3 if top > font.size + 3 else top + line
            drawing.rectangle(drawing.textbbox((x, y), text, font), fill=colour)
            drawing.text((x, y), text, font=font, fill=BLACK if sum(colour) > 330 else WHITE)
    return _tensor(picture)


def _font(side: int, per_side: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(max(SMALLEST_FONT, round(side / per_side)))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
