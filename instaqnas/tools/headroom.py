"""Estimates the gain from choosing bits per image: `python -m instaqnas.tools.headroom --config FILE --run runs/NAME`.

The images of a split are ranked in several orders. The first images of an order are detected by an expensive detector,
all others by a cheap one; each detector is trained under one fixed bit configuration. The estimate is optimistic in two
ways: each detector is specialised to one configuration, and some orders use annotations that a policy cannot see.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from instaqnas.bits import uniform_name
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

SHARES = (0.25, 0.5, 0.75)  # of the images, for the expensive detector
RANDOM_ORDERS = 5


@dataclass(frozen=True)
class FixedDetector:
    """A detector trained under one configuration.

    Args:
        configuration: name of the choice at every position, such as w3a4.
        checkpoint: its file.
        map_11pt: of all images by this detector, 0 to 1.
        gbitops: per image.
    """

    configuration: list[str]
    checkpoint: str
    map_11pt: float
    gbitops: float


@dataclass(frozen=True)
class Headroom:
    """Measurements on one split.

    Args:
        split: its name.
        cheap, expensive: the two detectors.
        gbitops: mean per image at each of `SHARES`, without the cost of a policy.
        map_11pt: mAP at each of `SHARES`, 0 to 1, by the name of the order; "at random" is the mean over
            `RANDOM_ORDERS`.
    """

    split: str
    cheap: FixedDetector
    expensive: FixedDetector
    gbitops: list[float]
    map_11pt: dict[str, list[float]]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"shares": SHARES, **asdict(self)}


class _LoadedDetector(NamedTuple):
    """A detector, its checkpoint, and the configuration it was trained under with its cost per image."""

    source: Checkpoint
    configuration: list[int]
    network: SwitchableSSD
    gbitops: float

    def figures(self, baselines: Baselines, map_11pt: float) -> FixedDetector:
        """The detector by names and numbers, with its mAP on a split."""
        return FixedDetector(baselines.names(self.configuration), str(self.source.path), map_11pt, self.gbitops)


def mixed(
    cheap: Sequence[MeasuredBatch], expensive: Sequence[MeasuredBatch], to_expensive: Iterable[int]
) -> list[MeasuredBatch]:
    """Combines the measurements of two detectors on one split.

    Args:
        cheap, expensive: measurements of the same batches by both detectors.
        to_expensive: dataset indices of the images to take from `expensive`; all others are taken from `cheap`.
    """
    indices = set(to_expensive)
    batches = []
    for cheap_batch, expensive_batch in zip(cheap, expensive, strict=True):
        images = []
        for cheap_image, expensive_image in zip(cheap_batch.images(), expensive_batch.images(), strict=True):
            images.append(expensive_image if expensive_image.place in indices else cheap_image)
        batches.append(MeasuredBatch.of(images))
    return batches


def map_11pt(batches: Sequence[MeasuredBatch], class_names: Sequence[str]) -> float:
    """mAP (11 points, 0 to 1) of measured images."""
    return voc_map(records_of(batches), class_names).map_11pt


def orders(cheap: Sequence[MeasuredBatch], expensive: Sequence[MeasuredBatch]) -> dict[str, np.ndarray]:
    """Orders of the N images of a split, the most demanding images first: dataset indices [N], by name.

    A policy cannot see the losses. The order by loss saved also exploits noise: it finds the images on which one of the
    two trainings happens to be better.

    Args:
        cheap, expensive: measurements with the negative loss, summed over the objects of an image, as quality.
    """
    rows = [row for batch in cheap for row in batch.rows]
    cheap_loss = -_qualities(cheap)
    expensive_loss = -_qualities(expensive)
    values = {"by objects": np.array([row.objects for row in rows])}
    difficulty = np.array([row.difficulty for row in rows])
    if not np.isnan(difficulty).any():
        values["by difficulty"] = difficulty
    values["by loss at the cheap one"] = cheap_loss
    values["by loss saved"] = cheap_loss - expensive_loss
    return {name: largest_first(values_of_images) for name, values_of_images in values.items()}


def _qualities(batches: Sequence[MeasuredBatch]) -> np.ndarray:
    """Quality [N] of each image."""
    return np.array([row.quality for batch in batches for row in batch.rows])


def largest_first(values: np.ndarray) -> np.ndarray:
    """Indices [N] that sort `values` [N] from largest to smallest; equal values keep their order."""
    return np.argsort(-values, kind="stable")


def measured_headroom(
    baselines: Baselines, split: str, cheap: Path | None = None, expensive: Path | None = None
) -> Headroom:
    """Runs two detectors on a split and computes mAP for mixtures of their detections.

    Args:
        baselines: of the run.
        split: name of the split.
        cheap: checkpoint of `finetune.py --bits`; None takes the run's detector of the cheapest uniform choice.
        expensive: likewise; None takes the run's detector of the most expensive uniform choice.

    Raises: InputError if a checkpoint or the split does not exist, or `expensive` costs no more than `cheap`.
    """
    experiment = baselines.experiment
    loader = experiment.loader_of(split)
    costs = detector_costs(experiment.quantized_detector())
    cheapest_choice, most_expensive_choice = uniform_extremes(costs)
    low = _load_detector(baselines, costs, "cheap", cheap, cheapest_choice)
    high = _load_detector(baselines, costs, "expensive", expensive, most_expensive_choice)
    if high.gbitops <= low.gbitops:
        raise InputError(
            f"{high.source.path}: costs {high.gbitops:.4g} GBitOps, not more than {low.source.path} with its "
            f"{low.gbitops:.4g}"
        )
    policy_order = {}
    if has_policy(baselines.command.run):
        policy_order["by expected GBitOps"] = largest_first(expected_gbitops(baselines, loader, costs))
    low_batches = measure_split(experiment, low.network, loader, fixed(low.configuration), "loss")
    high_batches = measure_split(experiment, high.network, loader, fixed(high.configuration), "loss")

    images, class_names = len(loader.annotations), experiment.class_names
    counts = [round(share * images) for share in SHARES]

    def maps_of(order: np.ndarray) -> list[float]:
        return [map_11pt(mixed(low_batches, high_batches, order[:count]), class_names) for count in counts]

    maps = {name: maps_of(order) for name, order in {**orders(low_batches, high_batches), **policy_order}.items()}
    random_orders = generator(experiment.config.seed, "headroom")
    drawn = [maps_of(torch.randperm(images, generator=random_orders).numpy()) for _ in range(RANDOM_ORDERS)]
    maps["at random"] = np.mean(drawn, axis=0).tolist()
    return Headroom(
        split=split,
        cheap=low.figures(baselines, map_11pt(low_batches, class_names)),
        expensive=high.figures(baselines, map_11pt(high_batches, class_names)),
        gbitops=[low.gbitops + count / images * (high.gbitops - low.gbitops) for count in counts],
        map_11pt=maps,
    )


def _load_detector(
    baselines: Baselines, costs: CostTable, option: str, checkpoint: Path | None, choice: int
) -> _LoadedDetector:
    """The detector of a checkpoint; None takes the run's detector trained with `choice` at all positions.

    Raises: InputError if the checkpoint does not exist or does not fit; `option` is the option that names another.
    """
    experiment = baselines.experiment
    names = experiment.config.bits.names
    if checkpoint is None:
        bits = uniform_name(names[choice])
        if not best_checkpoint(baselines.command.run, fixed_stage(bits)).exists():
            raise InputError(
                f"{baselines.command.run}: no detector trained under {bits}; run finetune.py --bits {bits} first, or "
                f"name a checkpoint with --{option}"
            )
        source = row_source(baselines, bits)
    else:
        source = Checkpoint.read(checkpoint)
    network = experiment.quantized_detector()
    source.load(experiment, network, "detector", (FINETUNE_FIXED.kind,))
    configuration = [names.index(name) for name in source.state["configuration"]]
    return _LoadedDetector(source, configuration, network, costs.gbitops(torch.tensor([configuration])).item())


def uniform_extremes(costs: CostTable) -> tuple[int, int]:
    """The cheapest and the most expensive choice for all positions; among choices of equal cost the first.

    Raises: InputError if all choices cost the same.
    """
    totals = costs.table.sum(0).tolist()
    cheapest, most_expensive = totals.index(min(totals)), totals.index(max(totals))
    if cheapest == most_expensive:
        raise InputError("bits.choices: expected two or more of different cost")
    return cheapest, most_expensive


def expected_gbitops(baselines: Baselines, loader: DetectionLoader, costs: CostTable) -> np.ndarray:
    """Expected GBitOps [N] of each image under the run's policy, without the part that all configurations share."""
    probabilities = baselines.survey(loader).logits.double().softmax(-1)
    return (probabilities * costs.gbitops_table()).sum((1, 2)).numpy()


