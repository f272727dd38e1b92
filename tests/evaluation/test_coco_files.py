"""COCO files of an evaluation: pycocotools reads them, and finds the AP of report.json."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instaqnas.data.voc import Annotation
from instaqnas.evaluation.coco_files import write_detections, write_ground_truth
from instaqnas.metrics.coco import coco_ap
from instaqnas.metrics.voc import DetectionRecords

CLASSES = ("cup", "jug", "pan")
SIDE = 64  # of the network's input
SIZES = ((640, 128), (100, 333), (64, 64))  # width and height of the image files


def ap_of_files(folder: Path, bits: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "ground_truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / f"detections_{bits}.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


@pytest.fixture
def records() -> DetectionRecords:
    """Three images with objects near detections; one object is difficult, one class has no object."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 4, 2, generator=generator) * 30
    objects = torch.cat([corners, corners + 10 + 20 * torch.rand(3, 4, 2, generator=generator)], dim=2)
    labels = torch.tensor([[1, 2, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    difficult = torch.tensor([[False, False, True, False], [False] * 4, [False] * 4])
    moved = objects.repeat(1, 2, 1) + torch.randn(3, 8, 4, generator=generator)
    records = DetectionRecords()
    found = torch.cat([labels, torch.tensor([[3, 1, 2, 0]] * 3)], dim=1)
    records.add(["a", "b", "c"], moved, torch.rand(3, 8, generator=generator), found, objects, labels, difficult)
    return records


@pytest.fixture
def folder(records: DetectionRecords, tmp_path: Path) -> Path:
    annotations = [
        Annotation(image_id, tmp_path / "images" / f"{image_id}.jpg", *(np.zeros(0),) * 3, width=width, height=height)
        for image_id, (width, height) in zip("abc", SIZES, strict=True)
    ]
    write_ground_truth(tmp_path, records, annotations, CLASSES, SIDE)
    write_detections(tmp_path, "uniform:w3a3", records, annotations, SIDE)
    return tmp_path


def test_pycocotools_finds_the_ap_of_the_records_in_the_files(records: DetectionRecords, folder: Path) -> None:
    assert 0.1 < coco_ap(records) < 0.9
    assert ap_of_files(folder, "uniform_w3a3") == pytest.approx(coco_ap(records), abs=1e-9)


def test_boxes_are_in_pixels_of_the_image_files(records: DetectionRecords, folder: Path) -> None:
    content = json.loads((folder / "ground_truth.json").read_text())
    assert content["info"] == {"image_folder": str(folder / "images")}
    assert content["categories"] == [{"id": 1, "name": "cup"}, {"id": 2, "name": "jug"}, {"id": 3, "name": "pan"}]
    assert [tuple(image.values()) for image in content["images"]] == [
        (1, "a.jpg", 640, 128),
        (2, "b.jpg", 100, 333),
        (3, "c.jpg", 64, 64),
    ]
    first = content["annotations"][0]
    left, top, right, bottom = records.batches[0].gt_boxes_xyxy[0, 0].tolist()
    assert first["bbox"] == pytest.approx([10 * left, 2 * top, 10 * (right - left), 2 * (bottom - top)])
    assert [(box["image_id"], box["category_id"], box["iscrowd"]) for box in content["annotations"]] == [
        (1, 1, 0),
        (1, 2, 0),
        (1, 1, 1),
        (2, 2, 0),
        (2, 2, 0),
    ]


def test_every_row_of_a_comparison_has_the_ap_of_the_report(finished_run: Path) -> None:
    rows = json.loads((finished_run / "eval" / "report.json").read_text())["rows"]
    for row in rows:
        name = row["bits"].replace(":", "_")
        assert ap_of_files(finished_run / "eval", name) == pytest.approx(row["coco_ap"], abs=1e-9)
