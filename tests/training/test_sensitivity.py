"""The loss that sensitivities are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import instaqnas.training.sensitivity as sensitivity
from instaqnas.checkpoint import load_checkpoint
from instaqnas.detector.multibox_loss import multibox_loss
from instaqnas.detector.ssd import SSDOutput, Targets
from instaqnas.training.experiment import Experiment
from instaqnas.training.sensitivity import image_losses, mean_loss_on


def test_loss_of_an_image_is_that_of_a_batch_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets, logits, wanted = (torch.randn(3, 20, size, generator=generator) for size in (4, 5, 4))
    labels = torch.randint(0, 5, (3, 20), generator=generator) * (torch.rand(3, 20, generator=generator) < 0.2)
    labels[1] = 0  # nothing to find, nothing to lose
    losses = image_losses(SSDOutput(offsets, logits), Targets(wanted, labels))
    for index in range(3):
        own = multibox_loss(*(values[index : index + 1] for values in (offsets, logits, wanted, labels)))
        torch.testing.assert_close(losses[index], own["box"] + own["class"])
    assert losses[1] == 0
    assert (labels > 0).sum(1).tolist() != [0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("images", [4, 8])
def test_mean_loss_is_that_of_single_images_of_the_first_batches(
    finished_run: Path, make_command, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    monkeypatch.setattr(sensitivity, "MOST_IMAGES", images - 1)  # rounded up to a batch of four
    experiment = Experiment(make_command("search", finished_run, "--data.val_split=").config)
    detector = experiment.quantized_detector().eval()
    detector.load_state_dict(load_checkpoint(finished_run / "search" / "last.pt")["networks"]["detector"])
    mean_loss = mean_loss_on(detector, experiment.tuning_loader(), 4, experiment.device)
    configuration = [0, 1, 2] * 4 + [1]
    batches = list(experiment.tuning_loader())
    losses = []
    for batch in batches[: images // 4]:
        for index in range(4):
            output = detector(batch.images[index : index + 1], torch.tensor([configuration]))
            own = detector.loss(output, batch.boxes_xyxy[index : index + 1], batch.labels[index : index + 1])
            losses.append(sum(own.values()).item())
    assert len(losses) == images
    assert mean_loss(configuration) == pytest.approx(sum(losses) / images, rel=1e-5)
