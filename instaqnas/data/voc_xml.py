"""Parses one annotation file of PASCAL VOC.

Read from <annotation>: <size> with <width> and <height>, and for each <object> its <name>, <difficult> (optional) and
<bndbox>. Everything else is ignored, <path> and <filename> included, but an <object> or <bndbox> elsewhere is refused:
ignored, it would be background.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from instaqnas.errors import InputError

MAX_XML_BYTES = 10_000_000

Box = tuple[float, float, float, float]


class UnknownClassError(InputError):
    """An object's class is not among the known ones."""

    def __init__(self, message: str, class_name: str = "") -> None:
        super().__init__(message)
        self.class_name = class_name


class KnownClasses(NamedTuple):
    """The classes that an annotation may use."""

    label_of: dict[str, int]  # label by class name, from 1
    source: str  # the file or folder that lists the names, for messages


class XmlObject(NamedTuple):
    """One object of an annotation file."""

    box_xyxy: Box | None  # continuous pixels counted from 0; None for a box without area
    label: int
    difficult: bool


class XmlAnnotation(NamedTuple):
    """Image size in pixels, and all objects in the order of the file."""

    width: int
    height: int
    objects: list[XmlObject]


def parse_annotation(path: Path, classes: KnownClasses, image_size: Callable[[], tuple[int, int]]) -> XmlAnnotation:
    """Reads an annotation file.

    VOC's inclusive pixels counted from 1, (xmin, ymin, xmax, ymax), become (xmin - 1, ymin - 1, xmax, ymax), clipped to
    the image. A box has no area if xmin = xmax or ymin = ymax in the numbers of the file.

    Args:
        path: the file.
        classes: that its objects may have.
        image_size: reads width and height from the image; called if the file has no <size>, or one of 0 x 0.

    Raises:
        UnknownClassError: an object of another class.
        InputError: the file cannot be read or is not well-formed XML, or a field is missing, wrong or in an unknown
            place.
    """
    tree = _parse_xml(path)
    _check_places(tree, path)
    width, height = _read_size(tree, path) or image_size()
    objects = []
    for number, node in enumerate(tree.findall("object")):
        objects.append(_read_object(node, f"{path}: object {number}", classes, width, height))
    return XmlAnnotation(width, height, objects)


def first_class(path: Path) -> str | None:
    """The class name of the first object in an annotation file; None without objects.

    Raises: InputError if the file cannot be read or is not well-formed XML.
    """
    name = _parse_xml(path).findtext("object/name")
    return None if name is None else name.strip()


def clipped_box(box_xyxy: Box, width: int, height: int, where: str) -> Box:
    """The part of a box inside an image of `width` x `height`.

    Raises: InputError, beginning with `where`, if no part of it is inside.
    """
    x1, y1, x2, y2 = box_xyxy
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        written = f"{x1 + 1:g} {y1 + 1:g} {x2:g} {y2:g}"
        raise InputError(f"{where}: box {written} lies outside the image of {width} x {height}")
    return inside


def finite_number(text: str) -> float | None:
    """The number in `text`; None if it is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class _RefuseDoctype(ElementTree.TreeBuilder):
    """Refuses document types, which declare entities. A search of the bytes would miss other encodings."""

    def doctype(self, *_: object) -> None:
        raise InputError("<!DOCTYPE is not accepted")


def _parse_xml(path: Path) -> ElementTree.Element:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_XML_BYTES:
        raise InputError(f"{path}: larger than {MAX_XML_BYTES} bytes")
    try:
        return ElementTree.fromstring(content, ElementTree.XMLParser(target=_RefuseDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: unusable encodings
        raise InputError(f"{path}: not well-formed XML: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_number(node: ElementTree.Element, tag: str, where: str) -> float:
    text = node.findtext(tag)
    if text is None:
        raise InputError(f"{where}: no {tag}")
    value = finite_number(text)
    if value is None:
        raise InputError(f"{where}: {tag} is not a number: {text!r}")
    return value


def _check_places(tree: ElementTree.Element, path: Path) -> None:
    """Raises InputError if an object or a box is where it would not be read."""
    if tree.tag != "annotation":
        raise InputError(f"{path}: expected <annotation>, got <{tree.tag}>")
    known = set(tree.findall("object"))
    for node in tree.findall("object"):
        known.update(node.findall("bndbox")[:1], node.findall("part/bndbox"))
    for node in tree.iter():
        name = node.tag.rpartition("}")[2].lower()  # behind a namespace
        if name in ("object", "bndbox") and node not in known:
            raise InputError(f"{path}: <{node.tag}> in an unknown place: expected <annotation><object><bndbox>")


def _read_size(tree: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """(width, height); None if unknown: some tools leave <size> out or write 0 x 0."""
    size = tree.find("size")
    if size is None:
        return None
    width, height = (int(_read_number(size, tag, f"{path}: size")) for tag in ("width", "height"))
    if width == height == 0:
        return None
    if width < 1 or height < 1:
        raise InputError(f"{path}: size: {width} x {height} is not positive")
    return width, height


def _read_object(node: ElementTree.Element, where: str, classes: KnownClasses, width: int, height: int) -> XmlObject:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{where}: no name")
    if name not in classes.label_of:
        known = ", ".join(classes.label_of)
        raise UnknownClassError(f"{where}: class {name!r} is not in {classes.source}; known: {known}", name)
    difficult = (node.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise InputError(f"{where}: difficult is neither 0 nor 1: {difficult!r}")
    bndbox = node.find("bndbox")
    if bndbox is None:
        raise InputError(f"{where}: no bndbox")
    return XmlObject(_read_box(bndbox, where, width, height), classes.label_of[name], difficult == "1")


def _read_box(bndbox: ElementTree.Element, where: str, width: int, height: int) -> Box | None:
    xmin, ymin, xmax, ymax = (_read_number(bndbox, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if xmax < xmin:
        raise InputError(f"{where}: xmax {xmax:g} < xmin {xmin:g}")
    if ymax < ymin:
        raise InputError(f"{where}: ymax {ymax:g} < ymin {ymin:g}")
    if xmin == xmax or ymin == ymax:
        return None
    return clipped_box((xmin - 1, ymin - 1, xmax, ymax), width, height, where)
