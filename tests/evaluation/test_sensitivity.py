"""The loss that sensitivities are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import instaqnas.evaluation.sensitivity as sensitivity
from instaqnas.checkpoint import load_checkpoint
from instaqnas.evaluation.sensitivity import ANY, mean_loss_on
from instaqnas.experiment.parts import Experiment
from instaqnas.policy.bit_config import fixed


@torch.no_grad()
@pytest.mark.parametrize("images", [3, 4, 6])
def test_mean_loss_is_the_mean_over_the_first_images_whatever_their_batches(
    finished_run: Path, make_command, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    monkeypatch.setattr(sensitivity, "MOST_IMAGES", images)  # batches have four
    experiment = Experiment(make_command("search", finished_run, "--data.val_split=").config)
    detector = experiment.quantized_detector().eval()
    detector.load_state_dict(load_checkpoint(finished_run / "search" / "last.pt")["networks"]["detector"])
    drawn = fixed([2, 1, 0] * 4 + [0])  # as good as random here
    mean_loss = mean_loss_on(detector, experiment.tuning_loader(), drawn, experiment.device)
    configuration, asked = [0, 1, 2] * 4 + [0], [0, ANY, 2] * 4 + [ANY]
    batches = list(experiment.tuning_loader())
    losses = []
    for batch in batches:
        for index in range(4):
            if batch.keys[index].index >= images:
                continue
            output = detector(batch.images[index : index + 1], torch.tensor([configuration], device=experiment.device))
            own = detector.loss(output, batch.boxes_xyxy[index : index + 1], batch.labels[index : index + 1])
            positives = detector.targets(batch.boxes_xyxy[index : index + 1], batch.labels[index : index + 1]).positives
            losses.append(sum(own.values()).item() * positives.item())
    assert len(losses) == images
    assert mean_loss(asked) == mean_loss(configuration) == pytest.approx(sum(losses) / images, rel=1e-5)
