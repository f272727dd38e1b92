"""Reads datasets in YOLO format: a text file of labels for each image, and a data.yaml or a list of class names.

    data.yaml               `names`, and under `train`, `val`, `test` a folder of images, or a text file that lists
                            them; `path` is the folder that they are relative to
    images/train/ID.jpg     without a data.yaml, folders in images/ are the splits, and classes.txt has the names
    labels/train/ID.txt     `class x y width height` a line; or beside the image

Classes are counted from 0; the centre and the size of boxes are fractions of the upright picture. A polygon, `class x y
x y x y ...`, becomes the box around it. An image without a file of labels, or with an empty one, has no objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from instaqnas.data.images import IMAGE_SUFFIXES, SMALL_SUFFIXES, read_header
from instaqnas.data.source import UNSPLIT, Source, SourceImage, SourceObject, source_object
from instaqnas.data.voc_lists import check_names, read_text
from instaqnas.data.voc_xml import Box, finite_number
from instaqnas.errors import InputError

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "labels/classes.txt", "labels/train/classes.txt", "obj.names", "classes.names")
SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MARGIN = 0.01  # that rounding may put a fraction beyond 1


def find_names(folder: Path) -> Path | None:
    """The data.yaml of a folder, or else its list of class names; None if it has neither."""
    return next((folder / name for name in (*YAML_NAMES, *NAME_LISTS) if (folder / name).is_file()), None)


def read_yolo(path: Path) -> Source:
    """Reads a dataset, given its folder or its data.yaml.

    Raises: InputError if class names, images or labels are missing. What is wrong with a single image or line is a
        problem of the source.
    """
    names_file = find_names(path) if path.is_dir() else path
    if names_file is None:
        raise InputError(f"{path}: no class names in {YAML_NAMES[0]} or {NAME_LISTS[0]}")
    if names_file.suffix in (".yaml", ".yml"):
        names, splits = _read_yaml(names_file)
    else:
        names = check_names(filter(str.strip, read_text(names_file).splitlines()), str(names_file))
        splits = _splits_of_folder(path)
    source = Source(names)
    for split, images in splits.items():
        label_of = {image: _label_path(image) for image in images}
        if not any(label.is_file() for label in label_of.values()):
            raise InputError(f"{label_of[images[0]]}: no such file, nor for any other image in {images[0].parent}")
        source.problems += _without_image(label_of)
        for image, label in label_of.items():
            try:
                size = read_header(image).upright_size
                source.add(split, SourceImage(image, *size, _read_labels(label, names, size)))
            except InputError as error:
                source.problems.append(str(error))
    turned = sum(read_header(image).is_turned for image in source.images)
    if turned:
        source.notes.append(
            f"images that are stored turned: {turned}; boxes refer to the upright picture, so set data.orientation "
            "to upright"
        )
    return source


def _read_yaml(path: Path) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    """Class names, and images by split."""
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected `names`, `train` and `val`")
    names = check_names(_names_in_order(content.get("names"), path), str(path))
    if content.get("nc", len(names)) != len(names):
        raise InputError(f"{path}: nc is {content['nc']}, but there are {len(names)} names")
    folder = path.parent / str(content.get("path") or "")
    splits: dict[str, list[Path]] = {}
    for key, split in SPLIT_KEYS.items():
        entries = content.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            found = _images_at(_resolve(str(entry), [folder, path.parent], f"{path}: {key}"), folder)
            splits.setdefault(split, []).extend(found)
    if not splits:
        raise InputError(f"{path}: expected `train`, `val` or `test`")
    return names, {split: list(dict.fromkeys(images)) for split, images in splits.items()}


def _names_in_order(names: Any, path: Path) -> Sequence[str]:
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise InputError(f"{path}: names: expected the numbers 0 to {len(names) - 1}, got {list(names)}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise InputError(f"{path}: expected `names`, a list")
    return [str(name) for name in names]


def _splits_of_folder(folder: Path) -> dict[str, list[Path]]:
    """Images by split: the folders in images/ that are named as splits, or all images together."""
    images = folder / "images" if (folder / "images").is_dir() else folder
    parts = {SPLIT_KEYS[part.name]: part for part in sorted(images.iterdir()) if part.name in SPLIT_KEYS}
    return {split: _images_at(part, folder) for split, part in (parts or {UNSPLIT: images}).items()}


def _resolve(entry: str, folders: Sequence[Path], where: str) -> Path:
    """The file or folder of an entry that is relative to one of `folders`."""
    # Some exporters write ../train/images for the folder train/images beside the file.
    for candidate in (entry, entry.removeprefix("../")):
        for folder in folders:
            if (folder / candidate).exists():
                return folder / candidate
    raise InputError(f"{where}: {folders[0] / entry}: no such file or folder")


def _images_at(path: Path, folder: Path) -> list[Path]:
    """The images in a folder and the folders in it, or those that a text file lists."""
    if path.is_dir():
        images = [file for file in sorted(path.rglob("*")) if file.suffix in IMAGE_SUFFIXES and file.name[0] != "."]
    else:
        lines = filter(None, map(str.strip, read_text(path).splitlines()))
        images = [_resolve(line, [folder, path.parent], str(path)) for line in lines]
    if not images:
        raise InputError(f"{path}: no images, which are {', '.join(SMALL_SUFFIXES)}")
    return images


def _label_path(image: Path) -> Path:
    """images/.../ID.jpg has labels/.../ID.txt, with the last folder of that name; others have ID.txt beside them."""
    folders = image.parent.parts
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        path = Path(*folders[:last], "labels", *folders[last + 1 :], f"{image.stem}.txt")
        if path.parent.is_dir():
            return path
    return image.with_suffix(".txt")


def _without_image(label_of: dict[Path, Path]) -> list[str]:
    """Problems: files of labels in the same folders, whose image is missing or of another format."""
    problems = []
    for images, labels in sorted({(image.parent, label.parent) for image, label in label_of.items()}):
        stems = {file.stem for file in images.iterdir() if file.suffix in IMAGE_SUFFIXES}
        for file in sorted(labels.glob("*.txt")):
            if file.stem not in stems and _is_label_line(read_text(file).partition("\n")[0].split()):
                problems.append(
                    f"{file}: no image {images / file.stem}{SMALL_SUFFIXES[0]}, nor of another known format"
                )
    return problems


def _is_label_line(words: Sequence[str]) -> bool:
    has_form = len(words) == 5 or (len(words) >= 7 and len(words) % 2 == 1)
    return has_form and None not in map(finite_number, words)


def _read_labels(path: Path, names: Sequence[str], size: tuple[int, int]) -> tuple[SourceObject, ...]:
    if not path.is_file():
        return ()
    objects = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            objects.append(_read_line(line.split(), names, size, f"{path}, line {number}"))
    return tuple(objects)


def _read_line(words: Sequence[str], names: Sequence[str], size: tuple[int, int], where: str) -> SourceObject:
    if not _is_label_line(words):
        raise InputError(f"{where}: expected a class and x, y, width, height, or a polygon; got {' '.join(words)!r}")
    label, *fractions = map(float, words)
    if label not in range(len(names)):
        raise InputError(f"{where}: class {words[0]} is not one of 0 to {len(names) - 1}")
    for value in fractions:
        if not 0 <= value <= 1 + MARGIN:
            raise InputError(f"{where}: {value:g} is not a fraction of the image, from 0 to 1")
    x1, y1, x2, y2 = _box_of(fractions)
    width, height = size
    return source_object(names[int(label)], (x1 * width, y1 * height, x2 * width, y2 * height), size, where)


def _box_of(fractions: Sequence[float]) -> Box:
    """(x1, y1, x2, y2) from centre and size, or around a polygon."""
    if len(fractions) == 4:
        x, y, width, height = fractions
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(fractions[::2]), min(fractions[1::2]), max(fractions[::2]), max(fractions[1::2])
