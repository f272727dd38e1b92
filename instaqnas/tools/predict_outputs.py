"""What `predict` writes: JSON lines, drawn pictures and videos, PASCAL VOC annotations, and a COCO file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import cv2
from torch import Tensor

from instaqnas.data.source import SourceImage, SourceObject
from instaqnas.data.voc_tree import write_annotation
from instaqnas.deploy.predictor import Prediction, Predictor
from instaqnas.errors import InputError
from instaqnas.evaluation.pictures import add_bits, draw_detections, enlarged
from instaqnas.files import write_text
from instaqnas.tools.predict_inputs import Item, is_video

SMALLEST_PICTURE = 480  # pixels of the longer side of a drawn picture


class Output(Protocol):
    """One way to keep predictions."""

    def add(self, item: Item, found: Prediction) -> None:
        """Keeps the prediction of one image or frame."""

    def close(self) -> None:
        """Writes what is written at the end."""


class JsonLines:
    """One JSON line an item on standard output."""

    def add(self, item: Item, found: Prediction) -> None:
        """Prints the line."""
        print(json.dumps({"file": str(item.path), **item.frame, **found.plain()}), flush=True)

    def close(self) -> None:
        """Nothing is left to write."""


class Drawings:
    """Pictures NAME_detections.png of images, and videos NAME_detections.mp4 of videos, in a folder.

    Args:
        folder: to write to.
        predictor: whose configurations give the range of costs.
    """

    def __init__(self, folder: Path, predictor: Predictor) -> None:
        self.folder, self.predictor = folder, predictor
        self.videos: dict[Path, cv2.VideoWriter] = {}

    def add(self, item: Item, found: Prediction) -> None:
        """Draws the item. Raises: InputError if it cannot be written."""
        path = drawn_path(item.path, self.folder)
        pixels = drawn(item.image, found, self.predictor).permute(1, 2, 0).numpy()[..., ::-1]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not item.is_frame:
                path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
                return
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        if path not in self.videos:
            size = (pixels.shape[1], pixels.shape[0])
            self.videos[path] = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), item.rate, size)
            if not self.videos[path].isOpened():
                raise InputError(f"{path}: cannot be written as a video")
        self.videos[path].write(pixels)

    def close(self) -> None:
        """Ends the videos."""
        for video in self.videos.values():
            video.release()


class VocAnnotations:
    """One annotation NAME.xml an image in a folder, in PASCAL VOC format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, item: Item, found: Prediction) -> None:
        """Writes the annotation. Raises: InputError if it cannot be written."""
        height, width = item.image.shape[1:]
        boxes = zip(found.names, found.boxes_xyxy.tolist(), strict=True)
        objects = tuple(SourceObject(name, (box[0], box[1], box[2], box[3])) for name, box in boxes)
        path = self.folder / f"{item.path.stem}.xml"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_annotation(path, item.path.name, SourceImage(item.path, width, height, objects))
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Nothing is left to write."""


class CocoFile:
    """All detections in one COCO file, each an annotation with a `score`; images and categories count from 1."""

    def __init__(self, path: Path, class_names: tuple[str, ...]) -> None:
        self.path = path
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)]

    def add(self, item: Item, found: Prediction) -> None:
        """Notes the detections."""
        height, width = item.image.shape[1:]
        image = {"id": len(self.images) + 1, "file_name": str(item.path), "width": width, "height": height}
        self.images.append({**image, **item.frame})
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
        for label, score, (x1, y1, x2, y2) in rows:
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            place = {"id": len(self.annotations) + 1, "image_id": image["id"], "category_id": label}
            self.annotations.append({**place, **box, "score": score})

    def close(self) -> None:
        """Writes the file."""
        content = {"images": self.images, "categories": self.categories, "annotations": self.annotations}
        write_text(self.path, json.dumps(content))


def drawn_path(path: Path, folder: Path) -> Path:
    """Where a file is drawn to; it may lie in `folder` itself, so the name differs."""
    return folder / f"{path.stem}_detections{'.mp4' if is_video(path) else '.png'}"


def drawn(image: Tensor, found: Prediction, predictor: Predictor) -> Tensor:
    """The image with its detections, and below them the bits of each layer and the cost; small images are enlarged.

    Args:
        image: uint8 [3, H, W].
        found: prediction of this image.
        predictor: whose configurations give the range of costs.
    """
    picture, factor = enlarged(image, SMALLEST_PICTURE)
    boxes = found.boxes_xyxy * factor
    picture = draw_detections(picture, boxes, found.scores, found.labels, found.class_names)
    lowest, highest = (
        cost + predictor.policy_gbitops for cost in (predictor.costs.lowest(), predictor.costs.highest())
    )
    return add_bits(picture, found.layer_bits, found.gbitops, lowest, highest)
