"""Miniature archives of PASCAL VOC 2007 and 2012, with the layout of the real ones."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import cv2
import numpy as np

from instaqnas.data.voc import VOC_CLASSES
from instaqnas.tools.download_voc import Archive

WIDTH, HEIGHT = 80, 60
IMAGES = {("2007", "trainval"): 6, ("2007", "test"): 5, ("2012", "trainval"): 10}
ANNOTATION = """<annotation>
<folder>VOC{year}</folder><filename>{image_id}.jpg</filename>
<size><width>80</width><height>60</height><depth>3</depth></size><segmented>0</segmented>
<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>{difficult}
<bndbox><xmin>{x1}.0</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
</object>
<object><name>person</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>80</xmax><ymax>60</ymax></bndbox></object>
</annotation>
"""


def write_archives(folder: Path) -> list[Archive]:
    """Writes the three archives into `folder` and describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_archive(folder, year, split, images) for (year, split), images in IMAGES.items()]


def _write_archive(folder: Path, year: str, split: str, images: int) -> Archive:
    tree = folder / f"tree-{year}-{split}" / "VOCdevkit" / f"VOC{year}"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages", "SegmentationClass"):
        (tree / name).mkdir(parents=True)
    rng = np.random.default_rng([int(year), images])
    ids = [f"{year}_{split}_{index:06d}" for index in range(images)]
    for index, image_id in enumerate(ids):
        pixels = rng.integers(0, 80, (HEIGHT, WIDTH, 3), np.uint8)
        x1, y1 = (int(value) for value in rng.integers(3, 30, 2))
        x2, y2 = x1 + int(rng.integers(15, 45)), y1 + int(rng.integers(15, 28))
        pixels[y1 - 1 : y2, x1 - 1 : x2] += rng.integers(80, 170, 3, np.uint8)
        cv2.imwrite(str(tree / "JPEGImages" / f"{image_id}.jpg"), pixels)
        difficult = "" if year == "2012" else "<difficult>0</difficult>"  # some of 2012 have none
        box = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        text = ANNOTATION.format(year=year, image_id=image_id, name=VOC_CLASSES[index % 20], difficult=difficult, **box)
        (tree / "Annotations" / f"{image_id}.xml").write_text(text)
    (tree / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    (tree / "ImageSets" / "Main" / f"cat_{split}.txt").write_text("".join(f"{name} -1\n" for name in ids))
    filename = f"VOC{split}_{year}.tar"
    with tarfile.open(folder / filename, "w") as tar:
        tar.add(tree.parent, "VOCdevkit")
    content = (folder / filename).read_bytes()
    address = f"http://voc.invalid/{filename}"
    return Archive(year, split, images, address, filename, hashlib.md5(content).hexdigest(), len(content))
