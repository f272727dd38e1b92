"""Figures of a split: costly ones on demand, and difficult objects left out of the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import instaqnas.evaluation.measure as measure_module
from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import DetectorBits
from instaqnas.evaluation.inference import negative_loss
from instaqnas.evaluation.measure import evaluate
from instaqnas.experiment.parts import Experiment
from instaqnas.seeds import SampleKey


@pytest.fixture
def experiment(make_command, tmp_path: Path) -> Experiment:
    return Experiment(make_command("eval", tmp_path).config)


def test_coco_ap_is_computed_only_when_it_is_asked_for(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr(measure_module, "coco_ap", lambda records: computed.append(records) or 0.25)
    detector = experiment.detector(DetectorBits.full_precision())
    report = evaluate(experiment, detector, experiment.test_loader(), experiment.choose_fixed(detector))
    assert 0 <= report.map_11pt <= 1
    assert computed == []
    assert (report.coco_ap, report.coco_ap) == (0.25, 0.25)
    assert len(computed) == 1


def test_the_loss_of_an_image_leaves_difficult_objects_out(experiment: Experiment) -> None:
    detector = experiment.detector(DetectorBits.full_precision()).eval()
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[4.0, 4, 30, 30], [20, 20, 60, 60]]])

    def loss(labels: list[int], difficult: list[bool]) -> float:
        batch = Batch(images, boxes, torch.tensor([labels]), torch.tensor([difficult]), ["a"], [SampleKey(0, 0)])
        with torch.no_grad():
            output = detector(images, experiment.choose_fixed(detector)(images, ()))
        return -negative_loss(detector, output, batch).item()

    both, one = loss([1, 2], [False, False]), loss([1, 0], [False, False])
    assert loss([1, 2], [False, True]) == one < both
