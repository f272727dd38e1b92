"""Packs a trained run for deployment: `python -m instaqnas.tools.pack --config FILE --run runs/NAME --out FILE`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config import Config
from instaqnas.deploy.packed import Architecture, save_packed
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.tools.arguments import run_command, run_parser
from instaqnas.training.experiment import (
    POLICY_STAGES,
    Experiment,
    detector_bits,
    latest_policy_checkpoint,
    load_network,
)


def architecture_of(config: Config) -> Architecture:
    """What a config says about the networks."""
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
    """Creates the folder of a file that is to be written.

    Raises: InputError if it cannot be written, or is a folder.
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
        "Pack the latest detector and policy of a run into one file for integer inference. The data need not be there.",
        "--eval.nms_iou 0.5",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write, such as packed.pt")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        command = run_command(options, overrides)
        checkpoint = command.init or latest_policy_checkpoint(command)
        prepare_file(options.out)
        experiment = Experiment(command.config, load_checkpoint(checkpoint)["classes"])
        detector, policy = experiment.adaptive_detector(), experiment.policy()
        load_network(experiment, detector, "detector", checkpoint, stages=POLICY_STAGES)
        load_network(experiment, policy, "policy", checkpoint, stages=POLICY_STAGES)
        architecture, settings = architecture_of(command.config), command.config.eval
        save_packed(options.out, detector, policy, architecture, experiment.class_names, settings)
        floats = 4 * sum(parameter.numel() for parameter in detector.parameters())
        print(f"{options.out}: {options.out.stat().st_size:,} bytes (the detector's float32 parameters: {floats:,})")


if __name__ == "__main__":
    main()
