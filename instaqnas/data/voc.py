"""Reads datasets in PASCAL VOC layout.

    ROOT/labels.txt                   class names, one per line, without background; if absent, the 20 VOC classes
    ROOT/ImageSets/Main/SPLIT.txt     one image id per line; further columns are ignored
    ROOT/Annotations/ID.xml           objects, see voc_xml.py
    ROOT/JPEGImages/ID.jpg            or .jpeg, .png
    ROOT/difficulty.csv               difficulty of images, optional

Several roots can be joined, as in VOC07+12.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from instaqnas.data.voc_xml import KnownClasses, finite_number, parse_annotation
from instaqnas.errors import InputError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_NAMED_OBJECTS = 10  # in a warning
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
        width: of the stored image, in pixels.
        height: of the stored image, in pixels.
        difficulty: of the image, from the root's difficulty.csv; NaN if unknown.
    """

    image_id: str
    image_path: Path
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    width: int
    height: int
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
        InputError: no root, a root not in VOC layout, roots with different names, or a labels.txt that is empty,
            repeats a name or lists the background.
    """
    if not roots:
        raise InputError("no data root given")
    names_of = {_labels_source(root): _read_root_classes(root) for root in map(Path, roots)}
    (first, names), *others = names_of.items()
    for source, other_names in others:
        if other_names != names:
            raise InputError(f"class names differ: {source} has {_join(other_names)}; {first} has {_join(names)}")
    return names


def read_split(roots: Sequence[str | Path], split: str, class_names: Sequence[str]) -> list[Annotation]:
    """The annotations of one split of all `roots`, in the order of the split files.

    Boxes are converted as in `parse_annotation`. Boxes without area (drawn by accident) are dropped, and one warning
    names them.

    Raises:
        InputError: wrong root, unknown or empty split, missing or broken file, wrong field; it names file and field.
    """
    annotations, dropped = _read_annotations(roots, split, class_names, _raise)
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
    for number, line in enumerate(map(str.strip, _read_text(path).splitlines()), start=1):
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


def check_split(roots: Sequence[str | Path], split: str, class_names: Sequence[str]) -> SplitCheck:
    """Reads all annotations and image headers of one split of all `roots`; collects problems instead of raising."""
    errors: list[InputError] = []
    annotations, dropped = _read_annotations(roots, split, class_names, errors.append)
    for annotation in annotations:
        try:
            check_image_header(annotation)
        except InputError as error:
            errors.append(error)
    objects = sum(len(annotation.labels) for annotation in annotations)
    if objects == 0:
        errors.append(InputError(f"{_named(roots, split)}: no objects"))
    return SplitCheck(len(annotations), objects, dropped, list(map(str, errors)))


def check_image_header(annotation: Annotation) -> None:
    """Raises InputError if an image cannot be opened, or if its header gives another size than the annotation."""
    path = annotation.image_path
    try:
        with Image.open(path) as image:
            size = image.size
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a readable image") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # damaged header, or huge size
        raise InputError(f"{path}: not a readable image ({error})") from error
    check_size(annotation, *size)


def check_size(annotation: Annotation, width: int, height: int) -> None:
    """Raises InputError if `width` x `height`, the size of the image file, is not the size in the annotation."""
    if (width, height) != (annotation.width, annotation.height):
        raise InputError(
            f"{annotation.image_path}: {width} x {height} pixels, but its annotation says "
            f"{annotation.width} x {annotation.height}"
        )


def read_image(path: str | Path, orientation: Literal["stored", "upright"] = "stored") -> np.ndarray:
    """The pixels of an image file: uint8 [height, width, 3], RGB.

    `stored` ignores an EXIF orientation, because VOC boxes refer to stored pixels; `upright` applies it.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
        ignore = cv2.IMREAD_IGNORE_ORIENTATION if orientation == "stored" else 0
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | ignore)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except cv2.error as error:
        raise InputError(f"{path}: not a readable image") from error
    if image is None:
        raise InputError(f"{path}: not a readable image")
    return image


