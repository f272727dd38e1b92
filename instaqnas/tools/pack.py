"""Packs a trained run for deployment: `python -m instaqnas.tools.pack --config FILE --run runs/NAME --out FILE`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from instaqnas.config import Config, parse_command
from instaqnas.deploy.packed import Architecture, save_packed
from instaqnas.detector.ssd import DetectorBits
from instaqnas.errors import exit_on_input_error
from instaqnas.training.experiment import POLICY_STAGES, Experiment, latest_policy_checkpoint, load_network


def architecture_of(config: Config) -> Architecture:
    """What a config says about the networks."""
    return Architecture(
        DetectorBits(**{item.name: getattr(config.bits, item.name) for item in fields(config.bits)}),
        image_size=config.detector.image_size,
        width=config.detector.width,
        extras_batch_norm=config.detector.extras_batch_norm,
        policy_input=config.policy.input,
        policy_effort=config.policy.effort,
        policy_pool=config.policy.pool,
        policy_width=config.policy.width,
        policy_bits=config.policy.bits,
    )


def main(arguments: list[str] | None = None) -> None:
    """Writes the file and prints its size."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.pack",
        description="Pack the latest detector and policy of a run into one file for integer inference.",
        epilog="Settings can be overridden, such as --detector.width 0.5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="pack this checkpoint instead of the run's latest stage")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write, such as packed.pt")
    options, overrides = parser.parse_known_args(arguments)
    named = [word for name in ("run", "init") if (value := getattr(options, name)) for word in (f"--{name}", value)]
    with exit_on_input_error():
        command = parse_command("eval", ["--config", options.config, *named, *overrides])
        checkpoint = command.init or latest_policy_checkpoint(command)
        experiment = Experiment(command.config)
        detector, policy = experiment.adaptive_detector(), experiment.policy()
        load_network(experiment, detector, "detector", checkpoint, stages=POLICY_STAGES)
        load_network(experiment, policy, "policy", checkpoint, stages=POLICY_STAGES)
        save_packed(options.out, detector, policy, architecture_of(command.config), experiment.class_names)
        floats = 4 * sum(parameter.numel() for parameter in detector.parameters())
        print(f"{options.out}: {options.out.stat().st_size:,} bytes (the detector's float32 parameters: {floats:,})")


if __name__ == "__main__":
    main()
