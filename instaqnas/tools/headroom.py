"""What choosing bits per image could bring: `python -m instaqnas.tools.headroom --config FILE --run runs/NAME`.

Two detectors, each trained under one fixed bit configuration, share the images of a split: some go to the dear one, the
others to the cheap one. Neither is held back by having to serve other bits, and which images are hard is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from instaqnas.checkpoint import load_checkpoint
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.metrics.voc import voc_map
from instaqnas.policy.bit_config import fixed
from instaqnas.quant.bitops import CostTable
from instaqnas.seeds import generator
from instaqnas.tools.arguments import add_split, refuse, run_command, run_parser, split_to_measure
from instaqnas.training.comparison import row_source
from instaqnas.training.evaluate import Measured, records_of
from instaqnas.training.experiment import Experiment, has_policy, load_network
from instaqnas.training.report import choice_name
from instaqnas.training.rivals import Rivals, fixed_stage
from instaqnas.training.run_dir import best_checkpoint

SHARES = (0.25, 0.5, 0.75)  # of the images, to the dear detector
RANDOM_ORDERS = 5


@dataclass(frozen=True)
class FixedDetector:
    """One of the two: the bits of each position, such as w3a4, checkpoint, mAP (11 points, 0 to 1) and GBitOps."""

    configuration: list[str]
    checkpoint: str
    map_11pt: float
    gbitops: float


@dataclass(frozen=True)
class Headroom:
    """What was measured on a split.

    gbitops: means over the images for each of `SHARES`; what choosing costs is not in them.
    map_11pt: for each way to order the images, mAP with the first of them at the dear detector, for each of `SHARES`;
        at random, the mean over `RANDOM_ORDERS`.
    """

    split: str
    cheap: FixedDetector
    dear: FixedDetector
    gbitops: list[float]
    map_11pt: dict[str, list[float]]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"shares": SHARES, **asdict(self)}


class _Trained(NamedTuple):
    """A detector, and the configuration that it was trained under."""

    source: Path
    configuration: list[int]
    network: SwitchableSSD


def mixed(cheap: Sequence[Measured], dear: Sequence[Measured], to_dear: Iterable[int]) -> list[Measured]:
    """The images of a split as the dear detector has measured those of the indices `to_dear`, and the cheap the rest.

    Both have measured the same batches.
    """
    chosen = set(map(int, to_dear))
    batches = []
    for pair in zip(cheap, dear, strict=True):
        both = zip(*(batch.images() for batch in pair), strict=True)
        batches.append(Measured.of([of_dear if of_dear.index in chosen else of_cheap for of_cheap, of_dear in both]))
    return batches


def map_11pt(batches: Sequence[Measured], class_names: Sequence[str]) -> float:
    """mAP (11 points, 0 to 1) of measured images."""
    return voc_map(records_of(batches), class_names).map_11pt


def orders(cheap: Sequence[Measured], dear: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Ways to order the N images of a split, those that are to have more bits first: indices [N] for each.

    The quality that was measured is the negative loss, a sum over the objects of an image. No policy knows the orders
    by loss. That by the loss saved also finds what differs by chance between two trainings.
    """
    rows = [row for batch in cheap for row in batch.rows]
    losses = [np.array([-row.quality for batch in batches for row in batch.rows]) for batches in (cheap, dear)]
    difficulty = np.array([row.difficulty for row in rows])
    values = {"by objects": np.array([row.objects for row in rows])}
    if not np.isnan(difficulty).any():
        values["by difficulty"] = difficulty
    values |= {"by loss at the cheap one": losses[0], "by loss saved": losses[0] - losses[1]}
    return {name: largest_first(of_images) for name, of_images in values.items()}


def largest_first(values: np.ndarray) -> np.ndarray:
    """Indices [N] of N values in falling order, of equal ones the first first."""
    return np.argsort(-values, kind="stable")


