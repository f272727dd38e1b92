"""What a policy does on a split: order and contents of a survey, and its figures worked out by hand."""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instaqnas.data.loader import DetectionDataset, DetectionLoader, make_loader
from instaqnas.data.shapes import generate_shapes
from instaqnas.data.transforms import eval_transform
from instaqnas.data.voc import read_class_names, read_split
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.evaluation.survey import Survey, diagnose, survey
from instaqnas.quant.bitops import CostTable, LayerCost

COSTS = CostTable(
    [LayerCost(name, macs, 0, 0, ((2, 2), (4, 4))) for name, macs in (("a", 10**9), ("b", 10**8))],
    {"a": ["a"], "b": ["b"]},
)


class Brightness(nn.Module):
    """Logits from the mean of the input; records whether it was in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[bool] = set()

    def forward(self, observed: Tensor) -> Tensor:
        self.modes.add(self.training)
        return observed.float().mean((1, 2, 3))[:, None, None] * torch.tensor([[1.0, 2], [3, 4]])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survey") / "shapes"
    generate_shapes(root, {"train": 7}, image_size=64)
    return root


def loader_of(root: Path, workers: int = 0) -> DetectionLoader:
    dataset = DetectionDataset(read_split([root], "train", read_class_names([root])), eval_transform(64))
    return make_loader(dataset, 3, shuffle=False, seed=0, workers=workers)


def untrained(image_size: int = 64) -> SwitchableSSD:
    return SwitchableSSD(9, DetectorBits.full_precision(), image_size=image_size, width=0.125)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_survey_sees_every_image_once_in_order_and_in_evaluation(shapes: Path, workers: int) -> None:
    policy, loader = Brightness().train(), loader_of(shapes, workers)
    found = survey(policy, untrained(), loader, torch.device("cpu"))
    assert policy.modes == {False}
    assert policy.training
    images = torch.cat([batch.images for batch in loader]).float()
    assert found.logits[:, 0, 0].tolist() == pytest.approx(images.mean((1, 2, 3)).tolist())
    with (shapes / "difficulty.csv").open(newline="") as file:
        assert found.difficulty.tolist() == [float(row["difficulty"]) for row in csv.DictReader(file)]
    annotations = loader.dataset.annotations
    assert found.objects.tolist() == [len(annotation.labels) for annotation in annotations]
    sides = [(a.boxes_xyxy[:, 2:] - a.boxes_xyxy[:, :2]).min().item() for a in annotations]  # 64 pixels as they are
    assert found.smallest_side.tolist() == pytest.approx(sides)


def test_a_survey_shows_the_frozen_stem(shapes: Path) -> None:
    detector = untrained()
    detector.freeze_stem()
    found = survey(Brightness(), detector, loader_of(shapes), torch.device("cpu"))
    images = torch.cat([batch.images for batch in loader_of(shapes)])
    expected = detector.observe(images).input.mean((1, 2, 3))
    assert found.logits[:, 0, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


# Two choices at two positions; costs by hand: 4 or 16 for a, 0.4 or 1.6 for b.
LOGITS = torch.tensor([[[9.0, 0], [9, 0]], [[9, 0], [0, 9]], [[0, 9], [9, 0]], [[0, 9], [0, 9]]])
FOUND = Survey(
    LOGITS,
    difficulty=torch.tensor([0.1, 0.2, 0.3, 0.4]).double(),
    objects=torch.tensor([2, 3, 1, 0]).double(),
    smallest_side=torch.tensor([9, 5, 5, math.nan]).double(),
)


def test_figures_by_hand() -> None:
    result = diagnose(FOUND, COSTS, policy_gbitops=0.5, target_gbitops=10.0)
    unsure = -sum(p * math.log(p) for p in (1 / (1 + math.exp(-9)), 1 / (1 + math.exp(9))))
    assert result.entropy == pytest.approx([unsure, unsure])
    assert result.mutual_information == pytest.approx([math.log(2) - unsure] * 2)
    assert result.frequencies == [[0.5, 0.5], [0.5, 0.5]]
    assert result.modal == [0, 0]
    assert (result.images, result.distinct) == (4, 4)
    assert result.gbitops == pytest.approx((4.4 + 5.6 + 16.4 + 17.6) / 4 + 0.5)
    assert result.cost_to_target == pytest.approx(1.15)
    # GBitOps have the ranks 1 2 3 4; objects 3 4 2 1, so d^2 is 4 + 4 + 1 + 9; sides, negated, 1 2.5 2.5 of three
    assert result.rank_correlation["difficulty"] == pytest.approx(1)
    assert result.rank_correlation["objects"] == pytest.approx(1 - 6 * 18 / (4 * 15))
    assert result.rank_correlation["smallest_side"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))


def test_what_is_not_known_is_left_out_of_the_scalars_and_null_in_the_report() -> None:
    unknown = replace(FOUND, difficulty=torch.full((4,), math.nan).double())
    result = diagnose(unknown, COSTS, policy_gbitops=0.5, target_gbitops=None)
    assert set(result.scalars()) == {
        "entropy",
        "mutual_information",
        "distinct_configs",
        "gbitops",
        "rank_correlation_objects",
        "rank_correlation_smallest_side",
    }
    assert math.isnan(result.plain()["rank_correlation"]["difficulty"])
    assert math.isnan(result.plain()["cost_to_target"])
    assert result.plain()["target_gbitops"] is None
    assert set(result.position_scalars()) == {
        f"{name}/position_{place}" for name in ("entropy", "mutual_information") for place in ("00", "01")
    }


@pytest.mark.parametrize(("images", "collapsed"), [([0, 0, 0], True), ([0, 1], False), ([2], False)])
def test_a_collapsed_policy_is_one_plain_line(
    caplog: pytest.LogCaptureFixture, images: list[int], collapsed: bool
) -> None:
    part = Survey(*(column[images] for column in (LOGITS, FOUND.difficulty, FOUND.objects, FOUND.smallest_side)))
    with caplog.at_level(logging.INFO):
        diagnose(part, COSTS, policy_gbitops=0.0, target_gbitops=None).log_collapse("the test split")
    lines = ["collapsed policy: one configuration for all 3 images of the test split"] if collapsed else []
    assert [record.getMessage() for record in caplog.records] == lines
