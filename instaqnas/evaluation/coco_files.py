"""Objects and detections of an evaluation as COCO JSON files, which FiftyOne, pycocotools and others open.

ground_truth.json      images, categories, and objects; a difficult object has `iscrowd` 1
detections_ROW.json    the results list of one way to choose bits, which pycocotools' `loadRes` takes

Boxes are in pixels of the image files. `file_name` is relative to the folder that holds all images, which
`info.image_folder` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from instaqnas.data.voc import Annotation
from instaqnas.files import write_text
from instaqnas.metrics.coco import coco_detections, coco_objects
from instaqnas.metrics.voc import DetectionRecords

GROUND_TRUTH = "ground_truth.json"


def detections_file(bits: str) -> str:
    """Name of the file with the detections of one row, such as `detections_uniform_w3a3.json`."""
    return f"detections_{bits.replace(':', '_')}.json"


def write_ground_truth(
    folder: Path,
    records: DetectionRecords,
    annotations: Sequence[Annotation],
    class_names: Sequence[str],
    image_size: int,
) -> None:
    """Writes the images and objects of a split.

    Args:
        folder: to write to.
        records: of any row; boxes in pixels of the network's input.
        annotations: of the split, in the same order.
        class_names: without background.
        image_size: side of the network's input, in pixels.
    """
    paths = [annotation.image_path.resolve() for annotation in annotations]
    images_in = Path(os.path.commonpath([path.parent for path in paths]))
    images = [
        {
            "id": number,
            "file_name": path.relative_to(images_in).as_posix(),
            "width": annotation.width,
            "height": annotation.height,
        }
        for number, (annotation, path) in enumerate(zip(annotations, paths, strict=True), start=1)
    ]
    objects = coco_objects(records, scales_of(annotations, image_size))
    content = {
        "info": {"image_folder": str(images_in)},
        "images": images,
        "categories": [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)],
        "annotations": [{"id": number, **values} for number, values in enumerate(objects, start=1)],
    }
    write_text(folder / GROUND_TRUTH, json.dumps(content))


def write_detections(
    folder: Path, bits: str, records: DetectionRecords, annotations: Sequence[Annotation], image_size: int
) -> None:
    """Writes the detections of one row; arguments as of `write_ground_truth`."""
    found = list(coco_detections(records, scales_of(annotations, image_size)))
    write_text(folder / detections_file(bits), json.dumps(found))


def scales_of(annotations: Sequence[Annotation], image_size: int) -> Tensor:
    """Pixels of each image for one pixel of the network's input, in x and y: float64 [N, 2]."""
    sizes = [(annotation.width, annotation.height) for annotation in annotations]
    return torch.tensor(sizes, dtype=torch.float64) / image_size
