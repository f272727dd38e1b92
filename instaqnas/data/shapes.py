"""Writes the embedded dataset: images of drawn objects (see drawing.py) in PASCAL VOC layout.

    ROOT/JPEGImages/ID.jpg
    ROOT/Annotations/ID.xml
    ROOT/ImageSets/Main/SPLIT.txt
    ROOT/labels.txt                   class names, one per line, without background
    ROOT/difficulty.csv               difficulty of each image, drawn uniformly from 0 to 1
    ROOT/generated.json               the request, written last

The tree has the layout that voc.py reads. Images are drawn by several processes if there are many.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from instaqnas.cpus import available_cpus
from instaqnas.data.drawing import SHAPES, Drawing, draw_image
from instaqnas.errors import InputError

SPLITS = ("train", "val", "test")  # the position is part of each image's seed: append, never reorder
DRAWING_VERSION = 1  # raise it whenever the same seed draws other pixels
STAMP = "generated.json"
EMPTY_STREAM = 1  # random numbers that decide whether an image is empty
MIN_IMAGE_SIZE = 64  # in smaller images, the smallest objects would have fewer than ten pixels a side
JPEG_QUALITY = 92
IMAGES_PER_PROCESS = 500  # fewer are drawn in the time that another process takes to start


def generate_shapes(
    root: Path, counts: Mapping[str, int], image_size: int = 160, seed: int = 0, empty: float = 0.0
) -> None:
    """Writes the dataset to `root`, unless `root` already holds exactly this one.

    The tree appears under `root` complete or not at all. An image depends only on the seed, its split and its index, so
    a larger dataset begins with the images of a smaller one. Whether it is empty depends on `empty` too; images that
    have objects are the same for every share.

    Args:
        root: folder to create; may exist if it is empty.
        counts: images per split, keys from `SPLITS`.
        image_size: side of the square images in pixels, at least 64.
        seed: 0 or more.
        empty: share of images without objects, from 0 to less than 1; each image is drawn for itself.

    Raises:
        InputError: a value is out of range, `root` holds something else, or it cannot be written.
    """
    _check_request(counts, image_size, seed, empty)
    root = Path(root).resolve()
    request = {
        "drawing_version": DRAWING_VERSION,
        "seed": seed,
        "image_size": image_size,
        "counts": {split: counts[split] for split in SPLITS if split in counts},
    }
    if empty:  # a dataset without empty images keeps the stamp that it always had
        request["empty"] = empty
    if _holds(root, request):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent)
    except OSError as error:
        raise InputError(f"{root.parent}: cannot be written: {error.strerror}") from None
    with temporary as folder:
        # A subfolder, because the temporary folder is readable by its owner only and would stay so when renamed.
        tree = Path(folder) / root.name
        _write_tree(tree, request)
        os.rename(tree, root)


def _check_request(counts: Mapping[str, int], image_size: int, seed: int, empty: float) -> None:
    for split, count in counts.items():
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if count < 0:
            raise InputError(f"split {split}: {count} images; must be 0 or more")
    if not sum(counts.values()):
        raise InputError("no images requested: every split is empty")
    if image_size < MIN_IMAGE_SIZE:
        raise InputError(f"image size {image_size}: must be at least {MIN_IMAGE_SIZE} pixels")
    if seed < 0:
        raise InputError(f"seed {seed}: must be 0 or more")
    if not 0 <= empty < 1:
        raise InputError(f"share of empty images {empty}: must be at least 0 and less than 1")


def _holds(root: Path, request: dict) -> bool:
    """Whether `root` holds the requested dataset; raises `InputError` if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{root}: exists, but is not a generated dataset (no readable {STAMP})") from None
    if found != request:
        raise InputError(f"{root}: holds another dataset, {json.dumps(found)}; requested: {json.dumps(request)}")
    return True


def _write_tree(tree: Path, request: dict) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tree / folder).mkdir(parents=True)
    images = []
    for split, count in request["counts"].items():
        own = [(split, index) for index in range(count)]
        _write_lines(tree / "ImageSets" / "Main" / f"{split}.txt", [_image_id(*image) for image in own])
        images += own
    write = partial(_write_drawing, tree, request["seed"], request["image_size"], request.get("empty", 0.0))
    _write_lines(tree / "difficulty.csv", ["image_id,difficulty", *_in_processes(write, images)])
    _write_lines(tree / "labels.txt", [shape.name for shape in SHAPES])
    _write_lines(tree / STAMP, [json.dumps(request)])


def _in_processes(write: Callable[[tuple[str, int]], str], images: list[tuple[str, int]]) -> Iterable[str]:
    """Calls `write` for each image, in several processes if there are enough images; yields its results in order."""
    processes = min(available_cpus(), len(images) // IMAGES_PER_PROCESS)
    if processes < 2:
        return map(write, images)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(write, images, chunksize=50))


def _write_drawing(tree: Path, seed: int, image_size: int, empty: float, image: tuple[str, int]) -> str:
    """Draws and writes the image (split, index); returns its line of difficulty.csv."""
    split, index = image
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    difficulty = round(rng.uniform(), 4)
    # A generator of its own: with the other one, images that keep their objects would change.
    is_empty = np.random.default_rng([seed, SPLITS.index(split), index, EMPTY_STREAM]).uniform() < empty
    _write_image(tree, _image_id(*image), draw_image(rng, image_size, difficulty, empty=is_empty))
    return f"{_image_id(*image)},{difficulty:.4f}"


def _image_id(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_image(tree: Path, image_id: str, drawing: Drawing) -> None:
    bgr = cv2.cvtColor(drawing.image, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    (tree / "JPEGImages" / f"{image_id}.jpg").write_bytes(jpeg.tobytes())
    annotation = _annotation(f"{image_id}.jpg", drawing)
    ET.indent(annotation)
    ET.ElementTree(annotation).write(tree / "Annotations" / f"{image_id}.xml", encoding="utf-8")


def _annotation(filename: str, drawing: Drawing) -> ET.Element:
    height, width, depth = drawing.image.shape
    annotation = ET.Element("annotation")
    _add_texts(annotation, folder="JPEGImages", filename=filename)
    _add_texts(ET.SubElement(annotation, "size"), width=width, height=height, depth=depth)
    for name, (xmin, ymin, xmax, ymax) in zip(drawing.names, drawing.boxes.tolist(), strict=True):
        truncated = int(xmin == 1 or ymin == 1 or xmax == width or ymax == height)
        element = ET.SubElement(annotation, "object")
        _add_texts(element, name=name, pose="Unspecified", truncated=truncated, difficult=0)
        _add_texts(ET.SubElement(element, "bndbox"), xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)
    return annotation


def _add_texts(parent: ET.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ET.SubElement(parent, tag).text = str(text)