def format_headroom(found: Headroom) -> str:
    """The two detectors, then a table with a line for each order."""
    lines = [f"on the {found.split} split"]
    for name, detector in (("cheap", found.cheap), ("expensive", found.expensive)):
        lines.append(
            f"{name}: {' '.join(_shortened(detector.configuration))}, mAP (11 points) {100 * detector.map_11pt:.2f} at "
            f"{detector.gbitops:.4f} GBitOps ({detector.checkpoint})"
        )
    lines += ["", f"{'images to the expensive one':<30}" + "".join(f"{share:>10.0%}" for share in SHARES)]
    lines.append(f"{'GBitOps':<30}" + "".join(f"{gbitops:>10.4f}" for gbitops in found.gbitops))
    for name, maps in found.map_11pt.items():
        lines.append(f"{'mAP, ' + name:<30}" + "".join(f"{100 * value:>10.2f}" for value in maps))
    return "\n".join(lines)


def _shortened(configuration: Sequence[str]) -> Sequence[str]:
    """A single name if all positions have the same choice."""
    return configuration if len(set(configuration)) > 1 else configuration[:1]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = run_parser(
        "headroom",
        "Estimate the gain from choosing bits per image: two detectors, each trained under one fixed bit "
        "configuration, share the images of a split.",
        "--data.workers 0",
        init=None,
    )
    for option, default in (("--cheap", "cheapest"), ("--expensive", "most expensive")):
        parser.add_argument(
            option,
            type=Path,
            metavar="CHECKPOINT",
            help=f"of finetune.py --bits (default: the run's detector of the {default} uniform choice)",
        )
    add_split(parser)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        refuse(overrides, "--bits", "--init")
        command = run_command(options, overrides)
        experiment = Experiment(command.config)
        split = split_to_measure(options, experiment)
        found = measured_headroom(Baselines(experiment, command), split, options.cheap, options.expensive)
    print(json.dumps(found.plain(), indent=1) if options.json else format_headroom(found))


if __name__ == "__main__":
    main()
