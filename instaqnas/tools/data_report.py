"""The objects that an experiment trains and evaluates on, by class and by size, and how default boxes fit them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from instaqnas.config.ranges import BoxSizes, as_json
from instaqnas.detector.box_sizes import (
    SizeCoverage,
    best_ious,
    class_coverage,
    coverage_by_size,
    fitting_box_sizes,
)
from instaqnas.detector.default_boxes import MATCH_IOU, default_boxes
from instaqnas.detector.ssd import DetectorBits
from instaqnas.experiment.checks import (
    LEAST_COVERAGE,
    data_warnings,
    evaluated_objects,
    oversized_boxes,
    training_objects,
)
from instaqnas.experiment.data_checks import count_classes
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import RUN_STAGES

LEAST_GAIN = 0.02  # of coverage, by sizes that are worth a line
MOST_CLASSES = 24  # named for each split


@dataclass(frozen=True)
class Coverage:
    """Shares of the objects to train on that have a default box at IoU 0.5 or more, from 0 to 1.

    `of_objects` is that of all objects, `of_classes` the mean over the classes that have objects.
    """

    of_objects: float
    of_classes: float

    def __str__(self) -> str:
        return f"{self.of_objects:.0%} (mean over classes {self.of_classes:.0%})"


@dataclass(frozen=True)
class BoxSuggestion:
    """Sizes for `detector.box_sizes`, and the coverage that they reach."""

    box_sizes: list[BoxSizes]
    coverage: Coverage


@dataclass(frozen=True)
class DataReport:
    """Contents of the splits at the network's size.

    Args:
        image_size: side of the network's input in pixels.
        empty_images: images of the train split without an object to train on.
        classes: number of objects of each class by split: those to train on, or those that count in an evaluation.
        sizes: objects to train on by size.
        coverage: by the default boxes of the config.
        suggestion: better sizes, where the coverage is low and better ones were found.
        warnings: one line each.
    """

    image_size: int
    empty_images: int
    classes: dict[str, dict[str, int]]
    sizes: list[SizeCoverage]
    coverage: Coverage
    suggestion: BoxSuggestion | None
    warnings: list[str]

    def plain(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**asdict(self), "sizes": [row._asdict() for row in self.sizes]}


def data_report(experiment: Experiment) -> DataReport:
    """The report of all splits that a run reads.

    Raises: InputError if a split has nothing to train on, or its boxes look like fractions of the image.
    """
    warnings = data_warnings(experiment, RUN_STAGES) + oversized_boxes(experiment.config)
    objects, size = training_objects(experiment), experiment.config.detector.image_size
    boxes_xyxy, labels = torch.from_numpy(objects.boxes_xyxy), torch.from_numpy(objects.labels)
    detector = experiment.detector(DetectorBits.full_precision())
    maps, current = detector.map_sizes(), experiment.config.detector.box_sizes

    def best_iou(sizes: Sequence[BoxSizes] | None) -> Tensor:
        return best_ious(default_boxes(size, maps, sizes), boxes_xyxy / size)

    best = best_iou(current)
    coverage, suggestion = _coverage(best, labels), None
    if coverage.of_classes < LEAST_COVERAGE:
        sizes = fitting_box_sizes(boxes_xyxy, labels, size, maps, current)
        reached = _coverage(best_iou(sizes), labels)
        if reached.of_classes >= coverage.of_classes + LEAST_GAIN:
            suggestion = BoxSuggestion(sizes, reached)
        warnings.append(_box_warning(coverage, suggestion))
    evaluated = evaluated_objects(experiment, RUN_STAGES)
    labels_of = {objects.split: objects.labels, **{split.split: split.counted_labels for split in evaluated}}
    return DataReport(
        size,
        objects.empty_images,
        {split: count_classes(labels, experiment.class_names) for split, labels in labels_of.items()},
        coverage_by_size(best, boxes_xyxy),
        coverage,
        suggestion,
        warnings,
    )


def format_data_report(report: DataReport) -> str:
    """Lines for the terminal, without the warnings."""
    lines = [f"{split}: {_format_classes(counts)}" for split, counts in report.classes.items()]
    lines.append(f"images without an object to train on: {report.empty_images:,}")
    lines.append(f"{f'side at {report.image_size} pixels':<20}{'objects':>10}{'with a default box at IoU 0.5':>32}")
    for row in report.sizes:
        side = f"{row.lower:g} to {row.upper:g}" if math.isfinite(row.upper) else f"{row.lower:g} and more"
        share = f"{row.covered / row.objects:.0%}" if row.objects else ""
        lines.append(f"{side:<20}{row.objects:>10,}{share:>32}")
    objects = sum(row.objects for row in report.sizes)
    return "\n".join([*lines, f"{'all':<20}{objects:>10,}{str(report.coverage):>32}"])


def _coverage(best_iou: Tensor, labels: Tensor) -> Coverage:
    return Coverage((best_iou >= MATCH_IOU).double().mean().item(), class_coverage(best_iou, labels))


def _box_warning(coverage: Coverage, suggestion: BoxSuggestion | None) -> str:
    text = f"default boxes: {coverage} of the objects to train on have one at IoU 0.5 or more; "
    if suggestion is None:
        return f"{text}no detector.box_sizes were found that reach more, a larger detector.image_size may"
    return f"{text}detector.box_sizes: {as_json(suggestion.box_sizes)} would reach {suggestion.coverage}"


def _format_classes(counts: dict[str, int]) -> str:
    """Such as `cat 1,200, dog 30`; of many classes the rarest."""
    shown, more = list(counts), ""
    if len(counts) > MOST_CLASSES:
        shown = sorted(counts, key=lambda name: counts[name])[:MOST_CLASSES]
        more = f" (the rarest of {len(counts)} classes)"
    return ", ".join(f"{name} {counts[name]:,}" for name in shown) + more
