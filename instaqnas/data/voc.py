"""Reads datasets in PASCAL VOC layout.

    ROOT/labels.txt                   class names, one per line, without background; if absent, the 20 VOC classes
    ROOT/ImageSets/Main/SPLIT.txt     one image id per line, see voc_lists.py
    ROOT/Annotations/ID.xml           objects, see voc_xml.py
    ROOT/JPEGImages/ID.jpg            or .jpeg, .png, .bmp, .webp, and these in capitals
    ROOT/difficulty.csv               difficulty of images, optional

Several roots can be joined, as in VOC07+12.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from instaqnas.bits import Orientation
from instaqnas.data.images import read_header, read_image
from instaqnas.data.voc_lists import ListLine, check_names, find_files, read_list, read_text
from instaqnas.data.voc_xml import KnownClasses, UnknownClassError, finite_number, first_class, parse_annotation
from instaqnas.errors import InputError, warn_once

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MAX_NAMED_OBJECTS = 10  # in a warning
MOST_WITHOUT_OBJECTS = 100  # annotations that are searched for the first object
DIFFICULTY_HEADER = "image_id,difficulty"


@dataclass(frozen=True, eq=False)
class Annotation:
    """One image and its N objects.

    The arrays are NumPy's, because each tensor would be sent to worker processes as an open file.

    Args:
        image_id: from the split file.
        image_path: the image file.
        boxes_xyxy: float32 [N, 4], continuous pixels counted from 0, inside [0, width] x [0, height].
        labels: int64 [N], 1 for the first class name (0 is background).
        difficult: bool [N].
        width: of the picture that the boxes refer to, in pixels.
        height: of the picture that the boxes refer to, in pixels.
        orientation: of the picture that the boxes refer to.
        difficulty: of the image, from the root's difficulty.csv; NaN if unknown.
    """

    image_id: str
    image_path: Path
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    width: int
    height: int
    orientation: Orientation = "auto"
    difficulty: float = math.nan


@dataclass(frozen=True)
class SplitCheck:
    """The contents of one split and all its problems.

    Args:
        images: number of images with a readable annotation.
        objects: number of their objects, without boxes that have no area.
        without_area: the objects whose box has no area, such as `a.xml object 1`.
        problems: the errors that reading the split would raise, one line each.
    """

    images: int
    objects: int
    without_area: list[str]
    problems: list[str]


def read_class_names(roots: Sequence[str | Path]) -> tuple[str, ...]:
    """The class names of all `roots`, without background: from labels.txt if there is one, else `VOC_CLASSES`.

    Raises:
        InputError: no root, a root not in VOC layout, roots with different names, a labels.txt that is empty, repeats
            a name or lists the background, or none though the annotations begin with another class than VOC's.
    """
    if not roots:
        raise InputError("no data root given")
    names_of = {_labels_source(root): _read_root_classes(root) for root in map(Path, roots)}
    (first, names), *others = names_of.items()
    for source, other_names in others:
        if other_names != names:
            raise InputError(f"class names differ: {source} has {_join(other_names)}; {first} has {_join(names)}")
    return names


def read_split(
    roots: Sequence[str | Path], split: str, class_names: Sequence[str], orientation: Orientation = "auto"
) -> list[Annotation]:
    """The annotations of one split of all `roots`, in the order of the split files.

    Boxes are converted as in `parse_annotation`. Boxes without area (drawn by accident) are dropped, and one warning
    names them.

    Raises:
        InputError: wrong root, unknown or empty split, missing or broken file, wrong field; it names file and field.
    """
    annotations, dropped = _read_annotations(roots, split, class_names, orientation, _raise)
    if not any(len(annotation.labels) for annotation in annotations):
        raise InputError(f"{_named(roots, split)}: no objects")
    if dropped:
        named = _join(dropped[:MAX_NAMED_OBJECTS]) + (", ..." if len(dropped) > MAX_NAMED_OBJECTS else "")
        warnings.warn(f"split {split!r}: dropped boxes without area: {len(dropped)} ({named})", stacklevel=2)
    return annotations


def read_difficulties(root: str | Path) -> dict[str, float]:
    """Difficulty by image id, from the root's difficulty.csv; empty without such a file.

    The first line of the file is `image_id,difficulty`; further lines are like `train_000000,0.25`. Higher numbers are
    harder, on a scale of the dataset's own. Images may be missing.

    Raises:
        InputError: another first line, a line that is not an id and a number, or an id that is listed twice.
    """
    path = Path(root) / "difficulty.csv"
    if not path.is_file():
        return {}
    difficulties: dict[str, float] = {}
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), start=1):
        where = f"{path}, line {number}"
        if number == 1 and line != DIFFICULTY_HEADER:
            raise InputError(f"{where}: expected {DIFFICULTY_HEADER}, got {line!r}")
        if number == 1 or not line:
            continue
        image_id, _, text = line.rpartition(",")
        difficulty = finite_number(text)
        if not image_id or difficulty is None:
            raise InputError(f"{where}: expected an image id, a comma and a number, got {line!r}")
        if image_id in difficulties:
            raise InputError(f"{where}: {image_id!r} is listed twice")
        difficulties[image_id] = difficulty
    return difficulties


def check_split(
    roots: Sequence[str | Path], split: str, class_names: Sequence[str], orientation: Orientation = "auto"
) -> SplitCheck:
    """Reads all annotations and image headers of one split of all `roots`; collects problems instead of raising.

    Of the objects with an unknown class, one problem is reported for each class, or a single one without labels.txt.
    """
    errors: list[InputError] = []
    annotations, dropped = _read_annotations(roots, split, class_names, orientation, errors.append)
    for annotation in annotations:
        try:
            check_image_header(annotation)
        except InputError as error:
            errors.append(error)
    objects = sum(len(annotation.labels) for annotation in annotations)
    if objects == 0 and not errors:
        errors.append(InputError(f"{_named(roots, split)}: no objects"))
    return SplitCheck(len(annotations), objects, dropped, list(map(str, errors)))


def check_image_header(annotation: Annotation) -> None:
    """Raises InputError if an image cannot be opened, or if its header gives another size than the annotation.

    Warns if the image has an EXIF orientation and nothing tells whether its boxes refer to the upright picture.
    """
    header = read_header(annotation.image_path)
    annotated, stored, upright = (annotation.width, annotation.height), header.stored_size, header.upright_size
    asked = annotation.orientation
    used = upright if asked == "upright" or (asked == "auto" and annotated == upright) else stored
    if annotated != used and annotated in (stored, upright):
        raise InputError(
            f"{annotation.image_path}: its annotation has the size of the {'upright' if used == stored else 'stored'} "
            f"picture, {annotated[0]} x {annotated[1]}, but data.orientation is {asked}"
        )
    check_size(annotation, *used)
    if asked == "auto" and header.is_turned and stored == upright:
        _warn_of_orientation(annotation.image_path)


def check_size(annotation: Annotation, width: int, height: int) -> None:
    """Raises InputError if `width` x `height`, the size of the image file, is not the size in the annotation."""
    if (width, height) != (annotation.width, annotation.height):
        raise InputError(
            f"{annotation.image_path}: {width} x {height} pixels, but its annotation says "
            f"{annotation.width} x {annotation.height}"
        )


def read_pixels(annotation: Annotation) -> np.ndarray:
    """The picture that the boxes of an annotation refer to: uint8 [height, width, 3], RGB.

    Raises: InputError if the image cannot be read, or the annotation gives another size.
    """
    path, size = annotation.image_path, (annotation.height, annotation.width)
    pixels = read_image(path, "upright" if annotation.orientation == "upright" else "stored")
    if annotation.orientation == "auto" and pixels.shape[:2] != size:
        upright = read_image(path, "upright")
        pixels = upright if upright.shape[:2] == size else pixels
    height, width = pixels.shape[:2]
    check_size(annotation, width, height)
    return pixels


def _raise(error: InputError) -> NoReturn:
    raise error


def _named(roots: Sequence[str | Path], split: str) -> str:
    return f"split {split!r} of {_join(map(str, roots))}"


def _read_annotations(
    roots: Sequence[str | Path],
    split: str,
    class_names: Sequence[str],
    orientation: Orientation,
    on_error: Callable[[InputError], None],
) -> tuple[list[Annotation], list[str]]:
    """Annotations of a split, and names of its objects without area; continues after an error if `on_error` returns."""
    annotations: list[Annotation] = []
    without_area: list[str] = []
    for root in map(Path, roots):
        classes = KnownClasses({name: label for label, name in enumerate(class_names, start=1)}, _labels_source(root))
        try:
            _check_layout(root)
            lines = read_list(root, split, class_names)
            difficulties = read_difficulties(root)
        except InputError as error:
            on_error(error)
            continue
        told: set[str] = set()
        for line in lines:
            try:
                annotation, zero_area = _read_annotation(root, line, classes, orientation)
            except UnknownClassError as error:
                name = error.class_name if _has_labels(root) else ""  # one stands for all that labels.txt would list
                if name not in told:
                    on_error(error)
                told.add(name)
            except InputError as error:
                on_error(error)
            else:
                annotations.append(replace(annotation, difficulty=difficulties.get(line.image_id, math.nan)))
                without_area += [f"{line.image_id}.xml object {i}" for i in zero_area]
    return annotations, without_area


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        raise InputError(f"{root}: not a folder")
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        if not (root / name).is_dir():
            raise InputError(f"{root}: no folder {name}, so not in PASCAL VOC layout")


def _has_labels(root: Path) -> bool:
    return (root / "labels.txt").is_file()


def _labels_source(root: Path) -> str:
    path = root / "labels.txt"
    return str(path) if _has_labels(root) else f"{root} (without labels.txt: the VOC classes)"


def _read_root_classes(root: Path) -> tuple[str, ...]:
    _check_layout(root)
    path = root / "labels.txt"
    if not path.is_file():
        _check_voc_classes(root)
        return VOC_CLASSES
    return check_names(filter(str.strip, read_text(path).splitlines()), str(path))


def _check_voc_classes(root: Path) -> None:
    """Raises InputError if the first object of the annotations is not of VOC.

    Otherwise a forgotten labels.txt would be an error of each of them.
    """
    for path in sorted((root / "Annotations").glob("*.xml"))[:MOST_WITHOUT_OBJECTS]:
        name = None
        with suppress(InputError):  # it is reported if a split lists it
            name = first_class(path)
        if name in VOC_CLASSES:
            return
        if name is not None:
            raise InputError(
                f"{root}: no labels.txt with the class names, one a line; {path.name} has {name!r}, no class of VOC"
            )


def _read_annotation(
    root: Path, line: ListLine, classes: KnownClasses, orientation: Orientation
) -> tuple[Annotation, list[int]]:
    """The annotation of one image without its objects that have no area, and the numbers of these objects."""
    files = find_files(root, line)
    xml = parse_annotation(files.annotation_path, classes, partial(_image_size, files.image_path, orientation))
    kept = [o for o in xml.objects if o.box_xyxy is not None]
    annotation = Annotation(
        line.image_id,
        files.image_path,
        np.array([o.box_xyxy for o in kept], np.float32).reshape(-1, 4),
        np.array([o.label for o in kept], np.int64),
        np.array([o.difficult for o in kept], bool),
        xml.width,
        xml.height,
        orientation,
    )
    return annotation, [i for i, o in enumerate(xml.objects) if o.box_xyxy is None]


def _image_size(path: Path, orientation: Orientation) -> tuple[int, int]:
    """(width, height) of the picture for an annotation that does not tell."""
    header = read_header(path)
    if orientation == "auto" and header.stored_size != header.upright_size:
        _warn_of_orientation(path)
    return header.upright_size if orientation == "upright" else header.stored_size


def _warn_of_orientation(path: Path) -> None:
    # No file name: each text is shown once.
    warn_once(
        f"{path.parent}: some images have an EXIF orientation, and the sizes in their annotations do not tell whether "
        "boxes refer to the upright picture; they are read as stored, unless data.orientation is upright"
    )
