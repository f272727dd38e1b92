"""Finds where quality falls: `python -m instaqnas.tools.cliff --config FILE --run runs/NAME`.

From one network that was trained under random bit configurations: mAP, loss and GBitOps of every uniform choice, and
how much the loss rises when one position gets a cheaper choice, all others being random. Choices and targets pay at the
cliff, between the neighbouring uniform choices where mAP falls most per GBitOps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from instaqnas.bits import choice_name
from instaqnas.detector.ssd import detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.measure import evaluate
from instaqnas.evaluation.sensitivity import ANY, cheapest_and_most_expensive, losses_around, mean_loss_on
from instaqnas.experiment.handover import Checkpoint, initial_checkpoint, pretrained_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import QUANTIZED_KINDS
from instaqnas.policy.network import policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.tools.arguments import add_split, refuse, run_command, run_parser, split_to_measure


@dataclass(frozen=True)
class UniformChoice:
    """All positions at one choice: mAP (11 points, 0 to 1), mean detection loss, and GBitOps of the detector."""

    choice: str
    map_11pt: float
    loss: float
    gbitops: float


@dataclass(frozen=True)
class CheaperChoice:
    """One position at a cheaper choice than its dearest, all others random: rise of the mean loss, GBitOps saved."""

    position: str
    choice: str
    loss_rise: float
    gbitops_saved: float

    @property
    def rise_per_gbitops(self) -> float:
        """Rise of the loss per GBitOps saved."""
        return self.loss_rise / self.gbitops_saved


@dataclass(frozen=True)
class Landscape:
    """What was measured of one network on one split; `policy_gbitops` is what choosing costs an image."""

    split: str
    checkpoint: str
    policy_gbitops: float
    uniform: list[UniformChoice]
    steps: list[CheaperChoice]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON; `cliff` names the choices below and above it, None where quality never falls."""
        edge = cliff(self.uniform)
        steps = [{**asdict(step), "rise_per_gbitops": step.rise_per_gbitops} for step in self.steps]
        targets = None if edge is None else [choice.gbitops + self.policy_gbitops for choice in edge]
        named = None if edge is None else [choice.choice for choice in edge]
        return {**asdict(self), "steps": steps, "cliff": named, "target_gbitops": targets}


def cliff(uniform: Sequence[UniformChoice]) -> tuple[UniformChoice, UniformChoice] | None:
    """The neighbours in cost, cheaper first, between which mAP falls most per GBitOps; None if it falls nowhere.

    Of choices that cost the same the one with the higher mAP counts.
    """
    best = {row.gbitops: row for row in sorted(uniform, key=lambda row: row.map_11pt)}
    neighbours = list(pairwise(best[gbitops] for gbitops in sorted(best)))
    return max((pair for pair in neighbours if _fall(pair) > 0), key=_fall, default=None)


def _fall(pair: tuple[UniformChoice, UniformChoice]) -> float:
    """mAP that a saved GBitOps costs."""
    lower, upper = pair
    return (upper.map_11pt - lower.map_11pt) / (upper.gbitops - lower.gbitops)


def cheaper_steps(
    positions: Sequence[str], choices: Sequence[str], losses: Sequence[Sequence[float]], costs: CostTable
) -> list[CheaperChoice]:
    """All choices of all positions but the dearest; `losses` [L][K] are those of `Sensitivity`."""
    expensive, table = cheapest_and_most_expensive(costs).most_expensive, costs.table.tolist()
    return [
        CheaperChoice(
            positions[position], choices[k], row[k] - row[top], (table[position][top] - table[position][k]) / 1e9
        )
        for position, (row, top) in enumerate(zip(losses, expensive, strict=True))
        for k in range(len(choices))
        if table[position][k] < table[position][top]
    ]


