"""Brings datasets into PASCAL VOC layout: COCO JSON and YOLO folders, and images without train, val and test.

    python -m instaqnas.tools.dataset convert SOURCE --to ROOT [--images FOLDER] [--copy]
    python -m instaqnas.tools.dataset check SOURCE [--images FOLDER]
    python -m instaqnas.tools.dataset split ROOT [--val 0.1] [--test 0.2] [--seed 0] [--groups FILE]

SOURCE is a folder or a file:

    COCO    a JSON file, several as SPLIT=FILE, or a folder with annotations/instances_SPLIT.json or
            SPLIT/_annotations.coco.json
    YOLO    a data.yaml, or the folder with it or with images/, labels/ and classes.txt
    VOC     a folder with JPEGImages, Annotations and ImageSets

`convert` writes boxes in VOC's inclusive pixels counted from 1, to a hundredth of a pixel, and links the images unless
`--copy` is given. The same objects give the same files from each format. Names of the splits are those of the source;
`split` makes train, val and test where it has none. With `--groups`, a file of lines `IMAGE_ID GROUP`, the images of a
group (of one scene, patient or video) stay together. Exit status 2 if the source has problems; nothing is written then.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from instaqnas.data.coco_json import find_coco_files, name_splits, read_coco
from instaqnas.data.source import UNSPLIT, Source
from instaqnas.data.splits import annotated_ids, read_groups, split_ids, write_lists
from instaqnas.data.voc_tree import read_voc, without_area, write_tree
from instaqnas.data.yolo_folder import find_names, read_yolo
from instaqnas.errors import InputError, exit_on_input_error

MOST_PROBLEMS = 20  # printed
MOST_NAMED = 5  # images with objects that are dropped


def read_source(words: Sequence[str], images: Path | None = None) -> Source:
    """Reads a dataset in any of the three formats.

    Args:
        words: a path, or COCO files as SPLIT=FILE.
        images: folder of COCO's images; None to look for it.

    Raises: InputError if the format is not recognised, or the dataset cannot be read.
    """
    path = Path(words[0])
    if len(words) > 1 or not path.exists():
        return read_coco(_coco_files(words), images)
    if path.is_file() and path.suffix == ".json":
        return read_coco(name_splits([path]), images)
    is_voc = (path / "JPEGImages").is_dir() or (path / "Annotations").is_dir()
    is_yolo = not is_voc and (path.suffix in (".yaml", ".yml") or find_names(path) is not None)
    if images is not None and (is_voc or is_yolo):
        raise InputError(f"--images: only for COCO, and {path} is in {'VOC' if is_voc else 'YOLO'} format")
    if is_voc:
        return read_voc(path)
    if is_yolo:
        return read_yolo(path)
    if path.is_dir() and (files := find_coco_files(path)):
        return read_coco(files, images)
    raise InputError(
        f"{path}: expected COCO (a JSON file, or a folder annotations), YOLO (data.yaml or classes.txt) or VOC "
        "(JPEGImages and Annotations)"
    )


def _coco_files(words: Sequence[str]) -> dict[str, Path]:
    """COCO files by split, from words SPLIT=FILE, or FILE where the names of all tell the splits."""
    named = [word.rpartition("=") for word in words]
    for _, _, name in named:
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file")
    if not any(split for split, _, _ in named):
        return name_splits([Path(word) for word in words])
    files = {split: Path(name) for split, _, name in named}
    if UNSPLIT in files or len(files) < len(words) or not all(split.isidentifier() for split in files):
        raise InputError(f"{' '.join(words)}: expected one SPLIT=FILE for each split")
    return files


def report(source: Source) -> list[str]:
    """Lines on the images and objects of each split, on classes, and the notes."""
    lines = []
    for split, paths in source.splits.items():
        objects = [item for path in paths for item in source.images[path].objects]
        empty = sum(not source.images[path].objects for path in paths)
        counts = Counter(item.name for item in objects)
        classes = ", ".join(f"{name} {counts[name]}" for name in source.class_names)
        lines.append(
            f"{split or 'no split'}: {len(paths)} images, {empty} without objects; {len(objects)} objects, "
            f"{sum(item.difficult for item in objects)} difficult ({classes})"
        )
    small = without_area(source)
    if small:
        named = ", ".join(path.name for path in small[:MOST_NAMED]) + (", ..." if len(small) > MOST_NAMED else "")
        lines.append(f"dropped objects with a side of a pixel or less: {len(small)} ({named})")
    return lines + source.notes


def _exit_on_problems(source: Source) -> None:
    for problem in source.problems[:MOST_PROBLEMS]:
        sys.stderr.write(f"problem: {problem}\n")
    if len(source.problems) > MOST_PROBLEMS:
        sys.stderr.write(f"problem: ... and {len(source.problems) - MOST_PROBLEMS} more\n")
    if source.problems:
        sys.exit(2)


def _convert(options: argparse.Namespace) -> None:
    source = read_source(options.source, options.images)
    print("\n".join(report(source)))
    _exit_on_problems(source)
    write_tree(source, options.to, copy=options.copy)
    print(f"{options.to}: {len(source.images)} images")
    if UNSPLIT in source.splits:
        print(f"no splits yet: python -m instaqnas.tools.dataset split {options.to}")


def _check(options: argparse.Namespace) -> None:
    source = read_source(options.source, options.images)
    print("\n".join(report(source)))
    _exit_on_problems(source)


def _split(options: argparse.Namespace) -> None:
    shares = {"train": 1 - options.val - options.test, "val": options.val, "test": options.test}
    if not (options.val >= 0 and options.test >= 0 and shares["train"] > 0):
        raise InputError("--val and --test: expected shares from 0 with a sum below 1")
    shares = {split: share for split, share in shares.items() if share > 0}
    ids = annotated_ids(options.root)
    groups = read_groups(options.groups, ids) if options.groups else {image_id: image_id for image_id in ids}
    splits = split_ids({image_id: groups[image_id] for image_id in ids}, shares, options.seed)
    write_lists(options.root, splits)
    for split, members in splits.items():
        print(f"{split}: {len(members)} images in {len({groups[image_id] for image_id in members})} groups")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.dataset",
        description="Bring datasets into PASCAL VOC layout.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="write a COCO, YOLO or VOC dataset as a VOC tree")
    check = commands.add_parser("check", help="read a COCO, YOLO or VOC dataset and name all problems")
    for command, function in ((convert, _convert), (check, _check)):
        command.set_defaults(function=function)
        command.add_argument("source", nargs="+", metavar="SOURCE", help="a folder or file, or SPLIT=FILE (COCO)")
        command.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images (COCO)")
    convert.add_argument("--to", type=Path, required=True, metavar="ROOT", help="folder to write")
    convert.add_argument("--copy", action="store_true", help="copy the images instead of linking them")
    split = commands.add_parser("split", help="make the lists train, val and test of a VOC tree")
    split.set_defaults(function=_split)
    split.add_argument("root", type=Path, metavar="ROOT", help="folder with JPEGImages and Annotations")
    split.add_argument("--val", type=float, default=0.1, help="share of val (default: 0.1)")
    split.add_argument("--test", type=float, default=0.2, help="share of test (default: 0.2)")
    split.add_argument("--seed", type=int, default=0, help="same seed, same lists (default: 0)")
    split.add_argument("--groups", type=Path, metavar="FILE", help="lines IMAGE_ID GROUP; groups stay together")
    options = parser.parse_args(arguments)
    with exit_on_input_error():
        options.function(options)


if __name__ == "__main__":
    main()
