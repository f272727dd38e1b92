"""Text files of a PASCAL VOC tree: class names, and the lists of image ids in ImageSets/Main."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from instaqnas.data.images import IMAGE_SUFFIXES, SMALL_SUFFIXES
from instaqnas.errors import InputError

CLASS_FLAGS = ("-1", "0", "1")  # last column of lists of one class: without it, difficult, with it


class ListedImage(NamedTuple):
    """One line of a split list: the image's annotation and image file, which exist."""

    image_id: str
    annotation_path: Path
    image_path: Path


class ListLine(NamedTuple):
    """An image id, and the file and line that it is from, for messages."""

    image_id: str
    where: str


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises: InputError if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def check_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The class names without blanks at their ends.

    Raises: InputError, beginning with `where`, for no name, an empty, repeated or unprintable one, or the background.
    """
    found = tuple(name.strip() for name in names)
    if not found:
        raise InputError(f"{where}: no class names")
    for name, count in Counter(found).items():
        if count > 1:
            raise InputError(f"{where}: class {name!r} is listed {count} times")
        if not name or not name.isprintable():
            raise InputError(f"{where}: {name!r} is no class name")
        if name.strip("_").casefold() == "background":
            raise InputError(f"{where}: {name!r} must not be listed; class 0 is always background")
    return found


def split_names(root: Path, class_names: Sequence[str]) -> list[str]:
    """Names of the splits of a root, without VOC's files for a class and split, such as cat_train."""
    stems = sorted(file.stem for file in (root / "ImageSets" / "Main").glob("*.txt"))
    return [stem for stem in stems if not any(stem.startswith(f"{name}_") for name in class_names)]


def read_list(root: Path, split: str, class_names: Sequence[str]) -> list[ListLine]:
    """The lines of a split's list.

    An id may contain blanks. A last column of -1, 0 or 1, as in VOC's lists of one class, is dropped unless the whole
    line is the id of an annotation.

    Raises: InputError for an unknown or empty split, or an id that is listed twice or is no name of a file.
    """
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        known = ", ".join(split_names(root, class_names)) or "none"
        raise InputError(f"{path.parent}: no split {split!r}; known: {known}")
    lines = []
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), start=1):
        if line:
            where = f"{path}, line {number}"
            lines.append(ListLine(_id_of(root, line, where), where))
    if not lines:
        raise InputError(f"{path}: the split is empty")
    image_id, count = Counter(line.image_id for line in lines).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {image_id!r} is listed {count} times")
    return lines


def find_files(root: Path, line: ListLine) -> ListedImage:
    """The files of an id.

    Raises: InputError that names the line, if the annotation or the image is missing or cannot have this name.
    """
    image_id = line.image_id
    annotation = _annotation_path(root, image_id)
    if not _is_file(annotation, line.where):
        stem, dot, suffix = image_id.rpartition(".")
        hint = f"; ids have no suffix: {stem}" if f"{dot}{suffix}" in (*IMAGE_SUFFIXES, ".xml") else ""
        raise InputError(f"{line.where}: no annotation {annotation}{hint}")
    for suffix in IMAGE_SUFFIXES:
        path = root / "JPEGImages" / f"{image_id}{suffix}"
        if _is_file(path, line.where):
            return ListedImage(image_id, annotation, path)
    first, *others = SMALL_SUFFIXES
    wanted = f"{root / 'JPEGImages' / image_id}{first}, nor {', '.join(others)}"
    raise InputError(f"{line.where}: no image {wanted}, in small letters or capitals")


def _id_of(root: Path, line: str, where: str) -> str:
    *columns, last = line.rsplit(maxsplit=1)
    if not columns or last not in CLASS_FLAGS or _is_file(_annotation_path(root, line), where):
        return line
    return columns[0]


def _is_file(path: Path, where: str) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # the name may be too long
        raise InputError(f"{where}: {error.strerror}") from None


def _annotation_path(root: Path, image_id: str) -> Path:
    return root / "Annotations" / f"{image_id}.xml"
