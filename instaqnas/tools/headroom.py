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

from instaqnas.bits import choice_name
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.baselines import Baselines
from instaqnas.evaluation.comparison import row_source
from instaqnas.evaluation.measure import MeasuredBatch, measure_split, records_of
from instaqnas.experiment.handover import Checkpoint, best_checkpoint, has_policy
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import FINETUNE_FIXED, fixed_stage
from instaqnas.metrics.voc import voc_map
from instaqnas.policy.bit_config import fixed
from instaqnas.quant.bitops import CostTable
from instaqnas.seeds import generator
from instaqnas.tools.arguments import add_split, refuse, run_command, run_parser, split_to_measure

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

    source: Checkpoint
    configuration: list[int]
    network: SwitchableSSD


def mixed(cheap: Sequence[MeasuredBatch], dear: Sequence[MeasuredBatch], to_dear: Iterable[int]) -> list[MeasuredBatch]:
    """The images of a split as the dear detector has measured those of the indices `to_dear`, and the cheap the rest.

    Both have measured the same batches.
    """
    chosen = set(map(int, to_dear))
    batches = []
    for pair in zip(cheap, dear, strict=True):
        both = zip(*(batch.images() for batch in pair), strict=True)
        batches.append(
            MeasuredBatch.of([of_dear if of_dear.place in chosen else of_cheap for of_cheap, of_dear in both])
        )
    return batches


def map_11pt(batches: Sequence[MeasuredBatch], class_names: Sequence[str]) -> float:
    """mAP (11 points, 0 to 1) of measured images."""
    return voc_map(records_of(batches), class_names).map_11pt


def orders(cheap: Sequence[MeasuredBatch], dear: Sequence[MeasuredBatch]) -> dict[str, np.ndarray]:
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


def measured_headroom(
    baselines: Baselines, split: str, cheap: Path | None = None, dear: Path | None = None
) -> Headroom:
    """Runs two detectors on a split, and mixes what they found.

    Args:
        cheap, dear: checkpoints of `finetune.py --bits`; None is what the run has trained under the cheapest, or
            dearest, uniform choice.

    Raises: InputError if there is no such checkpoint or split, or the dear detector is no dearer.
    """
    experiment = baselines.experiment
    loader = experiment.loader_of(split)
    costs = detector_costs(experiment.quantized_detector())
    cheapest, dearest = uniform_extremes(costs)
    ends = _trained(baselines, "cheap", cheap, cheapest), _trained(baselines, "dear", dear, dearest)
    low, high = costs.gbitops(torch.tensor([end.configuration for end in ends])).tolist()
    if high <= low:
        raise InputError(
            f"{ends[1].source.path}: costs {high:.4g} GBitOps, not more than {ends[0].source.path} with its {low:.4g}"
        )
    by_policy = {}
    if has_policy(baselines.command.run):
        by_policy = {"by what the policy spends": largest_first(expected_gbitops(baselines, loader, costs))}
    low_share, high_share = (
        measure_split(experiment, end.network, loader, fixed(end.configuration), "loss") for end in ends
    )

    images, names = len(loader.annotations), experiment.class_names
    counts = [round(share * images) for share in SHARES]

    def maps_of(order: np.ndarray) -> list[float]:
        return [map_11pt(mixed(low_share, high_share, order[:count]), names) for count in counts]

    maps = {name: maps_of(order) for name, order in {**orders(low_share, high_share), **by_policy}.items()}
    random_orders = generator(experiment.config.seed, "headroom")
    drawn = [maps_of(torch.randperm(images, generator=random_orders).numpy()) for _ in range(RANDOM_ORDERS)]
    maps["at random"] = np.mean(drawn, axis=0).tolist()
    cheap_figures, dear_figures = (
        FixedDetector(baselines.names(end.configuration), str(end.source.path), map_11pt(found, names), gbitops)
        for end, found, gbitops in zip(ends, (low_share, high_share), (low, high), strict=True)
    )
    means = [low + count / images * (high - low) for count in counts]
    return Headroom(split, cheap_figures, dear_figures, means, maps)


def _trained(baselines: Baselines, option: str, checkpoint: Path | None, choice: int) -> _Trained:
    """The detector of a checkpoint, or for None the run's that was trained with `choice` at all positions."""
    experiment, choices = baselines.experiment, baselines.experiment.config.bits.choices
    if checkpoint is None:
        bits = f"uniform:{choice_name(choices[choice])}"
        if not best_checkpoint(baselines.command.run, fixed_stage(bits)).exists():
            raise InputError(
                f"{baselines.command.run}: no detector trained under {bits}; run finetune.py --bits {bits} first, or "
                f"name a checkpoint with --{option}"
            )
        source = row_source(baselines, bits)
    else:
        source = Checkpoint.read(checkpoint)
    detector = experiment.quantized_detector()
    source.load(experiment, detector, "detector", (FINETUNE_FIXED.kind,))
    names = [choice_name(choice) for choice in choices]
    configuration = [names.index(name) for name in source.state["configuration"]]
    return _Trained(source, configuration, detector)


def uniform_extremes(costs: CostTable) -> tuple[int, int]:
    """The choices that cost least and most at all positions together, of equal ones the first.

    Raises: InputError if all cost the same.
    """
    of_choices = costs.table.sum(0).tolist()
    cheap, dear = of_choices.index(min(of_choices)), of_choices.index(max(of_choices))
    if cheap == dear:
        raise InputError("bits.choices: expected two or more of different cost")
    return cheap, dear


def expected_gbitops(baselines: Baselines, loader: DetectionLoader, costs: CostTable) -> np.ndarray:
    """GBitOps [N] that the probabilities of the run's policy come to for each image, up to a constant."""
    probabilities = baselines.survey(loader).logits.double().softmax(-1)
    return (probabilities * costs.gbitops_table()).sum((1, 2)).numpy()


def format_headroom(found: Headroom) -> str:
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
        found = measured_headroom(Baselines(experiment, command), split, options.cheap, options.dear)
    print(json.dumps(found.plain(), indent=1) if options.json else format_headroom(found))


if __name__ == "__main__":
    main()
