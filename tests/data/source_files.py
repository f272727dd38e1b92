"""The same small dataset written in COCO, YOLO and VOC format, the numbers of each worked out by its own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

NAMES = ("cat", "dog", "red cell & <co>")


class Drawn(NamedTuple):
    """An image and its objects: (class, first column, first row, columns, rows), in whole pixels counted from 0."""

    split: str
    name: str
    size: tuple[int, int]
    objects: list[tuple[int, int, int, int, int]]


DRAWN = (
    Drawn("train", "b.jpg", (100, 80), [(1, 0, 0, 100, 80), (0, 9, 19, 20, 30)]),
    Drawn("train", "a 1.png", (37, 41), [(2, 36, 0, 1, 41), (2, 1, 2, 3, 5), (0, 7, 7, 2, 2)]),  # the first is too thin
    Drawn("train", "empty.jpg", (64, 48), []),
    Drawn("val", "large.v2.png", (6001, 3999), [(0, 1, 1, 5999, 3997), (1, 2017, 1013, 7, 11), (1, 5990, 3990, 11, 9)]),
    Drawn("test", "c.jpg", (50, 50), [(0, 10, 10, 5, 5)]),
)
# Inclusive pixels counted from 1: first column + 1 to first column + columns.
CORNERS = {
    "b": [("dog", 1, 1, 100, 80), ("cat", 10, 20, 29, 49)],
    "a 1": [("red cell & <co>", 2, 3, 4, 7), ("cat", 8, 8, 9, 9)],
    "empty": [],
    "large.v2": [("cat", 2, 2, 6000, 3998), ("dog", 2018, 1014, 2024, 1024), ("dog", 5991, 3991, 6001, 3999)],
    "c": [("cat", 11, 11, 15, 15)],
}


def save_image(path: Path, size: tuple[int, int]) -> None:
    """A black image; as JPEG where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", size).save(path)


def write_coco(root: Path) -> Path:
    """annotations/instances_SPLIT.json beside images/; the category ids have gaps, and are in no order."""
    ids = {0: 3, 1: 17, 2: 90}
    categories = [{"id": ids[label], "name": NAMES[label], "supercategory": "thing"} for label in (2, 0, 1)]
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val", "test"):
        images, annotations = [], []
        for number, drawn in enumerate(drawn for drawn in DRAWN if drawn.split == split):
            save_image(root / "images" / drawn.name, drawn.size)
            width, height = drawn.size
            images.append({"id": number, "file_name": drawn.name, "width": width, "height": height})
            for label, x, y, columns, rows in drawn.objects:
                box = {"bbox": [x, y, columns, rows], "area": columns * rows, "iscrowd": 0}
                annotations.append({"id": len(annotations), "image_id": number, "category_id": ids[label], **box})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def write_yolo(root: Path) -> Path:
    """images/SPLIT, labels/SPLIT and data.yaml; numbers have six decimals."""
    for drawn in DRAWN:
        save_image(root / "images" / drawn.split / drawn.name, drawn.size)
        labels = root / "labels" / drawn.split / drawn.name
        labels.parent.mkdir(parents=True, exist_ok=True)
        width, height = drawn.size
        lines = []
        for label, x, y, columns, rows in drawn.objects:
            centre = f"{(x + columns / 2) / width:.6f} {(y + rows / 2) / height:.6f}"
            lines.append(f"{label} {centre} {columns / width:.6f} {rows / height:.6f}\n")
        if lines:
            labels.with_suffix(".txt").write_text("".join(lines))
    names = "".join(f"  {label}: {json.dumps(name)}\n" for label, name in enumerate(NAMES))
    splits = "".join(f"{split}: images/{split}\n" for split in ("train", "val", "test"))
    (root / "data.yaml").write_text(f"path: .\n{splits}nc: 3\nnames:\n{names}")
    return root


def write_voc(root: Path) -> Path:
    """A VOC tree."""
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    for split in ("train", "val", "test"):
        ids = [drawn.name.rpartition(".")[0] for drawn in DRAWN if drawn.split == split]
        (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    for drawn in DRAWN:
        image_id = drawn.name.rpartition(".")[0]
        save_image(root / "JPEGImages" / drawn.name, drawn.size)
        body = "<size><width>{}</width><height>{}</height></size>".format(*drawn.size)
        for name, *corners in CORNERS[image_id]:
            name = name.replace("&", "&amp;").replace("<", "&lt;")
            box = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>".format(*corners)
            body += f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
        (root / f"Annotations/{image_id}.xml").write_text(f"<annotation>{body}</annotation>")
    return root
