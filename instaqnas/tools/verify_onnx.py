"""The part of `instaqnas.tools.verify` that checks an ONNX file against the integer networks of its run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from instaqnas import distributed
from instaqnas.config.command import Command
from instaqnas.deploy.onnx_session import check_packages
from instaqnas.experiment.parts import Experiment
from instaqnas.tools.export import model_of_run


def verify_onnx(command: Command, path: Path, random_configurations: int) -> dict[str, Any]:
    """Compares a file with the integer networks of the run on the test split.

    Args:
        command: names the run.
        path: file of `instaqnas.tools.export`.
        random_configurations: configurations that all images run under as well.

    Returns: plain values of two `OnnxComparison`, "policy" and "random", and the "form" of the file.

    Raises: InputError if a package is missing, or the file or the run cannot be read.
    """
    check_packages()
    from instaqnas.deploy.onnx_check import OnnxCheck, OnnxComparison  # imports packages that may be missing

    experiment = Experiment(command.config)
    check, loader = OnnxCheck(model_of_run(command), path), experiment.test_loader()
    check.under_policy(distributed.progress_bar(loader, "verify"))
    policy, check.result = check.result, OnnxComparison()
    for index in range(random_configurations):
        config: list[int] = []
        for batch in distributed.progress_bar(loader, "verify"):
            config = config or experiment.choose_random("verify", index)(batch.images, batch.keys)[0].tolist()
            for b in range(len(batch.images)):
                check.compare(batch.images[b : b + 1], config)
    return {"policy": asdict(policy), "random": asdict(check.result), "form": check.onnx.metadata["form"]}


def is_equal(figures: dict[str, Any]) -> bool:
    """Whether nothing differs, in the result of `verify_onnx`."""
    return not any(
        result["different_levels"]
        or result["images_with_different_detections"]
        or result["images_with_different_choices"]
        for result in (figures["policy"], figures["random"])
    )
