"""What choosing per image brings where it costs nothing: `python -m instaqnas.tools.headroom --config FILE --run NAME`.

Two detectors, each trained under one fixed bit configuration, share the images of a split: some go to the dear one, the
others to the cheap one. Neither is held back by having to serve other bits, and which images are hard is known. What
that brings beyond a fixed configuration of the same cost is what a policy between these two can hope for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instaqnas.checkpoint import load_checkpoint
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.ssd import detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.metrics.voc import voc_map
from instaqnas.policy.bit_config import fixed
from instaqnas.quant.bitops import CostTable
from instaqnas.seeds import generator
from instaqnas.tools.arguments import add_split, refuse, run_command, run_parser, split_to_measure
from instaqnas.training.comparison import row_source
from instaqnas.training.evaluate import Measured, records_of
from instaqnas.training.experiment import (
    POLICY_STAGES,
    QUANTIZED_STAGES,
    Experiment,
    latest_policy_checkpoint,
    load_network,
)
from instaqnas.training.rivals import Rivals
from instaqnas.training.run_dir import best_checkpoint
from instaqnas.training.survey import survey

SHARES = (0.25, 0.5, 0.75)  # of the images, to the dear detector
RANDOM_ORDERS = 5


@dataclass(frozen=True)
class FixedDetector:
    """One of the two: its bits such as w3a4 at every position, checkpoint, mAP (11 points, 0 to 1) and GBitOps."""

    configuration: list[str]
    checkpoint: str
    map_11pt: float
    gbitops: float


@dataclass(frozen=True)
class Headroom:
    """What was measured on a split.

    gbitops: means over the images for each of `SHARES`; what choosing costs is not in them.
    map_11pt: for each way to order the images, mAP with the first of them at the dear detector, for each of `SHARES`.
    """

    split: str
    cheap: FixedDetector
    dear: FixedDetector
    gbitops: list[float]
    map_11pt: dict[str, list[float]]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"shares": SHARES, **asdict(self)}


def mixed(cheap: Sequence[Measured], dear: Sequence[Measured], to_dear: Iterable[int]) -> list[Measured]:
    """The images of a split as the dear detector has measured those of the indices `to_dear`, and the cheap the rest.

    Both have measured the same batches.
    """
    chosen = set(map(int, to_dear))
    return [
        Measured.of([b if b.index in chosen else a for a, b in zip(x.images(), y.images(), strict=True)])
        for x, y in zip(cheap, dear, strict=True)
    ]


def map_11pt(batches: Sequence[Measured], class_names: Sequence[str]) -> float:
    """mAP (11 points, 0 to 1) of measured images."""
    return voc_map(records_of(batches), class_names).map_11pt


def orders(cheap: Sequence[Measured], dear: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Ways to order the N images of a split, those that are to have more bits first: indices [N] for each.

    The quality that was measured is the negative loss. The order by the loss that more bits save needs both detectors
    and the true objects: no policy can know it.
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
        cheap, dear: checkpoints of `finetune.py --bits`; None is the run's row of the cheapest, or dearest, uniform
            choice.

    Raises: InputError as `row_source` and `load_network`, if there is no such split, or the dear one is no dearer.
    """
    experiment = rivals.experiment
    loader = experiment.loader_of(split)
    costs = detector_costs(experiment.quantized_detector())
    sources, configurations = zip(*map(partial(_configured, rivals), (cheap, dear), uniform_ends(costs)), strict=True)
    low, high = costs.gbitops(torch.tensor(configurations)).tolist()
    if high <= low:
        raise InputError(f"{sources[1]}: costs {high:.4g} GBitOps, not more than {sources[0]} with its {low:.4g}")
    of_cheap, of_dear = map(partial(_measured, experiment, loader), sources, configurations)
    found = {name: [order] for name, order in orders(of_cheap, of_dear).items()}
    if any(best_checkpoint(rivals.command.run, stage).exists() for stage in POLICY_STAGES):
        found["by what the policy spends"] = [largest_first(expected_gbitops(rivals, loader))]
    images, generated = len(loader.dataset), generator(experiment.config.seed, "headroom")
    found["at random"] = [torch.randperm(images, generator=generated).numpy() for _ in range(RANDOM_ORDERS)]
    counts = [round(share * images) for share in SHARES]

    def mean_map(some: Sequence[np.ndarray], count: int) -> float:
        maps = [map_11pt(mixed(of_cheap, of_dear, order[:count]), experiment.class_names) for order in some]
        return sum(maps) / len(maps)

    maps = [map_11pt(measured, experiment.class_names) for measured in (of_cheap, of_dear)]
    names = map(rivals.names, configurations)
    return Headroom(
        split,
        *map(FixedDetector, names, map(str, sources), maps, (low, high)),
        gbitops=[low + count / images * (high - low) for count in counts],
        map_11pt={name: [mean_map(some, count) for count in counts] for name, some in found.items()},
    )


