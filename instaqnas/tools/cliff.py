"""Finds the cost below which quality falls: `python -m instaqnas.tools.cliff --config FILE --run runs/NAME`.

Measures one network that was trained under random bit configurations:

- mAP, loss and GBitOps under every uniform choice;
- the rise of the loss when one position gets a cheaper choice and all others stay random.

The cliff is the pair of uniform choices, neighbours in cost, between which mAP falls most per GBitOps, if the fall is
above the noise of the split's images (95 % interval, paired bootstrap). Target costs are best set between these two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from instaqnas.detector.ssd import detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.measure import evaluate
from instaqnas.evaluation.sensitivity import ANY, cheapest_and_most_expensive, losses_around, mean_loss_on
from instaqnas.experiment.handover import Checkpoint, initial_checkpoint, pretrained_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import QUANTIZED_KINDS
from instaqnas.metrics.bootstrap import Interval, mean_difference, resampled
from instaqnas.metrics.voc import LEARNED
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
    """One position at less than its most expensive choice, all others random.

    Args:
        position, choice: names.
        loss_rise: mean loss minus the mean loss with this position at its most expensive choice.
        gbitops_saved: per image, above 0.
    """

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
    """Measurements of one network on one split.

    Args:
        split: name of the split.
        checkpoint: file of the network.
        policy_gbitops: cost of the policy network per image.
        uniform: one entry for each choice.
        steps: one entry for each position and cheaper choice.
        fall: mAP (0 to 1) lost at the steepest pair of neighbours, with its 95 % interval; None if mAP never falls.
    """

    split: str
    checkpoint: str
    policy_gbitops: float
    uniform: list[UniformChoice]
    steps: list[CheaperChoice]
    fall: Interval | None

    @property
    def edge(self) -> tuple[UniformChoice, UniformChoice] | None:
        """The two choices of the cliff, cheaper first; None without a fall above the noise."""
        return cliff(self.uniform) if self.fall is not None and self.fall.low > 0 else None

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON.

        `cliff` has the names of the choices below and above the cliff, `target_gbitops` their costs with the policy;
        both are None if mAP never falls by more than noise.
        """
        steps = [{**asdict(step), "rise_per_gbitops": step.rise_per_gbitops} for step in self.steps]
        edge = self.edge
        if edge is None:
            return {**asdict(self), "steps": steps, "cliff": None, "target_gbitops": None}
        names = [row.choice for row in edge]
        targets = [row.gbitops + self.policy_gbitops for row in edge]
        return {**asdict(self), "steps": steps, "cliff": names, "target_gbitops": targets}


def cliff(uniform: Sequence[UniformChoice]) -> tuple[UniformChoice, UniformChoice] | None:
    """The two neighbours in cost, cheaper first, between which mAP falls most per GBitOps; None if it never falls.

    Among choices of equal cost, only the one with the highest mAP is considered.
    """
    best: dict[float, UniformChoice] = {}
    for row in uniform:
        if row.gbitops not in best or row.map_11pt >= best[row.gbitops].map_11pt:
            best[row.gbitops] = row
    neighbours = pairwise(best[gbitops] for gbitops in sorted(best))
    return max((pair for pair in neighbours if _fall(pair) > 0), key=_fall, default=None)


def _fall(pair: tuple[UniformChoice, UniformChoice]) -> float:
    """mAP lost per GBitOps saved, from the second choice of a pair to the first."""
    lower, upper = pair
    return (upper.map_11pt - lower.map_11pt) / (upper.gbitops - lower.gbitops)


def cheaper_steps(
    positions: Sequence[str], choices: Sequence[str], losses: Sequence[Sequence[float]], costs: CostTable
) -> list[CheaperChoice]:
    """Compares each choice of each position with the most expensive choice of that position.

    Args:
        positions: L names.
        choices: K names.
        losses: mean losses [L][K], as in `Sensitivity`.
        costs: of the detector.
    """
    most_expensive = cheapest_and_most_expensive(costs).most_expensive
    bitops = costs.table.tolist()
    steps = []
    for position, name in enumerate(positions):
        top = most_expensive[position]
        for k, choice in enumerate(choices):
            saved = bitops[position][top] - bitops[position][k]
            if saved > 0:
                rise = losses[position][k] - losses[position][top]
                steps.append(CheaperChoice(name, choice, rise, saved / 1e9))
    return steps


