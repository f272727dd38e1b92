"""Generates the data set of drawn objects: `python -m instaqnas.tools.shapes --root data/shapes`."""

from __future__ import annotations

import argparse
from pathlib import Path

from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import exit_on_input_error


def main(arguments: list[str] | None = None) -> None:
    """Writes the data set; a second run with the same arguments changes nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.shapes",
        description="Generate a PASCAL-VOC-layout data set of drawn objects with known difficulty.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--test", type=int, default=500, help="test images")
    parser.add_argument("--image-size", type=int, default=160, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images")
    parser.add_argument("--empty", type=float, default=0.0, help="share of images without objects, as cameras see them")
    options = parser.parse_args(arguments)

    counts = {"train": options.train, "val": options.val, "test": options.test}
    with exit_on_input_error():
        generate_shapes(options.root, counts, image_size=options.image_size, seed=options.seed, empty=options.empty)
        print(f"{options.root}: {', '.join(f'{count} {split}' for split, count in counts.items())} images")


if __name__ == "__main__":
    main()