def _raise(error: InputError) -> NoReturn:
    raise error


def _named(roots: Sequence[str | Path], split: str) -> str:
    return f"split {split!r} of {_join(map(str, roots))}"


def _read_annotations(
    roots: Sequence[str | Path], split: str, class_names: Sequence[str], on_error: Callable[[InputError], None]
) -> tuple[list[Annotation], list[str]]:
    """Annotations of a split, and names of its objects without area; continues after an error if `on_error` returns."""
    label_of = {name: label for label, name in enumerate(class_names, start=1)}
    annotations: list[Annotation] = []
    without_area: list[str] = []
    for root in map(Path, roots):
        try:
            _check_layout(root)
            ids = _read_ids(root, split, class_names)
            difficulties = read_difficulties(root)
        except InputError as error:
            on_error(error)
            continue
        classes = KnownClasses(label_of, _labels_source(root))
        for image_id in ids:
            try:
                annotation, zero_area = _read_annotation(root, image_id, classes)
                annotation = replace(annotation, difficulty=difficulties.get(image_id, math.nan))
            except InputError as error:
                on_error(error)
                continue
            annotations.append(annotation)
            without_area += [f"{image_id}.xml object {i}" for i in zero_area]
    return annotations, without_area


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        raise InputError(f"{root}: not a folder")
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        if not (root / name).is_dir():
            raise InputError(f"{root}: no folder {name}, so not in PASCAL VOC layout")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def _read_lines(path: Path) -> list[str]:
    return [line.strip() for line in _read_text(path).splitlines() if line.strip()]


def _labels_source(root: Path) -> str:
    path = root / "labels.txt"
    return str(path) if path.is_file() else f"{root} (without labels.txt: the VOC classes)"


def _read_root_classes(root: Path) -> tuple[str, ...]:
    _check_layout(root)
    path = root / "labels.txt"
    if not path.is_file():
        return VOC_CLASSES
    names = tuple(_read_lines(path))
    if not names:
        raise InputError(f"{path}: no class names")
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{path}: class {name!r} is listed {count} times")
        if name.strip("_").casefold() == "background":
            raise InputError(f"{path}: {name!r} must not be listed; class 0 is always background")
    return names


def _read_ids(root: Path, split: str, class_names: Sequence[str]) -> list[str]:
    folder = root / "ImageSets" / "Main"
    path = folder / f"{split}.txt"
    if not path.is_file():
        # VOC also has a file per class and split, such as cat_train.txt; they would bury the few split names.
        stems = sorted(file.stem for file in folder.glob("*.txt"))
        known = [stem for stem in stems if not any(stem.startswith(f"{name}_") for name in class_names)]
        raise InputError(f"{folder}: no split {split!r}; known: {_join(known) or 'none'}")
    ids = [line.split()[0] for line in _read_lines(path)]
    if not ids:
        raise InputError(f"{path}: the split is empty")
    image_id, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {image_id!r} is listed {count} times")
    return ids


def _read_annotation(root: Path, image_id: str, classes: KnownClasses) -> tuple[Annotation, list[int]]:
    """The annotation of one image without its objects that have no area, and the numbers of these objects."""
    xml = parse_annotation(root / "Annotations" / f"{image_id}.xml", classes)
    kept = [o for o in xml.objects if o.box_xyxy is not None]
    annotation = Annotation(
        image_id,
        _find_image(root, image_id),
        np.array([o.box_xyxy for o in kept], np.float32).reshape(-1, 4),
        np.array([o.label for o in kept], np.int64),
        np.array([o.difficult for o in kept], bool),
        xml.width,
        xml.height,
    )
    return annotation, [i for i, o in enumerate(xml.objects) if o.box_xyxy is None]


def _find_image(root: Path, image_id: str) -> Path:
    for suffix in IMAGE_SUFFIXES:
        path = root / "JPEGImages" / f"{image_id}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{root / 'JPEGImages' / image_id}.jpg: no such image, nor as {_join(IMAGE_SUFFIXES[1:])}")
