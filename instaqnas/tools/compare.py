"""Compares two ways to choose bits, of any runs, with a 95 % interval of their difference in mAP.

    python -m instaqnas.tools.compare runs/watch/eval/policy_at_0.4/matches_policy.npz \
        --minus runs/static/eval/uniform_level0/matches_uniform_level0.npz

The files are written by eval.py. Give as many files before and after `--minus`, such as one for each seed: the result
is the mean of their differences. The bootstrap draws images, or groups of images that belong together (`--groups`, a
file with a line `IMAGE_ID GROUP` for each image), and keeps pairs together. It tells how sure the difference is for
these trainings on other images; how much trainings differ shows in the differences of single seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.metrics.bootstrap import MatchedSplit, load_matches, mean_difference, resampled

SEED = 0


def read_groups(path: Path, image_ids: Sequence[str]) -> list[int]:
    """The group of each image, numbered from 0.

    Raises: InputError if the file cannot be read, a line has not two words, or an image is missing.
    """
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--groups {path}: cannot be read ({error})") from None
    for number, words in enumerate(lines, start=1):
        if len(words) != 2:
            raise InputError(f"--groups {path}, line {number}: expected IMAGE_ID GROUP, got {' '.join(words)}")
    group_of = dict(lines)
    missing = [image_id for image_id in image_ids if image_id not in group_of]
    if missing:
        raise InputError(f"--groups {path}: no group for {missing[0]} and {len(missing) - 1} other images")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(group_of.values()))}
    return [numbers[group_of[image_id]] for image_id in image_ids]


def compare(ours: Sequence[MatchedSplit], baselines: Sequence[MatchedSplit], groups: Path | None) -> list[str]:
    """Lines for the terminal: the difference of each pair if there are several, then their mean with its interval."""
    image_ids = ours[0].image_ids
    counts = resampled(len(image_ids), SEED, None if groups is None else read_groups(groups, image_ids))
    lines = []
    if len(ours) > 1:
        for a, b in zip(ours, baselines, strict=True):
            maps = 100 * a.whole_map(), 100 * b.whole_map()
            lines.append(f"mAP {maps[0]:.2f} - {maps[1]:.2f} = {maps[0] - maps[1]:+.2f}")
    found = mean_difference(ours, baselines, counts)
    value, low, high = (100 * number for number in found)
    means = [100 * sum(split.whole_map() for split in splits) / len(splits) for splits in (ours, baselines)]
    return [
        *lines,
        f"mAP {means[0]:.2f} - {means[1]:.2f} = {value:+.2f}, 95 % interval {low:+.2f} to {high:+.2f} "
        f"({len(image_ids)} images, {counts.shape[0]} resampled splits)",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.compare",
        description="Difference in mAP (11 points, %) of two ways to choose bits, with a paired bootstrap interval.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="matches_*.npz of eval.py")
    parser.add_argument("--minus", nargs="+", type=Path, required=True, metavar="FILE", help="of the baseline, as many")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="lines IMAGE_ID GROUP; groups are drawn as a whole")
    options = parser.parse_args(arguments)
    with exit_on_input_error():
        if len(options.files) != len(options.minus):
            raise InputError(f"--minus: expected {len(options.files)} files, got {len(options.minus)}")
        ours, baselines = ([load_matches(path) for path in paths] for paths in (options.files, options.minus))
        for path, split in zip([*options.files, *options.minus], [*ours, *baselines], strict=True):
            if split.image_ids != ours[0].image_ids:
                raise InputError(f"{path}: other images than {options.files[0]}")
        print("\n".join(compare(ours, baselines, options.groups)))


if __name__ == "__main__":
    main()
