"""Small datasets in PASCAL VOC layout for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"


def object_xml(box: tuple, name: str = "cat", difficult: str = "<difficult>0</difficult>") -> str:
    """An <object> with the box (xmin, ymin, xmax, ymax)."""
    corners = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox></object>"


def write_root(root: Path, xml_of: dict[str, str], labels: str | None = "cat\ndog\n", split: str = "train") -> Path:
    """A tree in VOC layout with black images of 100 x 80; `xml_of` is the content of <annotation> by image id."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{image_id}\n" for image_id in xml_of))
    for image_id, body in xml_of.items():
        (root / f"Annotations/{image_id}.xml").write_text(f"<annotation>{body}</annotation>")
        cv2.imwrite(str(root / f"JPEGImages/{image_id}.jpg"), np.zeros((80, 100, 3), np.uint8))
    if labels is not None:
        (root / "labels.txt").write_text(labels)
    return root
