"""Datasets of any format, before they become a PASCAL VOC tree; see coco_json.py, yolo_folder.py and voc_tree.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path

from instaqnas.data.images import SMALL_SUFFIXES
from instaqnas.data.voc_xml import Box, clipped_box
from instaqnas.errors import InputError

UNSPLIT = ""  # name of the only split of a source without splits


@dataclass(frozen=True)
class SourceObject:
    """One object: class name, and box in continuous pixels counted from 0, inside the image."""

    name: str
    box_xyxy: Box
    difficult: bool = False


@dataclass(frozen=True)
class SourceImage:
    """One image file and its objects; the size is of the picture that boxes refer to, in pixels."""

    path: Path
    width: int
    height: int
    objects: tuple[SourceObject, ...]


@dataclass
class Source:
    """A dataset.

    Args:
        class_names: without background, in the order of their labels.
        images: by path.
        splits: paths of the images of each split; `UNSPLIT` for a source without splits.
        problems: one line each; a source with problems is not converted.
        notes: on things that the user should know, one line each.
    """

    class_names: tuple[str, ...]
    images: dict[Path, SourceImage] = field(default_factory=dict)
    splits: dict[str, list[Path]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, split: str, image: SourceImage) -> None:
        """Adds an image to a split; a problem if the split has it already, or another split with other objects."""
        paths = self.splits.setdefault(split, [])
        if image.path in self.images and self.images[image.path] != image:
            self.problems.append(f"{image.path}: two splits have it with different objects")
        self.images[image.path] = image
        paths.append(image.path)


def source_object(
    name: str, box_xyxy: Box, size: tuple[int, int], where: str, *, difficult: bool = False
) -> SourceObject:
    """An object whose box is clipped to the image of `size` (width, height).

    Raises: InputError, beginning with `where`, for a box of negative size or outside the image.
    """
    x1, y1, x2, y2 = box_xyxy
    if x2 < x1 or y2 < y1:
        raise InputError(f"{where}: a box of negative size: {x2 - x1:g} x {y2 - y1:g}")
    if x1 == x2 or y1 == y2:  # has no area, and is dropped
        return SourceObject(name, box_xyxy, difficult)
    return SourceObject(name, clipped_box(box_xyxy, *size, where), difficult)


def image_ids(paths: Iterable[Path]) -> dict[Path, str]:
    """Ids of images: their names without suffix, or, if two are equal, with the folders in which they differ.

    Raises: InputError if an id is not possible, or two images have the same.
    """
    ids = {path: path.stem for path in paths}
    if len(set(ids.values())) < len(ids):
        top = commonpath([path.parent for path in ids])
        ids = {path: "_".join(path.relative_to(top).with_suffix("").parts) for path in ids}
    first_of: dict[str, Path] = {}
    for path, image_id in ids.items():
        if image_id in first_of:
            raise InputError(f"{first_of[image_id]} and {path} would both be image {image_id!r}")
        if image_id != image_id.strip() or len(image_id.splitlines()) != 1:
            raise InputError(f"{str(path)!r}: a name must not begin or end with a blank, nor have several lines")
        if path.suffix.lower() not in SMALL_SUFFIXES:
            raise InputError(f"{path}: expected one of {', '.join(SMALL_SUFFIXES)}")
        first_of[image_id] = path
    return ids
