"""The Python interface for inference.

from instaqnas.deploy import load

detector = load("runs/shapes")  # or a packed file
result = detector("photo.jpg")
for name, score, box in zip(result.names, result.scores, result.boxes_xyxy):
    print(name, float(score), box.tolist())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from instaqnas.bits import BitChoice
from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.command import Command
from instaqnas.config.reading import from_plain
from instaqnas.config.settings import EvalConfig
from instaqnas.data.images import read_image
from instaqnas.data.transforms import eval_transform
from instaqnas.deploy.packed import STAGE as PACKED
from instaqnas.deploy.packed import load_packed
from instaqnas.detector.postprocess import Detections
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.evaluation.inference import detect
from instaqnas.evaluation.levels import bits_of_layers
from instaqnas.experiment.handover import initial_checkpoint, latest_policy_checkpoint, latest_policy_path
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import POLICY_KINDS
from instaqnas.policy.bit_config import greedy_by
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable

Image = str | Path | np.ndarray | Tensor


@dataclass(frozen=True)
class Prediction:
    """Bits and detections of one image.

    Args:
        class_names: of all classes, without background.
        bits: name of the choice at each position, such as w3a4.
        layer_bits: (weight bits, activation bits) of each layer, in the order of the network.
        gbitops_detector: cost of the detector under these bits.
        gbitops_policy: cost of choosing them.
        boxes_xyxy: D detections, best first, [D, 4] in pixels of the image, on the CPU.
        scores: [D], 0 to 1.
        labels: [D], 1 for the first class name.
    """

    class_names: tuple[str, ...]
    bits: list[str]
    layer_bits: list[BitChoice]
    gbitops_detector: float
    gbitops_policy: float
    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    @property
    def gbitops(self) -> float:
        """Cost of detector and policy."""
        return self.gbitops_detector + self.gbitops_policy

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON; scores to 4 decimals, boxes to 2."""
        found = zip(self.names, self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True)
        return {
            "bits": self.bits,
            "gbitops": {"detector": self.gbitops_detector, "policy": self.gbitops_policy},
            "detections": [
                {
                    "label": name,
                    "score": round(score, 4),
                    "box_xyxy": [round(value, 2) for value in box],
                }
                for name, score, box in found
            ],
        }


