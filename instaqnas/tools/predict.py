"""Detects objects in images with the policy and detector of a trained run.

    python -m instaqnas.tools.predict --config configs/shapes.yaml --run runs/shapes IMAGE... [--out FOLDER]
    python -m instaqnas.tools.predict --packed packed.pt IMAGE...

The second form runs integer inference from a file written by `instaqnas.tools.pack`.

Prints one JSON line per image:

    file         path of the image
    bits         name of the choice at every position, such as w3a4
    gbitops      of the detector under these bits, and of the policy
    detections   highest score first: `label`, `score`, and `box_xyxy` in pixels of the image file

The EXIF orientation of images is applied.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import torch
from torch import Tensor

from instaqnas.data.images import read_image
from instaqnas.deploy.predictor import Predictor
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.pictures import draw_detections
from instaqnas.tools.arguments import run_command


def run_predict(
    load: Callable[[], Predictor], images: Sequence[Path], score_threshold: float, out: Path | None
) -> None:
    """Detects objects in each image and prints one JSON line per image.

    Args:
        load: builds the predictor; called after the arguments are checked.
        images: image files.
        score_threshold: lowest score of a detection, 0 to 1.
        out: folder for drawings of the detections, NAME_detections.png; None for no drawings.

    Raises: InputError if the predictor cannot be loaded, or an image cannot be read or written. Results of earlier
        images are kept.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"--score: expected a number from 0 to 1, got {score_threshold}")
    pictures = [None] * len(images) if out is None else _picture_paths(images, out)
    predictor = load()
    for path, picture in zip(images, pictures, strict=True):
        image = torch.from_numpy(read_image(path, "upright")).permute(2, 0, 1)
        found = predictor.predict(image, score_threshold)
        print(json.dumps({"file": str(path), **found.plain(predictor.class_names)}), flush=True)
        if picture is not None:
            drawn = draw_detections(image, found.boxes_xyxy, found.scores, found.labels, predictor.class_names)
            _write_png(picture, drawn)


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
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    model.add_argument("--packed", type=Path, metavar="FILE", help="file of instaqnas.tools.pack, integer only")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="checkpoint to use instead of the run's latest")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also draw the detections to PNG files here")
    parser.add_argument("--budget", type=float, metavar="GBITOPS", help="shift the policy to this mean cost")
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
            run_predict(
                lambda: Predictor.of_packed(options.packed, options.budget), options.images, options.score, options.out
            )
            return
        command = replace(run_command(options, overrides), budget=options.budget)
        run_predict(lambda: Predictor.of_run(command), options.images, options.score, options.out)


if __name__ == "__main__":
    main()
