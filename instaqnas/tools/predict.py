"""Detects objects in images, videos or a camera with the policy and detector of a trained run.

    python -m instaqnas.tools.predict --config configs/shapes.yaml --run runs/shapes INPUT... [--out FOLDER]
    python -m instaqnas.tools.predict --packed packed.pt INPUT...

The second form runs integer inference from a file written by `instaqnas.tools.pack`.

An INPUT is an image or video file, a folder of images, or a pattern in quotes; `--camera N` reads a camera instead.
Inputs that cannot be read are named on standard error, the others are done, and the exit status is 2.

Prints one JSON line per image or frame:

    file            path of the file
    frame, seconds  of a frame: its number from 0, and its time
    bits            name of the choice at every position, such as w3a4
    gbitops         of the detector under these bits, and of the policy
    detections      highest score first: `label`, `score`, and `box_xyxy` in pixels of the image

The EXIF orientation of images is applied. `--out` draws pictures and videos, `--voc` writes PASCAL VOC annotations of
images, `--coco` one COCO file, whose annotations have a `score`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from instaqnas.deploy.predictor import Predictor
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.tools.arguments import run_command
from instaqnas.tools.pack import prepare_file
from instaqnas.tools.predict_inputs import Item, camera_items, input_files, is_video, items_of
from instaqnas.tools.predict_outputs import CocoFile, Drawings, JsonLines, Output, VocAnnotations, drawn_path


def run_predict(
    predictor: Predictor,
    items: Iterable[Item | InputError],
    outputs: Sequence[Output],
    score_threshold: float,
    batch: int,
) -> int:
    """Hands every image's prediction to all outputs, in order; returns the number of inputs that could not be read.

    Each of these is named on standard error, and the others are done.

    Args:
        predictor: detects.
        items: images and frames; errors stand for those that cannot be read.
        outputs: are closed at the end, also after an error.
        score_threshold: lowest score of a detection, 0 to 1.
        batch: images that run at once.

    Raises: InputError if an output cannot be written. What came before it has been written by then.
    """
    unreadable = 0
    try:
        for group in _batches(items, batch):
            errors = [error for error in group if isinstance(error, InputError)]
            read = [item for item in group if isinstance(item, Item)]
            for error in errors:
                unreadable += 1
                sys.stderr.write(f"error: {error}\n")
            found = predictor.predict([item.image for item in read], score_threshold)
            for item, prediction in zip(read, found, strict=True):
                for output in outputs:
                    output.add(item, prediction)
    finally:
        for output in outputs:
            output.close()
    return unreadable


def _batches(items: Iterable[Item | InputError], size: int) -> Iterator[list[Item | InputError]]:
    group: list[Item | InputError] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _check_names(files: Sequence[Path], out: Path, *, drawn: bool) -> None:
    """Raises InputError if two inputs would be written to the same file in `out`."""
    written: dict[Path, Path] = {}
    for path in files:
        target = drawn_path(path, out) if drawn else out / f"{path.stem}.xml"
        if target in written:
            raise InputError(f"{target}: would be written for {written[target]} and again for {path}")
        written[target] = path


def _check_options(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    for word in overrides:
        if "=" not in word:  # argparse has taken the value after it for an image
            raise InputError(f"unknown option {word}; settings are overridden with an equals sign: {word}=VALUE")
    if (options.camera is None) == (not options.inputs):
        raise InputError("expected either inputs or --camera")
    if not 0 <= options.score <= 1:
        raise InputError(f"--score: expected a number from 0 to 1, got {options.score}")
    if options.batch < 1:
        raise InputError(f"--batch: expected at least 1, got {options.batch}")
    if options.packed is not None:
        given = [f"--{name}" for name in ("run", "init") if getattr(options, name) is not None] + [*overrides]
        if given:
            raise InputError(f"{given[0]}: not together with --packed, which needs no config")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.predict",
        description="Detect objects in images, videos or a camera with a trained run; prints JSON lines.",
        epilog="Settings of the config can be overridden with an equals sign, for example --device=cpu.",
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="images, videos, folders, patterns such as '*.jpg'")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    model.add_argument("--packed", type=Path, metavar="FILE", help="file of instaqnas.tools.pack, integer only")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="checkpoint to use instead of the run's latest")
    parser.add_argument("--camera", type=int, metavar="N", help="frames of camera N instead of inputs, until Ctrl-C")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also draw detections and bits to files here")
    parser.add_argument(
        "--voc", type=Path, metavar="FOLDER", help="also write a PASCAL VOC annotation of each image here"
    )
    parser.add_argument("--coco", type=Path, metavar="FILE", help="also write all detections to this COCO file")
    parser.add_argument("--budget", type=float, metavar="GBITOPS", help="shift the policy to this mean cost")
    parser.add_argument("--batch", type=int, default=8, help="images that run at once (default: 8)")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a detection (default: 0.3)")
    return parser


def _outputs(options: argparse.Namespace, predictor: Predictor) -> list[Output]:
    outputs: list[Output] = [JsonLines()]
    if options.out is not None:
        outputs.append(Drawings(options.out, predictor))
    if options.voc is not None:
        outputs.append(VocAnnotations(options.voc))
    if options.coco is not None:
        outputs.append(CocoFile(options.coco, predictor.class_names))
    return outputs


def _check_outputs(options: argparse.Namespace, files: Sequence[Path]) -> None:
    """Raises InputError if a file cannot be written, or would be written for two inputs."""
    if options.out is not None:
        _check_names(files, options.out, drawn=True)
    if options.voc is not None:
        if options.camera is not None or any(map(is_video, files)):
            raise InputError("--voc: for images only")
        _check_names(files, options.voc, drawn=False)
    if options.coco is not None:
        prepare_file(options.coco)


def _items(options: argparse.Namespace, files: Sequence[Path]) -> Iterable[Item | InputError]:
    if options.camera is not None:
        return camera_items(options.camera)
    shown = tqdm(files, desc="predict", leave=False, disable=not sys.stderr.isatty())
    return chain.from_iterable(map(items_of, shown))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    options, overrides = _parser().parse_known_args(arguments)
    with exit_on_input_error():
        _check_options(options, overrides)
        if options.packed is not None:
            load = partial(Predictor.of_packed, options.packed, options.budget)
        else:
            load = partial(Predictor.of_run, replace(run_command(options, overrides), budget=options.budget))
        files = input_files(options.inputs)
        _check_outputs(options, files)
        predictor = load()
        batch = options.batch if options.camera is None else 1  # no frame of a camera waits for others
        try:
            unreadable = run_predict(
                predictor, _items(options, files), _outputs(options, predictor), options.score, batch
            )
        except KeyboardInterrupt:
            sys.exit(0 if options.camera is not None else 130)
        if unreadable:
            raise InputError(f"{unreadable} of {max(1, len(files))} inputs could not be read")


if __name__ == "__main__":
    main()