@dataclass(frozen=True)
class Predictor:
    """A policy and its detector, ready to predict.

    Args:
        detector: in eval mode on `device`.
        policy: in eval mode on `device`.
        costs: GBitOps of the detector's configurations.
        policy_gbitops: cost of one decision.
        class_names: without background.
        settings: of post-processing.
        device: of the networks.
    """

    detector: SwitchableSSD
    policy: PolicyNet
    costs: CostTable
    policy_gbitops: float
    class_names: tuple[str, ...]
    settings: EvalConfig
    device: torch.device

    @staticmethod
    def of_run(command: Command) -> Predictor:
        """Networks of a run's latest checkpoint with a policy, or of the checkpoint that `--init` names.

        Raises: InputError if there is none, or it does not fit the config.
        """
        checkpoint = initial_checkpoint(command) or latest_policy_checkpoint(command)
        experiment = Experiment(command.config, checkpoint.state["classes"])
        detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
        checkpoint.load(experiment, detector, "detector", POLICY_KINDS)
        checkpoint.load(experiment, policy, "policy", POLICY_KINDS)
        costs, policy_cost = detector_costs(detector), policy_gbitops(policy, detector.image_size)
        if command.budget is not None:
            checkpoint.shift_to_budget(policy, costs, command.budget)
        settings = command.config.eval
        return Predictor(detector, policy, costs, policy_cost, experiment.class_names, settings, experiment.device)

    @staticmethod
    def of_packed(path: Path, budget: float | None = None) -> Predictor:
        """Integer networks of a packed file, on the CPU.

        Args:
            path: the file.
            budget: mean GBitOps that the policy is shifted to, itself included; None leaves it as trained.

        Raises: InputError if the file cannot be read, or has no such budget.
        """
        model = load_packed(path)
        if budget is not None:
            try:
                model.policy.shift_to_budget(model.prices, model.costs, budget)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        parts = (model.detector, model.policy, model.costs, model.policy_gbitops, model.class_names)
        return Predictor(*parts, model.settings, torch.device("cpu"))

    def __call__(self, images: Image | Sequence[Image], score_threshold: float = 0.3) -> Prediction | list[Prediction]:
        """Detections on one image, or on each of several; several of any sizes run as one batch.

        Args:
            images: one or several of: RGB uint8 [H, W, 3] as an array, uint8 [3, H, W] as a tensor, or an image file,
                whose EXIF orientation is applied.
            score_threshold: lowest score of a detection, 0 to 1.

        Returns: a prediction for one image, a list for several.

        Raises: InputError if a file cannot be read, or an image has another shape or type; the message names which.
        """
        if isinstance(images, str | Path | np.ndarray | Tensor):
            return self.predict([as_tensor(images)], score_threshold)[0]
        return self.predict([as_tensor(image, place) for place, image in enumerate(images)], score_threshold)

    def predict(self, images: Sequence[Tensor], score_threshold: float) -> list[Prediction]:
        """Detections on the images of a batch.

        Args:
            images: uint8 RGB [3, H, W], each of any size.
            score_threshold: lowest score of a detection, 0 to 1.
        """
        if not images:
            return []
        transform = eval_transform(self.detector.image_size)
        batch = torch.stack([transform({"image": tv_tensors.Image(image)})["image"] for image in images])
        batch = batch.to(self.device)
        observation = self.detector.observe(batch)
        choices = greedy_by(self.policy)(observation.input, ())
        settings = replace(self.settings, score_threshold=score_threshold)
        found = detect(self.detector, batch, choices, settings, observation.stem)
        gbitops = self.costs.gbitops(choices).tolist()
        return [
            self._prediction(images[place], choices[place], gbitops[place], found, place) for place in range(len(batch))
        ]

    def _prediction(self, image: Tensor, choices: Tensor, gbitops: float, found: Detections, place: int) -> Prediction:
        """The prediction of one image of a batch, its boxes in pixels of the image."""
        height, width = image.shape[1:]
        scale = torch.tensor([width, height, width, height]) / self.detector.image_size
        kept = found.labels[place] > 0  # 0 is padding
        return Prediction(
            class_names=self.class_names,
            layer_bits=bits_of_layers(self.detector, choices.tolist()),
            bits=[self.detector.choice_names[choice] for choice in choices.tolist()],
            gbitops_detector=gbitops,
            gbitops_policy=self.policy_gbitops,
            boxes_xyxy=found.boxes_xyxy[place, kept].cpu() * scale,
            scores=found.scores[place, kept].cpu(),
            labels=found.labels[place, kept].cpu(),
        )


def load(path: str | Path, *, budget: float | None = None, device: str = "auto") -> Predictor:
    """A detector ready to predict, from the folder of a run, one of its checkpoints, or a packed file.

    Args:
        path: a folder that `search.py` or `finetune.py` wrote to, a checkpoint of theirs, or a file of
            `instaqnas.tools.pack`.
        budget: mean GBitOps that the policy is shifted to, itself included; None leaves it as trained.
        device: `auto` takes CUDA if there is one; also `cpu`, `cuda` or `cuda:1`. A packed file runs on the CPU.

    Raises: InputError if there is no policy, a file cannot be read, or it has no such budget.
    """
    path = Path(path)
    if path.is_dir():
        path = latest_policy_path(path)
    state = load_checkpoint(path)
    if state["stage"] == PACKED:
        return Predictor.of_packed(path, budget)
    config = replace(from_plain(state["config"]), device=device)
    return Predictor.of_run(Command(config, run=path.parent.parent, init=path, budget=budget))


def as_tensor(image: Image, place: int = 0) -> Tensor:
    """An image as uint8 RGB [3, H, W].

    Args:
        image: see `Predictor.__call__`.
        place: its number among several, for messages.

    Raises: InputError as there.
    """
    if isinstance(image, str | Path):
        return torch.from_numpy(read_image(image, "upright")).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        raise InputError(f"image {place}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        return image.cpu()
    raise InputError(f"image {place}: expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
