"""Exports a trained run to ONNX, for onnxruntime without torch and without this project.

    python -m instaqnas.tools.export --config FILE --run runs/NAME --out detector.onnx
    python -m instaqnas.tools.export --packed packed.pt --out detector.onnx

One file holds the policy, the choice of bits, the detector and its post-processing: see `deploy.onnx_export` for inputs
and outputs, docs/deployment.md for a program. `--fixed w4a4` exports one choice at all positions instead, without
policy, for batches; `--per-level` a folder with the policy and one such file for each choice. `--form fused` is faster,
but not equal to integer inference in every integer (`instaqnas.tools.verify --onnx` counts them).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from instaqnas.config.command import Command
from instaqnas.deploy.onnx_session import check_packages
from instaqnas.deploy.packed import IntegerModel, load_packed
from instaqnas.detector.ssd import detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.experiment.handover import initial_checkpoint, latest_policy_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import POLICY_KINDS
from instaqnas.policy.network import policy_gbitops
from instaqnas.quant.integer import to_integer
from instaqnas.tools.arguments import run_command
from instaqnas.tools.pack import prepare_file


def model_of_run(command: Command) -> IntegerModel:
    """The integer form of the latest detector and policy of a run; the data may be missing.

    Raises: InputError if there is no checkpoint, it does not fit the config, or a layer has no integer form.
    """
    checkpoint = initial_checkpoint(command) or latest_policy_checkpoint(command)
    experiment = Experiment(command.config, checkpoint.state["classes"])
    detector, policy = experiment.adaptive_detector(), experiment.policy()
    checkpoint.load(experiment, detector, "detector", POLICY_KINDS)
    checkpoint.load(experiment, policy, "policy", POLICY_KINDS)
    return IntegerModel(
        to_integer(detector.cpu(), "detector."),
        to_integer(policy.cpu(), "policy."),
        experiment.class_names,
        detector_costs(detector),
        policy_gbitops(policy, detector.image_size),
        command.config.eval,
        tuple(checkpoint.prices),
    )


def exported(model: IntegerModel, options: argparse.Namespace) -> dict[Path, Any]:
    """The ONNX models that the options ask for, by file."""
    from instaqnas.deploy.onnx_export import adaptive_model, choice_named, fixed_model, policy_model

    positions, names = len(model.detector.positions), model.detector.choice_names
    if options.fixed is not None:
        return {options.out: fixed_model(model, [choice_named(model, options.fixed)] * positions, options.form)}
    if options.per_level:
        configs = {options.out / f"{name}.onnx": [k] * positions for k, name in enumerate(names)}
        levels = {path: fixed_model(model, config, options.form) for path, config in configs.items()}
        return {options.out / "policy.onnx": policy_model(model), **levels}
    return {options.out: adaptive_model(model, options.form)}


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings of the config that are overridden."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.export",
        description="Export the latest detector and policy of a run to ONNX. The data may be missing.",
        epilog="Settings of the config can be overridden, for example --eval.nms_iou 0.5",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    source.add_argument("--packed", type=Path, metavar="FILE", help="file of instaqnas.tools.pack instead of a run")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="checkpoint to use instead of the run's latest")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="file to write, or folder of --per-level"
    )
    parser.add_argument(
        "--form",
        choices=["exact", "fused"],
        default="exact",
        help="exact: the integers of integer inference; fused: faster, a few integers differ by one (default: exact)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fixed", metavar="NAME", help="one choice for all images, such as w4a4, without policy")
    kind.add_argument("--per-level", action="store_true", help="files for batches: the policy, and one for each choice")
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Writes the files and prints their sizes."""
    options, overrides = parsed(arguments)
    with exit_on_input_error():
        check_packages()
        if options.packed is not None:
            given = [f"--{name}" for name in ("run", "init") if getattr(options, name) is not None] + overrides
            if given:
                raise InputError(f"{given[0]}: not together with --packed, which needs no config")
            model = load_packed(options.packed)
        else:
            model = model_of_run(run_command(options, overrides))
        from instaqnas.deploy.onnx_export import save_model  # imports packages that may be missing

        for path, proto in exported(model, options).items():
            prepare_file(path)
            save_model(proto, path)
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
