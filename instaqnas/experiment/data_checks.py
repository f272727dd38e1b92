"""What a training sees of annotations: objects at the network's size, classes, and images that splits share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from instaqnas.data.voc import Annotation
from instaqnas.errors import InputError
from instaqnas.files import file_digest

MOST_NAMED = 5  # images or classes in one line
LEAST_SIDE = 1  # pixels at the network's size; training drops smaller boxes, see `ResizeAndFlip`
SAMPLE_BYTES = 4096  # of a file; full digests are for files that agree in these


@dataclass(frozen=True, eq=False)
class SplitObjects:
    """The objects of one split at the network's size.

    Args:
        split: name of the split.
        image_size: side of the network's input in pixels.
        images: number of images.
        empty_images: number of images without an object to train on.
        objects: number of all objects.
        difficult: number of difficult objects, which are neither trained on nor counted in an evaluation.
        small: number of other objects that are narrower or lower than a pixel at the network's size, which are not
            trained on.
        boxes_xyxy: the N objects to train on, in pixels of the network's input, float32 [N, 4].
        labels: their classes, int64 [N].
        counted_labels: classes of the objects that count in an evaluation, all but the difficult ones, int64.
    """

    split: str
    image_size: int
    images: int
    empty_images: int
    objects: int
    difficult: int
    small: int
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    counted_labels: np.ndarray


def objects_at(split: str, annotations: Sequence[Annotation], image_size: int) -> SplitObjects:
    """The objects of a split at the network's size, resized as whole images."""
    boxes_xyxy = np.concatenate([_resized_boxes(a, image_size) for a in annotations])
    labels = np.concatenate([a.labels for a in annotations])
    difficult = np.concatenate([a.difficult for a in annotations])
    image = np.repeat(np.arange(len(annotations)), [len(a.labels) for a in annotations])
    small = ~difficult & (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] < LEAST_SIDE).any(1)
    kept = ~difficult & ~small
    return SplitObjects(
        split,
        image_size,
        images=len(annotations),
        empty_images=len(annotations) - len(np.unique(image[kept])),
        objects=len(labels),
        difficult=int(difficult.sum()),
        small=int(small.sum()),
        boxes_xyxy=boxes_xyxy[kept],
        labels=labels[kept],
        counted_labels=labels[~difficult],
    )


def _resized_boxes(annotation: Annotation, image_size: int) -> np.ndarray:
    scale = [image_size / annotation.width, image_size / annotation.height] * 2
    return annotation.boxes_xyxy * np.array(scale, np.float32)


def count_classes(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, int]:
    """Number of objects of each class; label 1 is the first name."""
    counts = np.bincount(labels, minlength=len(class_names) + 1)[1:]
    return dict(zip(class_names, counts.tolist(), strict=True))


def training_warnings(objects: SplitObjects, class_names: Sequence[str]) -> list[str]:
    """A line if objects are not trained on, and one if classes have no object to train on.

    Raises: InputError if there is no object to train on.
    """
    lost = f"{objects.difficult} difficult, {objects.small} under a pixel at detector.image_size = {objects.image_size}"
    if not len(objects.labels):
        raise InputError(f"split {objects.split!r}: none of its {objects.objects} objects can be trained on ({lost})")
    lines = []
    if objects.difficult or objects.small:
        count = objects.difficult + objects.small
        lines.append(f"split {objects.split!r}: {count} of {objects.objects} objects are not trained on ({lost})")
    absent = [name for name, count in count_classes(objects.labels, class_names).items() if not count]
    if absent:
        lines.append(
            f"split {objects.split!r}: no object to train on of {len(absent)} of {len(class_names)} classes "
            f"({_named(absent)})"
        )
    return lines


def evaluation_warnings(objects: SplitObjects) -> list[str]:
    """A line if no object counts in an evaluation, so that mAP is undefined."""
    if len(objects.counted_labels):
        return []
    return [
        f"split {objects.split!r}: no object counts in an evaluation ({objects.difficult} difficult); its mAP is "
        "undefined and picks no best checkpoint"
    ]


def fraction_warnings(split: str, annotations: Sequence[Annotation]) -> list[str]:
    """A line if some images have boxes from 0 to 1 only, which look like fractions of the image.

    Raises: InputError if all images with objects are so.
    """
    with_objects = [a for a in annotations if len(a.labels)]
    fractions = [a.image_id for a in with_objects if (a.boxes_xyxy <= 1).all()]
    if not fractions:
        return []
    message = "boxes from 0 to 1 look like fractions of the image; pixels are expected"
    if len(fractions) == len(with_objects):
        raise InputError(f"split {split!r}: {message} (all images, such as {fractions[0]}.xml)")
    return [f"split {split!r}: {message} ({len(fractions)} images: {_named(fractions)})"]


# --- Images in several splits -----------------------------------------------------------------------------------------


def shared_images(splits: Sequence[tuple[str, Sequence[Annotation]]]) -> list[str]:
    """A line for each two splits that share images, and one if they have equal files under different names.

    Shared are files, and images of the same id, size and objects in different roots, such as encoded copies. Equal ids
    alone say little: many data sets number their images.

    Args:
        splits: name and annotations of each split.

    Raises: InputError if a file cannot be read.
    """
    paths = [dict.fromkeys(a.image_path.absolute() for a in annotations) for _, annotations in splits]
    twin_groups = _equal_files(paths)
    contents = [{_id_and_objects(a) for a in annotations if len(a.labels)} for _, annotations in splits]
    lines = []
    for first, second in combinations(range(len(splits)), 2):
        names = f"splits {splits[first][0]!r} and {splits[second][0]!r}"
        same = {
            a.image_path.absolute(): a.image_id
            for a in splits[second][1]
            if a.image_path.absolute() in paths[first] or _id_and_objects(a) in contents[first]
        }
        if same:
            lines.append(f"{names} share images: {len(same)} ({_named(list(same.values()))})")
        twins = []
        for group in twin_groups:
            others = [path for path in group if path in paths[first]]
            copies = [path for path in group if path in paths[second] and path not in same]
            twins += [f"{others[0].name} = {path.name}" for path in copies if others]
        if twins:
            lines.append(f"{names} have equal images in different files: {len(twins)} ({_named(twins)})")
    return lines


def _id_and_objects(annotation: Annotation) -> Hashable:
    a = annotation
    return a.image_id, a.width, a.height, a.boxes_xyxy.tobytes(), a.labels.tobytes()


def _equal_files(splits: Sequence[Iterable[Path]]) -> list[list[Path]]:
    """Groups of different files with equal content that are not all in the same split.

    Few files are read whole: those that agree in size and in a sample with a file of another split.
    """
    splits_of: dict[Path, set[int]] = defaultdict(set)
    for number, paths in enumerate(splits):
        for path in paths:
            splits_of[path].add(number)
    keys: list[Callable[[Path], Hashable]] = [lambda path: path.stat().st_size, _middle_bytes, file_digest]
    groups = [list(splits_of)]
    for key in keys:
        parts = [part for group in groups for part in _grouped(group, key)]
        groups = [part for part in parts if len(part) > 1 and len(set().union(*(splits_of[path] for path in part))) > 1]
    return groups


def _grouped(paths: Sequence[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    groups = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    return list(groups.values())


def _middle_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SAMPLE_BYTES) // 2)  # the beginning may be a header that all share
        return file.read(SAMPLE_BYTES)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