def _configured(rivals: Rivals, checkpoint: Path | None, choice: int) -> tuple[Path, list[int]]:
    """A checkpoint and the configuration that it was trained for; of `choice` at all positions for None."""
    names = rivals.names(range(len(rivals.experiment.config.bits.choices)))
    if checkpoint is None:
        return row_source(rivals, f"uniform:{names[choice]}"), rivals.configuration(f"uniform:{names[choice]}")
    trained = load_checkpoint(checkpoint).get("configuration") or []
    if not trained or not set(trained) <= set(names):
        raise InputError(f"{checkpoint}: not of finetune.py --bits under these bits.choices")
    return checkpoint, [names.index(name) for name in trained]


def _measured(
    experiment: Experiment, loader: DetectionLoader, source: Path, configuration: list[int]
) -> list[Measured]:
    """What the detector of a checkpoint makes of the images under a configuration."""
    detector = experiment.quantized_detector()
    load_network(experiment, detector, "detector", source, stages=QUANTIZED_STAGES)
    return experiment.measure(detector, loader, fixed(configuration), "loss")


def uniform_ends(costs: CostTable) -> tuple[int, int]:
    """The choices that cost least and most at all positions together, of equal ones the first.

    Raises: InputError if all cost the same.
    """
    of_choices = costs.table.sum(0).tolist()
    cheap, dear = of_choices.index(min(of_choices)), of_choices.index(max(of_choices))
    if cheap == dear:
        raise InputError("bits.choices: expected two or more of different cost")
    return cheap, dear


def expected_gbitops(rivals: Rivals, loader: DetectionLoader) -> np.ndarray:
    """GBitOps [N] that the probabilities of the run's policy come to for each image, up to a constant."""
    experiment, detector = rivals.experiment, rivals.experiment.adaptive_detector().eval()
    source = latest_policy_checkpoint(rivals.command)
    load_network(experiment, detector, "detector", source, stages=POLICY_STAGES)
    logits = survey(rivals.policy, detector, loader, experiment.device).logits
    return (logits.double().softmax(-1) * detector_costs(detector).gbitops_table()).sum((1, 2)).numpy()


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
        "Measure what choosing per image brings where it costs nothing: two detectors, each trained under one fixed "
        "bit configuration, share the images of a split.",
        "--data.workers 0",
        init=None,
    )
    for name, end in (("cheap", "cheapest"), ("dear", "dearest")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="CHECKPOINT",
            help=f"of finetune.py --bits (default: the run's row of the {end} uniform choice)",
        )
    add_split(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        refuse(overrides, "--bits", "--init")
        command = run_command(options, overrides)
        experiment = Experiment(command.config)
        for name in ("cheap", "dear"):
            if (path := getattr(options, name)) is not None and not path.is_file():
                raise InputError(f"--{name} {path}: no such file")
        split = split_to_measure(options, experiment)
        found = measured_headroom(Rivals(experiment, command), split, options.cheap, options.dear)
    print(json.dumps(found.plain(), indent=1) if options.json else format_table(found))


if __name__ == "__main__":
    main()
