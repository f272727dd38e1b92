"""Figures that a report adds up from its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from instaqnas.evaluation.measure import EvalReport
from instaqnas.evaluation.report import ReportRow, format_classes, routing_efficacy
from instaqnas.metrics.voc import DetectionRecords


def row(bits: str, quality: float, gbitops: float = 1.0, checkpoint: str = "finetune/best.pt") -> ReportRow:
    figures = EvalReport(quality, quality, {}, gbitops, 0.0, 1, 1, [], DetectionRecords())
    return ReportRow(bits, Path(checkpoint), (), figures)


def test_routing_efficacy_is_the_share_of_the_way_from_chance_to_all_bits() -> None:
    levels = [row("uniform:level0", 0.1, 1.0), row("uniform:level1", 0.8, 4.0)]
    assert routing_efficacy([*levels, row("shuffled", 0.3), row("policy", 0.7)]) == pytest.approx(0.8)
    assert routing_efficacy([*levels, row("shuffled", 0.3), row("policy", 0.3)]) == 0.0


def test_there_is_no_routing_efficacy_without_its_rows_on_the_detector_of_the_policy() -> None:
    rows = [row("shuffled", 0.3), row("policy", 0.7)]
    assert routing_efficacy(rows) is None
    assert routing_efficacy([*rows, row("uniform:w3a3", 0.8, checkpoint="pretrain_quant/best.pt")]) is None
    assert routing_efficacy([*rows, row("uniform:w3a3", 0.2)]) is None  # more bits are no better than chance
    assert routing_efficacy([row("policy", 0.7), row("uniform:w3a3", 0.8)]) is None


def test_ap_of_classes_is_in_percent_lowest_first_without_classes_that_have_no_objects() -> None:
    classes = {"ring": 0.501, "disc": float("nan"), "star": 0.25, "cross": None}
    text = format_classes({"bits": "policy", "ap_11pt": classes})
    assert text == "AP of policy, 11 points, %: star 25.0, ring 50.1"
