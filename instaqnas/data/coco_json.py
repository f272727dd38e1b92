"""Reads datasets in COCO format: JSON files with `images`, `annotations` and `categories`, one for each split.

Boxes are [x, y, width, height] in continuous pixels counted from 0. A crowd (`iscrowd`, or `ignore`) becomes a
difficult object: neither counts in training or as a false positive. Labels are in the order of the category ids.
Categories without objects that are the background, or the supercategory of others, as some exporters list, are left
out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from instaqnas.data.images import read_header
from instaqnas.data.source import UNSPLIT, Source, SourceImage, SourceObject, source_object
from instaqnas.data.voc_lists import check_names, read_text
from instaqnas.data.voc_xml import finite_number
from instaqnas.errors import InputError

EXPORT_NAME = "_annotations.coco.json"  # in a folder that is named after the split
PATTERNS = (f"*/{EXPORT_NAME}", "annotations/instances_*.json", "annotations/*.json", "*.json")
SPLITS = {"train": "train", "trainval": "trainval", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Plain = dict[str, Any]


def find_coco_files(folder: Path) -> dict[str, Path]:
    """The COCO files in a folder by split, found by their names; empty if there are none.

    Raises: InputError if two files are of the same split.
    """
    for pattern in PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            return name_splits(files)
    return {}


def name_splits(files: list[Path]) -> dict[str, Path]:
    """Files by split: train, val, test or trainval as in their names, or `UNSPLIT` for a single file without one.

    Raises: InputError if a split has two files, or one of several files has none.
    """
    named: dict[str, Path] = {}
    for path in files:
        text = path.parent.name if path.name == EXPORT_NAME else path.stem
        words = [word for word in re.findall("[a-z]+", text.lower()) if word in SPLITS]
        split = SPLITS[words[-1]] if words else UNSPLIT
        if split in named or (split == UNSPLIT and len(files) > 1):
            raise InputError(f"{path}: the split is not clear; give all files as SPLIT=FILE")
        named[split] = path
    return named


def read_coco(files: Mapping[str, Path], images: Path | None = None) -> Source:
    """Reads the files of all splits.

    Args:
        files: by split, as from `find_coco_files`.
        images: folder that file names are relative to; None to look in the usual places near each file.

    Raises: InputError if a file is not in COCO format, has other categories, or its images are not found. What is wrong
        with a single image or annotation is a problem of the source.
    """
    contents = {path: _read_json(path) for path in files.values()}
    (first, names), *others = ((path, _category_names(content, path)) for path, content in contents.items())
    for path, other in others:
        if other != names:
            raise InputError(f"{path}: its categories are not those of {first}")
    left_out = _left_out(list(contents.values()), names)
    kept = [name for category, name in sorted(names.items()) if category not in left_out]
    source = Source(check_names(kept, str(first)))
    source.notes += [f"category {names[category]!r} has no objects and is left out" for category in sorted(left_out)]
    for split, path in files.items():
        _add_split(source, split, path, contents[path], names, _images_folder(contents[path], path, split, images))
    return source


def _read_json(path: Path) -> Plain:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        items = content.get(key) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise InputError(f"{path}: not in COCO format: no list {key!r} of objects")
    return content


def _category_names(content: Plain, path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in content["categories"]:
        number, name = category.get("id"), category.get("name")
        if not isinstance(number, int) or not isinstance(name, str) or number in names:
            raise InputError(f"{path}: category {category}: expected an id of its own and a name")
        names[number] = name.strip()
    return names


def _left_out(contents: Collection[Plain], names: Mapping[int, str]) -> set[int]:
    """Ids of categories without objects that are no classes."""
    used = {_key(item, "category_id") for content in contents for item in content["annotations"]}
    above = {
        _key(item, "supercategory")
        for content in contents
        for item in content["categories"]
        if item["name"] != item.get("supercategory")
    }
    return {
        number
        for number, name in names.items()
        if number not in used and (name in above or name.strip("_").casefold() == "background")
    }


def _key(item: Plain, name: str) -> int | str:
    """The value of an id; as text if it is of a type that no id has."""
    value = item.get(name)
    return value if isinstance(value, int | str) else repr(value)


def _images_folder(content: Plain, path: Path, split: str, images: Path | None) -> Path:
    """The folder in which the first image of a file is."""
    names = [_file_name(item, path) for item in content["images"]]
    if not names:
        raise InputError(f"{path}: no images")
    near = [path.parent, path.parent / "images", path.parent.parent, path.parent.parent / "images"]
    tails = ("", path.stem.rpartition("_")[2], path.stem, split)  # such as train2017 of instances_train2017.json
    tried = [folder / tail for folder in (near if images is None else [images]) for tail in tails]
    for folder in tried:
        if (folder / names[0]).is_file():
            return folder
    raise InputError(f"{path}: image {names[0]} is not in {images or 'a folder near it'}: use --images")


def _file_name(item: Plain, path: Path) -> str:
    name = item.get("file_name")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: image {item.get('id')}: no file_name")
    return name.replace("\\", "/")  # of Windows


def _add_split(source: Source, split: str, path: Path, content: Plain, names: Mapping[int, str], folder: Path) -> None:
    annotations_of: dict[int | str, list[Plain]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations_of[_key(annotation, "image_id")].append(annotation)
    seen: set[int | str] = set()
    files: set[str] = set()
    for item in content["images"]:
        try:
            image_id, name = _key(item, "id"), _file_name(item, path)
            if image_id in seen or name in files:
                raise InputError(f"{path}: image {image_id!r}, {name}: id or file is listed twice")
            seen.add(image_id)
            files.add(name)
            source.add(split, _read_image_of(item, folder / name, path, annotations_of[image_id], names))
        except InputError as error:
            source.problems.append(str(error))
    for image_id in sorted(set(annotations_of) - seen, key=str):
        number = annotations_of[image_id][0].get("id")
        source.problems.append(f"{path}: annotation {number}: no image has the id {image_id!r}")


def _read_image_of(
    item: Plain, image_path: Path, path: Path, annotations: list[Plain], names: Mapping[int, str]
) -> SourceImage:
    if not image_path.is_file():
        raise InputError(f"{path}: image {item.get('id')}: no file {image_path}")
    header = read_header(image_path)
    told = item.get("width") or header.width, item.get("height") or header.height
    if told not in (header.stored_size, header.upright_size):
        raise InputError(
            f"{image_path}: {header.width} x {header.height} pixels, but {path} says {told[0]} x {told[1]}"
        )
    size = header.stored_size if told == header.stored_size else header.upright_size
    objects = [_read_object(item, f"{path}: annotation {item.get('id')}", names, size) for item in annotations]
    return SourceImage(image_path, *size, tuple(objects))


def _read_object(annotation: Plain, where: str, names: Mapping[int, str], size: tuple[int, int]) -> SourceObject:
    category, bbox = _key(annotation, "category_id"), annotation.get("bbox")
    if not isinstance(category, int) or category not in names:
        raise InputError(f"{where}: no category has the id {category!r}")
    numbers = [finite_number(str(value)) for value in bbox] if isinstance(bbox, list) else []
    values = [number for number in numbers if number is not None]
    if len(numbers) != 4 or len(values) != 4:
        raise InputError(f"{where}: bbox: expected [x, y, width, height], got {bbox!r}")
    x, y, width, height = values
    difficult = bool(annotation.get("iscrowd") or annotation.get("ignore"))
    return source_object(names[category], (x, y, x + width, y + height), size, where, difficult=difficult)
