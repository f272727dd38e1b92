"""Packs a trained run for deployment: `python -m instaqnas.tools.pack --config FILE --run runs/NAME --out FILE`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from instaqnas.config.settings import Config
from instaqnas.deploy.packed import Architecture, save_packed
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.experiment.handover import initial_checkpoint, latest_policy_checkpoint
from instaqnas.experiment.parts import Experiment, detector_bits
from instaqnas.experiment.stage import POLICY_KINDS
from instaqnas.tools.arguments import run_command, run_parser


def architecture_of(config: Config) -> Architecture:
    """The settings of a config that the networks are built from."""
    return Architecture(
        detector_bits(config),
        image_size=config.detector.image_size,
        width=config.detector.width,
        extras_batch_norm=config.detector.extras_batch_norm,
        policy_input=config.policy.input,
        policy_effort=config.policy.effort,
        policy_pool=config.policy.pool,
        policy_width=config.policy.width,
        policy_bits=config.policy.bits,
    )


def prepare_file(path: Path) -> None:
    """Creates the folder of an output file.

    Raises: InputError if the path is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder, expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> None:
    """Writes the file and prints its size."""
    parser = run_parser(
        "pack",
        "Pack the latest detector and policy of a run into one file for integer inference. The data may be missing.",
        "--eval.nms_iou 0.5",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write, such as packed.pt")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        command = run_command(options, overrides)
        checkpoint = initial_checkpoint(command) or latest_policy_checkpoint(command)
        prepare_file(options.out)
        experiment = Experiment(command.config, checkpoint.state["classes"])
        detector, policy = experiment.adaptive_detector(), experiment.policy()
        checkpoint.load(experiment, detector, "detector", POLICY_KINDS)
        checkpoint.load(experiment, policy, "policy", POLICY_KINDS)
        architecture, settings = architecture_of(command.config), command.config.eval
        save_packed(options.out, detector, policy, architecture, experiment.class_names, settings, checkpoint.prices)
        floats = 4 * sum(parameter.numel() for parameter in detector.parameters())
        print(f"{options.out}: {options.out.stat().st_size:,} bytes (the detector's float32 parameters: {floats:,})")


if __name__ == "__main__":
    main()
