"""Runs a trained run's policy and detector on any images.

    python -m instaqnas.tools.predict --config configs/shapes.yaml --run runs/shapes IMAGE... [--out FOLDER]
    python -m instaqnas.tools.predict --packed packed.pt IMAGE...

The second runs on integers alone, from a file of `instaqnas.tools.pack`.

Prints one JSON line per image: `file`; `bits`, the choice of every position, such as w3a4; `gbitops` of the detector
under these bits and of the policy; `detections`, best first, with `label`, `score` and `box_xyxy` in the image's own
pixels. An image is taken upright, as its EXIF orientation says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import torch
from torch import Tensor

from instaqnas.data.voc import read_image
from instaqnas.deploy.predictor import Predictor
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.pictures import draw_detections
from instaqnas.tools.arguments import run_command


def run_predict(
    load: Callable[[], Predictor], images: Sequence[Path], score_threshold: float, out: Path | None
) -> None:
    """Prints one line per image; also writes NAME_detections.png to `out` if it is given.

    Raises: InputError for a predictor that does not load, an image that cannot be read, or one that cannot be
    written; images before it are done.
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
    source_of: dict[Path, Path] = {}
    for path in images:
        picture = out / f"{path.stem}_detections.png"  # never the name of the image itself, `out` may be its folder
        if picture in source_of:
            raise InputError(f"{picture}: would be written for {source_of[picture]} and again for {path}")
        source_of[picture] = path
    return list(source_of)


def _write_png(path: Path, image: Tensor) -> None:
    encoded = cv2.imencode(".png", cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> None:
    """Predicts what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.predict",
        description="Run a trained run's policy and detector on any images; prints one JSON line per image.",
        epilog="Settings can be overridden with an equals sign, such as --device=cpu.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    model.add_argument("--packed", type=Path, metavar="FILE", help="file of instaqnas.tools.pack, run on integers")
    parser.add_argument("--run", metavar="FOLDER", help="the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="take this checkpoint instead of the run's latest")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write the images with their detections here")
    parser.add_argument("--score", type=float, default=0.3, help="drop detections scored lower (default: 0.3)")
    options, overrides = parser.parse_known_args(arguments)

    named = [(f"--{name}", getattr(options, name)) for name in ("config", "run", "init")]
    with exit_on_input_error():
        for word in overrides:
            if "=" not in word:  # what follows it has been taken for an image
                raise InputError(f"unknown option {word}; settings are overridden with an equals sign: {word}=VALUE")
        words = [word for option, value in named if value is not None for word in (option, value)]
        if options.packed is not None:
            if words or overrides:
                raise InputError(f"{(words or overrides)[0]}: not together with --packed, which needs no config")
            run_predict(lambda: Predictor.of_packed(options.packed), options.images, options.score, options.out)
            return
        command = run_command(options, overrides)
        run_predict(lambda: Predictor.of_run(command), options.images, options.score, options.out)


if __name__ == "__main__":
    main()
