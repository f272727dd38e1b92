"""Splits the images of a PASCAL VOC tree without lists into train, val and test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from instaqnas.data.images import IMAGE_SUFFIXES
from instaqnas.data.voc_lists import read_text
from instaqnas.errors import InputError
from instaqnas.files import write_text
from instaqnas.seeds import derived_seed


def annotated_ids(root: Path) -> list[str]:
    """Ids of the annotations of a tree, sorted.

    Raises: InputError if there are none, or an image has no annotation, or an annotation no image.
    """
    for name in ("Annotations", "JPEGImages"):
        if not (root / name).is_dir():
            raise InputError(f"{root}: no folder {name}, so not in PASCAL VOC layout")
    ids = {path.stem for path in (root / "Annotations").glob("*.xml")}
    pictures = {path.stem: path for path in (root / "JPEGImages").iterdir() if path.suffix in IMAGE_SUFFIXES}
    for image_id in sorted(ids - set(pictures)):
        raise InputError(f"{root}/Annotations/{image_id}.xml: no image in JPEGImages has this id")
    for image_id in sorted(set(pictures) - ids):
        raise InputError(f"{pictures[image_id]}: no annotation; one without objects is needed for an empty image")
    if not ids:
        raise InputError(f"{root}: no annotations")
    return sorted(ids)


def read_groups(path: Path, ids: Sequence[str]) -> dict[str, str]:
    """The group of each id, from lines `IMAGE_ID GROUP`, where an id may contain blanks.

    Raises: InputError for a line without group, an id that is listed twice, or one of `ids` that is missing.
    """
    groups: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.strip().rsplit(maxsplit=1)
        if not words:
            continue
        if len(words) < 2 or words[0] in groups:
            raise InputError(f"{path}, line {number}: expected an id of its own and a group, got {line.strip()!r}")
        groups[words[0]] = words[1]
    missing = [image_id for image_id in ids if image_id not in groups]
    if missing:
        raise InputError(f"{path}: no group for {len(missing)} of {len(ids)} images, such as {missing[0]!r}")
    return groups


def split_ids(groups: Mapping[str, str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Ids of each split, sorted; all images of a group are in one.

    Groups are taken in an order drawn from the seed, and each goes to the split that lacks most images. Without
    groups of several images, the splits get their shares to the nearest image.

    Args:
        groups: group by id.
        shares: fraction of the images by split, with a sum of 1.
        seed: of the order.

    Raises: InputError if a split gets no image.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for image_id in sorted(groups):
        members[groups[image_id]].append(image_id)
    first, *others = shares
    wanted = {split: round(shares[split] * len(groups)) for split in others}
    wanted[first] = len(groups) - sum(wanted.values())
    found: dict[str, list[str]] = {split: [] for split in shares}
    # Large groups first would balance better, but put the same ones into train whatever the seed.
    for group in sorted(members, key=lambda name: derived_seed(seed, "split", name)):
        split = max(shares, key=lambda name: wanted[name] - len(found[name]))
        found[split] += members[group]
    for split, ids in found.items():
        if not ids:
            raise InputError(f"{len(groups)} images in {len(members)} groups leave none for {split}")
    return {split: sorted(ids) for split, ids in found.items()}


def write_lists(root: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Writes ImageSets/Main/SPLIT.txt.

    Raises: InputError if the tree has one of the lists already.
    """
    folder = root / "ImageSets/Main"
    paths = {split: folder / f"{split}.txt" for split in splits}
    for path in paths.values():
        if path.exists():
            raise InputError(f"{path}: exists already")
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        write_text(path, "".join(f"{image_id}\n" for image_id in splits[split]))