def measure_landscape(experiment: Experiment, checkpoint: Checkpoint, split: str) -> Landscape:
    """Runs a network on a split: all positions at each choice, then one position at each choice with the others random.

    Raises: InputError if the checkpoint is not of a quantized stage or has other settings, or the split does not exist.
    """
    detector = experiment.quantized_detector().eval()
    checkpoint.load(experiment, detector, "detector", QUANTIZED_KINDS)
    costs = detector_costs(detector)
    names = list(detector.choice_names)
    loader = experiment.loader_of(split)
    random_bits = experiment.choose_random("sensitivity")
    mean_loss = mean_loss_on(detector, loader, random_bits, experiment.device)
    uniform, matched = [], {}
    for k, name in enumerate(names):
        report = evaluate(experiment, detector, loader, experiment.choose_fixed(detector, k))
        loss = mean_loss([k] * len(detector.positions))
        uniform.append(UniformChoice(name, report.map_11pt, loss, report.gbitops_detector))
        matched[name] = report.matched
    losses = losses_around([ANY] * len(detector.positions), len(names), mean_loss)
    steps = cheaper_steps(detector.positions, names, losses, costs)
    policy_cost = policy_gbitops(experiment.policy(), detector.image_size)
    fall, steepest = None, cliff(uniform)
    if steepest is not None:
        lower, upper = (matched[row.choice] for row in steepest)
        fall = mean_difference([upper], [lower], resampled(len(lower.image_ids), experiment.config.seed))
    return Landscape(split, str(checkpoint.path), policy_cost, uniform, steps, fall)


def format_tables(found: Landscape) -> str:
    """A table of the uniform choices, a table of the positions, and `cliff_line`."""
    lines = [f"{found.checkpoint} on the {found.split} split", ""]
    lines.append(f"{'all positions':<32}{'mAP 11pt':>10}{'loss':>10}{'GBitOps':>10}")
    for row in sorted(found.uniform, key=lambda row: row.gbitops):
        lines.append(f"{row.choice:<32}{100 * row.map_11pt:>10.2f}{row.loss:>10.4f}{row.gbitops:>10.4f}")
    by_position: dict[str, list[CheaperChoice]] = {}
    for step in found.steps:
        by_position.setdefault(step.position, []).append(step)
    choices = dict.fromkeys(step.choice for step in found.steps)
    lines += ["", "one position cheaper, all others random: rise of the loss, and rise per GBitOps saved"]
    lines.append(f"{'position':<32}" + "".join(f"{choice:>10}{'per GBitOps':>13}" for choice in choices))
    for position, steps in by_position.items():
        figures = "".join(f"{step.loss_rise:>10.4f}{step.rise_per_gbitops:>13.3f}" for step in steps)
        lines.append(f"{position:<32}{figures}")
    return "\n".join([*lines, "", cliff_line(found)])


def cliff_line(found: Landscape) -> str:
    """One line with the two choices of the cliff and their costs, policy included, or why there is none."""
    if max(row.map_11pt for row in found.uniform) < LEARNED:
        return (
            f"the network has learned nothing: mAP is below {100 * LEARNED:g} % at every choice; train it longer, "
            "or see what preflight says of its data"
        )
    if found.fall is None:
        return "no cliff: mAP never falls from one uniform choice to the next cheaper one; add cheaper choices"
    value, low, high = (100 * number for number in found.fall)
    if found.edge is None:
        return (
            f"no cliff: the steepest fall of mAP, {value:.1f} points, is within noise (95 % interval {low:+.1f} to "
            f"{high:+.1f}); add cheaper choices, or measure on more images"
        )
    lower, upper = found.edge
    targets = " to ".join(f"{row.gbitops + found.policy_gbitops:.4g}" for row in found.edge)
    return (
        f"cliff: from {upper.choice} to {lower.choice} mAP falls by {value:.1f} points (95 % interval {low:+.1f} to "
        f"{high:+.1f}), {100 * _fall(found.edge):.4g} per GBitOps; set targets from {targets} GBitOps, policy included"
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = run_parser(
        "cliff",
        "Measure every uniform bit choice and the sensitivity of every position of one trained network, and find the "
        "cost below which quality falls.",
        "--data.workers 0",
        init="the run's pretrained network",
    )
    add_split(parser)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        refuse(overrides, "--bits")
        command = run_command(options, overrides)
        if len(command.config.bits.names) < 2:
            raise InputError("bits.choices: expected two or more to compare, got one")
        experiment = Experiment(command.config)
        split = split_to_measure(options, experiment)
        checkpoint = initial_checkpoint(command) or pretrained_checkpoint(command)
        found = measure_landscape(experiment, checkpoint, split)
    print(json.dumps(found.plain(), indent=1) if options.json else format_tables(found))


if __name__ == "__main__":
    main()
