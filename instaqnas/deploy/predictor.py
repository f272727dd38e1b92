"""Runs policy and detector on single images: the Python interface for inference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from instaqnas.config.command import Command
from instaqnas.config.settings import EvalConfig
from instaqnas.data.transforms import eval_transform
from instaqnas.deploy.packed import load_packed
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.evaluation.inference import detect
from instaqnas.experiment.handover import initial_checkpoint, latest_policy_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import POLICY_KINDS
from instaqnas.policy.bit_config import greedy_by
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable


@dataclass(frozen=True)
class Prediction:
    """Bits and detections of one image.

    Args:
        bits: name of the choice at each position, such as w3a4.
        gbitops_detector: cost of the detector under these bits.
        gbitops_policy: cost of choosing them.
        boxes_xyxy: D detections, best first, [D, 4] in pixels of the image, on the CPU.
        scores: [D], 0 to 1.
        labels: [D], 1 for the first class name.
    """

    bits: list[str]
    gbitops_detector: float
    gbitops_policy: float
    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def plain(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Plain values for JSON; scores to 4 decimals, boxes to 2."""
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

    def predict(self, image: Tensor, score_threshold: float) -> Prediction:
        """Detections on one image.

        Args:
            image: uint8 RGB [3, H, W] of any size.
            score_threshold: lowest score of a detection.
        """
        resized = eval_transform(self.detector.image_size)({"image": tv_tensors.Image(image)})["image"]
        images = resized[None].to(self.device)
        observation = self.detector.observe(images)
        choices = greedy_by(self.policy)(observation.input, ())
        settings = replace(self.settings, score_threshold=score_threshold)
        found = detect(self.detector, images, choices, settings, observation.stem)
        height, width = image.shape[1:]
        scale = torch.tensor([width, height, width, height]) / self.detector.image_size
        return Prediction(
            [self.detector.choice_names[choice] for choice in choices[0].tolist()],
            self.costs.gbitops(choices).item(),
            self.policy_gbitops,
            found.boxes_xyxy[0].cpu() * scale,
            found.scores[0].cpu(),
            found.labels[0].cpu(),
        )
