"""Pictures of the report page: the images that teach most about a detector, with their boxes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from torch import Tensor
from torchvision.ops import box_iou

from instaqnas.data.images import read_image
from instaqnas.errors import InputError
from instaqnas.evaluation.coco_files import GROUND_TRUTH, detections_file
from instaqnas.evaluation.pictures import draw_detections, draw_objects
from instaqnas.metrics.matching import VOC_IOU_THRESHOLD, match_detections

PICTURES = 6  # of a group
SIDE = 256  # of the longer side of a picture, in pixels
JPEG_QUALITY = 80


class Failures(NamedTuple):
    """Failures of one image at a score threshold and IoU 0.5.

    missed: number of objects without a detection of their class; difficult objects do not count.
    confused: highest score of a false positive on an object of another class, 0 without one.
    false: highest score of a false positive that overlaps no object, 0 without one.
    """

    missed: int
    confused: float
    false: float


@dataclass(frozen=True)
class ShownImage:
    """One image with N objects, and D detections that reach the score threshold; boxes in pixels of the file."""

    image_id: str
    path: Path
    boxes_xyxy: Tensor  # [N, 4]
    labels: Tensor  # int64 [N]
    difficult: Tensor  # bool [N]
    found_xyxy: Tensor  # [D, 4]
    found_scores: Tensor  # [D]
    found_labels: Tensor  # int64 [D]

    def failures(self) -> Failures:
        """See `Failures`."""
        matches = match_detections(
            self.found_xyxy[None],
            self.found_scores[None],
            self.found_labels[None],
            self.boxes_xyxy[None],
            self.labels[None],
            self.difficult[None],
        )
        hit = matches.true_positive[0]
        false = ~hit & ~matches.ignored[0]
        overlap = box_iou(self.found_xyxy, self.boxes_xyxy) >= VOC_IOU_THRESHOLD  # [D, N]
        other = (overlap & (self.found_labels[:, None] != self.labels[None])).any(1)
        missed = int((~self.difficult).sum()) - int(hit.sum())
        return Failures(missed, self._highest(false & other), self._highest(false & ~overlap.any(1)))

    def _highest(self, mask: Tensor) -> float:
        return float(self.found_scores[mask].max()) if mask.any() else 0.0


def shown_images(folder: Path, bits: str, score_threshold: float) -> list[ShownImage]:
    """All images of an evaluation, from its COCO files.

    Args:
        folder: of the evaluation.
        bits: the row.
        score_threshold: lowest score of a detection, 0 to 1.
    """
    content = json.loads((folder / GROUND_TRUTH).read_text())
    found = [box for box in json.loads((folder / detections_file(bits)).read_text()) if box["score"] >= score_threshold]
    objects_of, found_of = _by_image(content["annotations"]), _by_image(found)
    images = []
    for image in content["images"]:
        objects, detections = objects_of.get(image["id"], []), found_of.get(image["id"], [])
        images.append(
            ShownImage(
                Path(image["file_name"]).stem,
                Path(content["info"]["image_folder"]) / image["file_name"],
                _boxes_xyxy(objects),
                _labels(objects),
                torch.tensor([bool(box["iscrowd"]) for box in objects], dtype=torch.bool),
                _boxes_xyxy(detections),
                torch.tensor([box["score"] for box in detections], dtype=torch.float32),
                _labels(detections),
            )
        )
    return images


def picture_groups(
    images: Sequence[ShownImage], rows: Sequence[Mapping[str, str]], class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Groups of pictures for the page: title, note, and pictures with source, name and caption.

    Args:
        images: of an evaluation.
        rows: of per_image.csv, in the same order.
        class_names: without background.
    """
    rows_of = {id(image): row for image, row in zip(images, rows, strict=True)}
    failures = {id(image): image.failures() for image in images}

    def number(key: str) -> Callable[[ShownImage], float]:
        return lambda image: float(rows_of[id(image)][key])

    with_objects = [image for image in images if len(image.labels)]
    varied = len({row["gbitops"] for row in rows}) > 1
    chosen = [
        ("Hardest images", "lowest quality of all with objects", _lowest(with_objects, number("quality"))),
        ("Easiest images", "highest quality of all with objects", _highest(with_objects, number("quality"))),
        ("Fewest bits", "lowest GBitOps", _lowest(images, number("gbitops")) if varied else []),
        ("Most bits", "highest GBitOps", _highest(images, number("gbitops")) if varied else []),
        ("Missed", "most objects without a detection", _worst(images, lambda image: failures[id(image)].missed)),
        ("Confused", "an object taken for another class", _worst(images, lambda image: failures[id(image)].confused)),
        ("False alarms", "a detection where nothing is", _worst(images, lambda image: failures[id(image)].false)),
    ]
    legend = "Objects are white, detections coloured by class."
    return [
        {
            "title": title,
            "note": f"{note}. {legend}",
            "pictures": [_picture(image, rows_of[id(image)], class_names) for image in group],
        }
        for title, note, group in chosen
        if group
    ]


def _lowest(images: Sequence[ShownImage], key: Callable[[ShownImage], float]) -> list[ShownImage]:
    return sorted(images, key=key)[:PICTURES]


def _highest(images: Sequence[ShownImage], key: Callable[[ShownImage], float]) -> list[ShownImage]:
    return sorted(images, key=key, reverse=True)[:PICTURES]


def _worst(images: Sequence[ShownImage], key: Callable[[ShownImage], float]) -> list[ShownImage]:
    return [image for image in _highest(images, key) if key(image) > 0]


def _picture(image: ShownImage, row: Mapping[str, str], class_names: tuple[str, ...]) -> dict[str, str]:
    bits = [value for key, value in row.items() if key.startswith("position_") and value]
    chosen = bits[0] if len(set(bits)) == 1 else ", ".join(bits)
    caption = f"{image.image_id}: {float(row['gbitops']):.4g} GBitOps, quality {float(row['quality']):.3g}; {chosen}"
    return {"name": image.image_id, "caption": caption, "source": _drawn(image, class_names)}


def _drawn(image: ShownImage, class_names: tuple[str, ...]) -> str:
    """The image with its boxes as a data URL; an empty one if its file is gone."""
    try:
        pixels = read_image(image.path)
    except InputError:
        return "data:,"
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    picture = draw_objects(torch.from_numpy(pixels).permute(2, 0, 1), image.boxes_xyxy * scale)
    found = (image.found_xyxy * scale, image.found_scores, image.found_labels)
    picture = draw_detections(picture, *found, class_names)
    encoded = cv2.imencode(
        ".jpg",
        cv2.cvtColor(picture.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR),
        [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
    )[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def _by_image(boxes: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for box in boxes:
        grouped.setdefault(box["image_id"], []).append(box)
    return grouped


def _boxes_xyxy(boxes: Sequence[dict[str, Any]]) -> Tensor:
    xywh = torch.tensor([box["bbox"] for box in boxes], dtype=torch.float32).view(-1, 4)
    return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)


def _labels(boxes: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([box["category_id"] for box in boxes], dtype=torch.int64)
