"""Runs a trained run's policy and detector on any images.

    python -m instaqnas.tools.predict --config configs/shapes.yaml --run runs/shapes IMAGE... [--out FOLDER]
    python -m instaqnas.tools.predict --packed packed.pt IMAGE...

The second runs on integers alone, from a file of `instaqnas.tools.pack`.

Prints one JSON line per image: `file`; `bits`, the choice of every position, such as w3a4; `gbitops` of the detector
under these bits and of the policy; `detections`, best first, with `label`, `score` and `box_xyxy` in the image's own
pixels. An image is taken upright, as its EXIF orientation says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torchvision import tv_tensors

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config import Command, EvalConfig
from instaqnas.data.transforms import eval_transform
from instaqnas.data.voc import read_image
from instaqnas.deploy.packed import load_packed
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.policy.bit_config import greedy_by
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.tools.arguments import run_command
from instaqnas.training.evaluate import detect
from instaqnas.training.experiment import POLICY_STAGES, Experiment, latest_policy_checkpoint, load_network
from instaqnas.training.pictures import draw_detections
from instaqnas.training.report import choice_name


@dataclass(frozen=True)
class Prediction:
    """One image: its bit choices by name, GBitOps, and its D detections, best first.

    boxes_xyxy [D, 4] in the image's own pixels, scores [D], labels [D] from 1; all on the CPU.
    """

    bits: list[str]
    gbitops_detector: float
    gbitops_policy: float
    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def plain(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Plain values; scores to 4 decimals, boxes to 2."""
        found = zip(self.labels.tolist(), self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True)
        return {
            "bits": self.bits,
            "gbitops": {"detector": self.gbitops_detector, "policy": self.gbitops_policy},
            "detections": [
                {
                    "label": class_names[label - 1],
                    "score": round(score, 4),
                    "box_xyxy": [round(value, 2) for value in box],
                }
                for label, score, box in found
            ],
        }


@dataclass(frozen=True)
class Predictor:
    """Policy and detector in use: networks in evaluation on `device`, their costs, class names without background."""

    detector: SwitchableSSD
    policy: PolicyNet
    costs: CostTable
    policy_gbitops: float
    class_names: tuple[str, ...]
    settings: EvalConfig
    device: torch.device

    @staticmethod
    def of_run(command: Command) -> Predictor:
        """The latest of a run, or the checkpoint that the command names.

        Raises: InputError if there is none, or it does not fit the config.
        """
        checkpoint = command.init or latest_policy_checkpoint(command)
        experiment = Experiment(command.config, load_checkpoint(checkpoint)["classes"])
        detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
        load_network(experiment, detector, "detector", checkpoint, stages=POLICY_STAGES)
        load_network(experiment, policy, "policy", checkpoint, stages=POLICY_STAGES)
        costs, policy_cost = detector_costs(detector), policy_gbitops(policy, detector.image_size)
        settings = command.config.eval
        return Predictor(detector, policy, costs, policy_cost, experiment.class_names, settings, experiment.device)

    @staticmethod
    def of_packed(path: Path) -> Predictor:
        """Those of a packed file, on integers.

        Raises: InputError if it cannot be read.
        """
        model = load_packed(path)
        parts = (model.detector, model.policy, model.costs, model.policy_gbitops, model.class_names)
        return Predictor(*parts, model.settings, torch.device("cpu"))

    def predict(self, image: Tensor, score_threshold: float) -> Prediction:
        """What is found on `image`, uint8 RGB [3, H, W] of any size, with at least this score."""
        resized = eval_transform(self.detector.image_size)({"image": tv_tensors.Image(image)})["image"]
        images = resized[None].to(self.device)
        look = self.detector.look(images)
        choices = greedy_by(self.policy)(look.seen, ())
        settings = replace(self.settings, score_threshold=score_threshold)
        found = detect(self.detector, images, choices, settings, look.stem)
        height, width = image.shape[1:]
        scale = torch.tensor([width, height, width, height]) / self.detector.image_size
        return Prediction(
            [choice_name(self.detector.choices[choice]) for choice in choices[0].tolist()],
            self.costs.gbitops(choices).item(),
            self.policy_gbitops,
            found.boxes_xyxy[0].cpu() * scale,
            found.scores[0].cpu(),
            found.labels[0].cpu(),
        )


def run_predict(
    load: Callable[[], Predictor], images: Sequence[Path], score_threshold: float, out: Path | None
) -> None:
    """Prints one line per image; also writes NAME_detections.png to `out` if it is given.

    Raises: InputError for a predictor that does not load, an image that cannot be read, or one that cannot be
    written; images before it are done.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"--score: expected a number from 0 to 1, got {score_threshold}")
    pictures = [None] * len(images) if out is None else _picture_paths(images, out)
    predictor = load()
    for path, picture in zip(images, pictures, strict=True):
        image = torch.from_numpy(read_image(path, "upright")).permute(2, 0, 1)
        found = predictor.predict(image, score_threshold)
        print(json.dumps({"file": str(path), **found.plain(predictor.class_names)}), flush=True)
        if picture is not None:
            drawn = draw_detections(image, found.boxes_xyxy, found.scores, found.labels, predictor.class_names)
            _write_png(picture, drawn)


def _picture_paths(images: Sequence[Path], out: Path) -> list[Path]:
    source_of: dict[Path, Path] = {}
    for path in images:
        picture = out / f"{path.stem}_detections.png"  # never the name of the image itself, `out` may be its folder
        if picture in source_of:
            raise InputError(f"{picture}: would be written for {source_of[picture]} and again for {path}")
        source_of[picture] = path
    return list(source_of)


def _write_png(path: Path, image: Tensor) -> None:
    encoded = cv2.imencode(".png", cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> None:
    """Predicts what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.predict",
        description="Run a trained run's policy and detector on any images; prints one JSON line per image.",
        epilog="Settings can be overridden with an equals sign, such as --device=cpu.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    model.add_argument("--packed", type=Path, metavar="FILE", help="file of instaqnas.tools.pack, run on integers")
    parser.add_argument("--run", metavar="FOLDER", help="the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="take this checkpoint instead of the run's latest")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write the images with their detections here")
    parser.add_argument("--score", type=float, default=0.3, help="drop detections scored lower (default: 0.3)")
    options, overrides = parser.parse_known_args(arguments)

    named = [(f"--{name}", getattr(options, name)) for name in ("config", "run", "init")]
    with exit_on_input_error():
        for word in overrides:
            if "=" not in word:  # what follows it has been taken for an image
                raise InputError(f"unknown option {word}; settings are overridden with an equals sign: {word}=VALUE")
        words = [word for option, value in named if value is not None for word in (option, value)]
        if options.packed is not None:
            if words or overrides:
                raise InputError(f"{(words or overrides)[0]}: not together with --packed, which needs no config")
            run_predict(lambda: Predictor.of_packed(options.packed), options.images, options.score, options.out)
            return
        command = run_command(options, overrides)
        run_predict(lambda: Predictor.of_run(command), options.images, options.score, options.out)


if __name__ == "__main__":
    main()
