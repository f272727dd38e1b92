"""Finds levels on the static front of a run's network, and writes them to a file for `bits.levels`.

    python -m instaqnas.tools.levels --config configs/shapes_watch.yaml --run runs/watch --costs 0.3,0.6,1.1 \
        --out levels.json

Each level is the best bit configuration of all layers within one cost, in GBitOps of the detector, made of the pairs of
`bits.choices`. Losses are measured on the val split, or the train split without one: on the run's quantized pretraining
if it has been trained under `random` configurations of all layers (`--bits.positions all`), or with --init on another
checkpoint. The one of a full-precision training saves that pretraining: layers are quantized one at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.levels import levels_of
from instaqnas.experiment.handover import initial_checkpoint, pretrained_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.files import write_text
from instaqnas.tools.arguments import refuse, run_command, run_parser
from instaqnas.tools.pack import prepare_file

# Whatever the config says, unless overridden: the bits of every layer are free, and no policy is involved.
EVERY_LAYER = (
    "--bits.positions=all", "--bits.levels=null", "--pretrain_quant.configurations=random", "--search.start=uniform",
    "--search.samples=1", "--reward.name=quality",
)  # fmt: skip


def costs_of(text: str) -> list[float]:
    """Numbers above 0, separated by commas."""
    costs = [float(part) for part in text.split(",")]
    if min(costs) <= 0:
        raise ValueError(text)
    return costs


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = run_parser(
        "levels",
        "Find the best bits of all layers within each of some costs.",
        "--bits.positions pointwise",
        init="the run's pretrained network",
    )
    parser.add_argument("--costs", required=True, type=costs_of, metavar="A,B,C", help="GBitOps of the detector")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write, such as levels.json")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        refuse(overrides, "--bits", "--budget")
        command = run_command(options, [*EVERY_LAYER, *overrides])
        if not 1 <= len(options.costs) <= 8:
            raise InputError(f"--costs: expected one to eight, got {len(options.costs)}")
        prepare_file(options.out)
        experiment = Experiment(command.config)
        source = initial_checkpoint(command) or pretrained_checkpoint(command)
        levels = levels_of(experiment, source, sorted(options.costs))
        record = {
            "levels": [level.plain() for level in levels],
            "network": {"stage": source.stage.name, "sha256": source.digest},
            "split": experiment.tuning_split,
            "choices": experiment.plain["bits"]["choices"],
        }
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        for number, level in enumerate(levels):
            print(f"level{number}: {level.gbitops:.4g} GBitOps, loss {level.loss:.4g}, found by {level.found}")


if __name__ == "__main__":
    main()