def measure_landscape(experiment: Experiment, checkpoint: Checkpoint, split: str) -> Landscape:
    """Runs the network of a checkpoint on a split under every uniform choice and every single cheaper one.

    Raises: InputError if the checkpoint is not of a quantized stage or has other settings, or there is no such split.
    """
    detector = experiment.quantized_detector().eval()
    checkpoint.load(experiment, detector, "detector", QUANTIZED_KINDS)
    costs, names = detector_costs(detector), [choice_name(choice) for choice in detector.choices]
    loader = experiment.loader_of(split)
    random_bits = experiment.choose_random("sensitivity")
    mean_loss = mean_loss_on(detector, loader, random_bits, experiment.device)
    uniform = []
    for k, name in enumerate(names):
        report = evaluate(experiment, detector, loader, experiment.choose_fixed(detector, k))
        loss = mean_loss([k] * len(detector.positions))
        uniform.append(UniformChoice(name, report.map_11pt, loss, report.gbitops_detector))
    losses = losses_around([ANY] * len(detector.positions), len(names), mean_loss)
    steps = cheaper_steps(detector.positions, names, losses, costs)
    policy_cost = policy_gbitops(experiment.policy(), detector.image_size)
    return Landscape(split, str(checkpoint.path), policy_cost, uniform, steps)


def format_tables(found: Landscape) -> str:
    """The tables of uniform choices and of positions, then the line that names the cliff."""
    lines = [f"{found.checkpoint} on the {found.split} split", ""]
    lines.append(f"{'all positions':<32}{'mAP 11pt':>10}{'loss':>10}{'GBitOps':>10}")
    for row in sorted(found.uniform, key=lambda row: row.gbitops):
        lines.append(f"{row.choice:<32}{100 * row.map_11pt:>10.2f}{row.loss:>10.4f}{row.gbitops:>10.4f}")
    by_position: dict[str, list[CheaperChoice]] = {}
    for step in found.steps:
        by_position.setdefault(step.position, []).append(step)
    choices = dict.fromkeys(step.choice for step in found.steps)
    lines += ["", "one position cheaper, all others at random: rise of the loss, and that per GBitOps saved"]
    lines.append(f"{'position':<32}" + "".join(f"{choice:>10}{'per GBitOps':>13}" for choice in choices))
    for position, steps in by_position.items():
        figures = "".join(f"{step.loss_rise:>10.4f}{step.rise_per_gbitops:>13.3f}" for step in steps)
        lines.append(f"{position:<32}{figures}")
    return "\n".join([*lines, "", cliff_line(found)])


def cliff_line(found: Landscape) -> str:
    """Names the cliff, and the total costs, policy included, that targets should lie between."""
    edge = cliff(found.uniform)
    if edge is None:
        return "no cliff: mAP falls between no two of these uniform choices; offer cheaper ones"
    lower, upper = edge
    fall, per_gbitops = 100 * (upper.map_11pt - lower.map_11pt), 100 * _fall(edge)
    targets = " to ".join(f"{row.gbitops + found.policy_gbitops:.4g}" for row in edge)
    return (
        f"cliff: from {upper.choice} to {lower.choice} mAP falls by {fall:.1f} points, {per_gbitops:.4g} per GBitOps; "
        f"aim targets at {targets} GBitOps, policy included"
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints what the command line asks for."""
    parser = run_parser(
        "cliff",
        "Measure every uniform bit choice and the sensitivity of every position of one trained network, and name the "
        "cliff: where quality falls.",
        "--data.workers 0",
        init="the run's pretrained one",
    )
    add_split(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        refuse(overrides, "--bits")
        command = run_command(options, overrides)
        if len(command.config.bits.choices) < 2:
            raise InputError("bits.choices: expected two or more to compare, got one")
        experiment = Experiment(command.config)
        split = split_to_measure(options, experiment)
        found = measure_landscape(experiment, initial_checkpoint(command) or pretrained_checkpoint(command), split)
    print(json.dumps(found.plain(), indent=1) if options.json else format_tables(found))


if __name__ == "__main__":
    main()
