"""Detects objects in images with the policy and detector of a trained run.

    python -m instaqnas.tools.predict --config configs/shapes.yaml --run runs/shapes IMAGE... [--out FOLDER]
    python -m instaqnas.tools.predict --packed packed.pt IMAGE...

The second form runs integer inference from a file written by `instaqnas.tools.pack`.

An IMAGE is a file, a folder, or a pattern in quotes. An image that cannot be read is named on standard error, the
others are done, and the exit status is 2.

Prints one JSON line per image:

    file         path of the image
    bits         name of the choice at every position, such as w3a4
    gbitops      of the detector under these bits, and of the policy
    detections   highest score first: `label`, `score`, and `box_xyxy` in pixels of the image file

The EXIF orientation of images is applied.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
from torch import Tensor

from instaqnas.deploy.predictor import Prediction, Predictor, as_tensor
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.pictures import add_bits, draw_detections, enlarged
from instaqnas.tools.arguments import run_command

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SMALLEST_PICTURE = 480  # pixels of the longer side of a drawn picture


def run_predict(
    load: Callable[[], Predictor], images: Sequence[Path], score_threshold: float, out: Path | None, batch: int = 8
) -> int:
    """Prints one JSON line per image, in their order; returns the number of images that could not be read.

    Each of these is named on standard error, and the others are done.

    Args:
        load: builds the predictor; called after the arguments are checked.
        images: image files.
        score_threshold: lowest score of a detection, 0 to 1.
        out: folder for the images with their detections, NAME_detections.png; None writes none.
        batch: images that run at once.

    Raises: InputError if the predictor cannot be loaded, or an image cannot be written. The images before it have been
        printed and written by then.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"--score: expected a number from 0 to 1, got {score_threshold}")
    if batch < 1:
        raise InputError(f"--batch: expected at least 1, got {batch}")
    pictures = [None] * len(images) if out is None else _picture_paths(images, out)
    predictor, unreadable = load(), 0
    for start in range(0, len(images), batch):
        read: list[tuple[Path, Path | None, Tensor]] = []
        for path, picture in zip(images[start : start + batch], pictures[start : start + batch], strict=True):
            try:
                read.append((path, picture, as_tensor(path)))
            except InputError as error:
                unreadable += 1
                sys.stderr.write(f"error: {error}\n")
        results = predictor.predict([image for _, _, image in read], score_threshold)
        for (path, picture, image), found in zip(read, results, strict=True):
            print(json.dumps({"file": str(path), **found.plain()}), flush=True)
            if picture is not None:
                _write_png(picture, drawn(image, found, predictor))
    return unreadable


def drawn(image: Tensor, found: Prediction, predictor: Predictor) -> Tensor:
    """The image with its detections, and below them the bits of each layer and the cost; small images are enlarged.

    Args:
        image: uint8 [3, H, W].
        found: prediction of this image.
        predictor: whose configurations give the range of costs.
    """
    picture, factor = enlarged(image, SMALLEST_PICTURE)
    boxes = found.boxes_xyxy * factor
    picture = draw_detections(picture, boxes, found.scores, found.labels, found.class_names)
    lowest, highest = (
        cost + predictor.policy_gbitops for cost in (predictor.costs.lowest(), predictor.costs.highest())
    )
    return add_bits(picture, found.layer_bits, found.gbitops, lowest, highest)


def image_files(names: Sequence[str]) -> list[Path]:
    """Image files in the order of `names`: files, all images of a folder, or the matches of a pattern such as "*.jpg".

    Raises: InputError for a folder or pattern without images.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        elif any(sign in name for sign in "*?[") and not path.exists():
            inside = sorted(Path(match) for match in glob.glob(name, recursive=True))
        else:
            inside = [path]
        if not inside:
            raise InputError(f"{name}: no images there ({', '.join(IMAGE_SUFFIXES)})")
        found += inside
    return found


def _picture_paths(images: Sequence[Path], out: Path) -> list[Path]:
    """File of each drawn image; raises InputError if two images would be drawn to the same file."""
    images_by_picture: dict[Path, Path] = {}
    for path in images:
        picture = out / f"{path.stem}_detections.png"  # `out` may be the folder of the image: don't overwrite it
        if picture in images_by_picture:
            raise InputError(f"{picture}: would be written for {images_by_picture[picture]} and again for {path}")
        images_by_picture[picture] = path
    return list(images_by_picture)


def _write_png(path: Path, image: Tensor) -> None:
    encoded = cv2.imencode(".png", cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.predict",
        description="Detect objects in images with the policy and detector of a trained run; prints JSON lines.",
        epilog="Settings of the config can be overridden with an equals sign, for example --device=cpu.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or patterns such as '*.jpg'")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    model.add_argument("--packed", type=Path, metavar="FILE", help="file of instaqnas.tools.pack, integer only")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="checkpoint to use instead of the run's latest")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also draw the detections to PNG files here")
    parser.add_argument("--budget", type=float, metavar="GBITOPS", help="shift the policy to this mean cost")
    parser.add_argument("--batch", type=int, default=8, help="images that run at once (default: 8)")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a detection (default: 0.3)")
    options, overrides = parser.parse_known_args(arguments)

    with exit_on_input_error():
        for word in overrides:
            if "=" not in word:  # argparse has taken the value after it for an image
                raise InputError(f"unknown option {word}; settings are overridden with an equals sign: {word}=VALUE")
        if options.packed is not None:
            given = [f"--{name}" for name in ("run", "init") if getattr(options, name) is not None] + overrides
            if given:
                raise InputError(f"{given[0]}: not together with --packed, which needs no config")
            load = partial(Predictor.of_packed, options.packed, options.budget)
        else:
            load = partial(Predictor.of_run, replace(run_command(options, overrides), budget=options.budget))
        files = image_files(options.images)
        if unreadable := run_predict(load, files, options.score, options.out, options.batch):
            raise InputError(f"{unreadable} of {len(files)} images could not be read")


if __name__ == "__main__":
    main()