def measured_headroom(rivals: Rivals, split: str, cheap: Path | None = None, dear: Path | None = None) -> Headroom:
    """Runs two detectors on a split, and mixes what they found.

    Args:
        cheap, dear: checkpoints of `finetune.py --bits`; None is what the run has trained under the cheapest, or
            dearest, uniform choice.

    Raises: InputError if there is no such checkpoint or split, or the dear detector is no dearer.
    """
    experiment = rivals.experiment
    loader = experiment.loader_of(split)
    costs = detector_costs(experiment.quantized_detector())
    cheapest, dearest = uniform_ends(costs)
    ends = _trained(rivals, "cheap", cheap, cheapest), _trained(rivals, "dear", dear, dearest)
    low, high = costs.gbitops(torch.tensor([end.configuration for end in ends])).tolist()
    if high <= low:
        raise InputError(
            f"{ends[1].source}: costs {high:.4g} GBitOps, not more than {ends[0].source} with its {low:.4g}"
        )
    by_policy = {}
    if has_policy(rivals.command.run):
        by_policy = {"by what the policy spends": largest_first(expected_gbitops(rivals, loader, costs))}
    measured = [experiment.measure(end.network, loader, fixed(end.configuration), "loss") for end in ends]

    images, names = len(loader.dataset), experiment.class_names
    counts = [round(share * images) for share in SHARES]

    def maps_of(order: np.ndarray) -> list[float]:
        return [map_11pt(mixed(*measured, order[:count]), names) for count in counts]

    maps = {name: maps_of(order) for name, order in {**orders(*measured), **by_policy}.items()}
    random_orders = generator(experiment.config.seed, "headroom")
    drawn = [maps_of(torch.randperm(images, generator=random_orders).numpy()) for _ in range(RANDOM_ORDERS)]
    maps["at random"] = np.mean(drawn, axis=0).tolist()
    cheap_figures, dear_figures = (
        FixedDetector(rivals.names(end.configuration), str(end.source), map_11pt(found, names), gbitops)
        for end, found, gbitops in zip(ends, measured, (low, high), strict=True)
    )
    means = [low + count / images * (high - low) for count in counts]
    return Headroom(split, cheap_figures, dear_figures, means, maps)


def _trained(rivals: Rivals, option: str, checkpoint: Path | None, choice: int) -> _Trained:
    """The detector of a checkpoint, or for None the run's that was trained with `choice` at all positions."""
    experiment, choices = rivals.experiment, rivals.experiment.config.bits.choices
    if checkpoint is None:
        bits = f"uniform:{choice_name(choices[choice])}"
        if not best_checkpoint(rivals.command.run, fixed_stage(bits)).exists():
            raise InputError(
                f"{rivals.command.run}: no detector trained under {bits}; run finetune.py --bits {bits} first, or name "
                f"a checkpoint with --{option}"
            )
        checkpoint = row_source(rivals, bits)
    detector = experiment.quantized_detector()
    load_network(experiment, detector, "detector", checkpoint, stages=("finetune_fixed",))
    names = [choice_name(choice) for choice in choices]
    configuration = [names.index(name) for name in load_checkpoint(checkpoint)["configuration"]]
    return _Trained(checkpoint, configuration, detector)


def uniform_ends(costs: CostTable) -> tuple[int, int]:
    """The choices that cost least and most at all positions together, of equal ones the first.

    Raises: InputError if all cost the same.
    """
    of_choices = costs.table.sum(0).tolist()
    cheap, dear = of_choices.index(min(of_choices)), of_choices.index(max(of_choices))
    if cheap == dear:
        raise InputError("bits.choices: expected two or more of different cost")
    return cheap, dear


def expected_gbitops(rivals: Rivals, loader: DetectionLoader, costs: CostTable) -> np.ndarray:
    """GBitOps [N] that the probabilities of the run's policy come to for each image, up to a constant."""
    probabilities = rivals.survey(loader).logits.double().softmax(-1)
    return (probabilities * costs.gbitops_table()).sum((1, 2)).numpy()


def format_table(found: Headroom) -> str:
    """The two detectors, then a line for each order."""
    lines = [f"on the {found.split} split"]
    for name, detector in (("cheap", found.cheap), ("dear", found.dear)):
        lines.append(
            f"{name}: {' '.join(_shortened(detector.configuration))}, mAP (11 points) {100 * detector.map_11pt:.2f} at "
            f"{detector.gbitops:.4f} GBitOps ({detector.checkpoint})"
        )
    lines += ["", f"{'images to the dear one':<30}" + "".join(f"{share:>10.0%}" for share in SHARES)]
    lines.append(f"{'GBitOps':<30}" + "".join(f"{gbitops:>10.4f}" for gbitops in found.gbitops))
    for name, maps in found.map_11pt.items():
        lines.append(f"{'mAP, ' + name:<30}" + "".join(f"{100 * value:>10.2f}" for value in maps))
    return "\n".join(lines)


def _shortened(configuration: Sequence[str]) -> Sequence[str]:
    """One name where all positions have the same."""
    return configuration if len(set(configuration)) > 1 else configuration[:1]


def main(arguments: list[str] | None = None) -> None:
    """Prints what the command line asks for."""
    parser = run_parser(
        "headroom",
        "Measure what choosing bits per image could bring: two detectors, each trained under one fixed bit "
        "configuration, share the images of a split.",
        "--data.workers 0",
        init=None,
    )
    for name, end in (("cheap", "cheapest"), ("dear", "dearest")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="CHECKPOINT",
            help=f"of finetune.py --bits (default: the run's under the {end} uniform choice)",
        )
    add_split(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        refuse(overrides, "--bits", "--init")
        command = run_command(options, overrides)
        experiment = Experiment(command.config)
        split = split_to_measure(options, experiment)
        found = measured_headroom(Rivals(experiment, command), split, options.cheap, options.dear)
    print(json.dumps(found.plain(), indent=1) if options.json else format_table(found))


if __name__ == "__main__":
    main()
