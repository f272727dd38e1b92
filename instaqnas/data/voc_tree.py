"""Writes datasets as PASCAL VOC trees, and reads such trees as a source."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from instaqnas.data.source import UNSPLIT, Source, SourceImage, SourceObject, image_ids
from instaqnas.data.voc import check_split, read_class_names, read_split
from instaqnas.data.voc_lists import split_names
from instaqnas.data.voc_xml import Box
from instaqnas.errors import InputError

DECIMALS = 2  # of pixels, as in COCO's files; six decimals of a fraction are as exact up to 6,600 pixels


def read_voc(root: Path) -> Source:
    """Reads all splits of a tree.

    Raises: InputError if its folders, class names or lists are wrong.
    """
    names = read_class_names([root])
    source = Source(names)
    splits = split_names(root, names)
    if not splits:
        raise InputError(f"{root / 'ImageSets/Main'}: no lists; instaqnas.tools.dataset split makes them")
    for split in splits:
        check = check_split([root], split, names)
        source.problems += check.problems
        if not check.problems:
            _add_split(source, root, split)
    return source


def write_tree(source: Source, root: Path, *, copy: bool) -> None:
    """Writes a dataset as a VOC tree, which appears under its name only when it is complete.

    Args:
        source: without problems.
        root: a folder that does not exist or is empty.
        copy: copy the images; False for symbolic links to them.

    Raises: InputError if `root` is not empty, or names of images clash.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root}: exists already and is not an empty folder")
    ids = image_ids(source.images)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
        tree = Path(folder) / "tree"
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (tree / name).mkdir(parents=True)
        _write_lines(tree / "labels.txt", source.class_names)
        for split, paths in source.splits.items():
            if split != UNSPLIT:
                _write_lines(tree / "ImageSets/Main" / f"{split}.txt", sorted(ids[path] for path in paths))
        for path, image in source.images.items():
            _write_image(tree, ids[path], image, copy=copy)
        tree.replace(root)


def without_area(source: Source) -> list[Path]:
    """The image of each object that a tree cannot hold, because its sides are of a pixel or less."""
    images = source.images.values()
    return [image.path for image in images for item in image.objects if voc_corners(item.box_xyxy) is None]


def voc_corners(box_xyxy: Box) -> tuple[str, str, str, str] | None:
    """(xmin, ymin, xmax, ymax) in inclusive pixels counted from 1; None for a box that would have no area.

    A continuous box (x1, y1, x2, y2) counted from 0 is (x1 + 1, y1 + 1, x2, y2), rounded to `DECIMALS`.
    """
    x1, y1, x2, y2 = box_xyxy
    xmin, ymin, xmax, ymax = (round(value, DECIMALS) for value in (x1 + 1, y1 + 1, x2, y2))
    if xmin >= xmax or ymin >= ymax:
        return None
    return _text(xmin), _text(ymin), _text(xmax), _text(ymax)


def _text(value: float) -> str:
    return f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".")


def _add_split(source: Source, root: Path, split: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annotations = read_split([root], split, source.class_names)
    source.notes += [str(warning.message) for warning in caught]
    for a in annotations:
        objects = []
        for (x1, y1, x2, y2), label, difficult in zip(a.boxes_xyxy.tolist(), a.labels, a.difficult, strict=True):
            objects.append(SourceObject(source.class_names[label - 1], (x1, y1, x2, y2), bool(difficult)))
        source.add(split, SourceImage(a.image_path, a.width, a.height, tuple(objects)))


def _write_image(tree: Path, image_id: str, image: SourceImage, *, copy: bool) -> None:
    picture = tree / "JPEGImages" / f"{image_id}{image.path.suffix.lower()}"
    if copy:
        shutil.copyfile(image.path, picture)
    else:
        picture.symlink_to(image.path.resolve())
    write_annotation(tree / "Annotations" / f"{image_id}.xml", picture.name, image)


def write_annotation(path: Path, file_name: str, image: SourceImage) -> None:
    """Writes the XML file of one image, without objects that would have no area.

    Args:
        path: file to write.
        file_name: of the image, as it stands in the file.
        image: its size and objects.
    """
    annotation = ElementTree.Element("annotation")
    ElementTree.SubElement(annotation, "filename").text = file_name
    size = ElementTree.SubElement(annotation, "size")
    for tag, value in (("width", image.width), ("height", image.height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(value)
    for item in image.objects:
        corners = voc_corners(item.box_xyxy)
        if corners is not None:
            annotation.append(_object_element(item, corners))
    ElementTree.indent(annotation)
    text = ElementTree.tostring(annotation, encoding="unicode")
    path.write_text(f"{text}\n", encoding="utf-8")


def _object_element(item: SourceObject, corners: Sequence[str]) -> ElementTree.Element:
    element = ElementTree.Element("object")
    ElementTree.SubElement(element, "name").text = item.name
    ElementTree.SubElement(element, "difficult").text = str(int(item.difficult))
    bndbox = ElementTree.SubElement(element, "bndbox")
    for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
        ElementTree.SubElement(bndbox, tag).text = value
    return element


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
