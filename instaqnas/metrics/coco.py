"""COCO average precision of `DetectionRecords`, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from instaqnas.metrics.voc import DetectionRecords, RecordBatch

MAX_DETECTIONS = 100  # per image and class, as in COCO's AP


def coco_ap(records: DetectionRecords) -> float:
    """AP averaged over the IoU thresholds 0.50, 0.55, ..., 0.95 and the classes, all areas, in [0, 1].

    0.0 if nothing is detected, NaN if no object counts. A difficult object is a "crowd" of COCO: it need not be found,
    and detections matched with it do not count. COCO divides the overlap with a crowd by the area of the detection
    alone, so all detections inside a difficult object are ignored, which is more lenient than VOC.
    """
    labels: set[int] = set()
    for batch in records.batches:
        labels.update(batch.gt_labels[batch.gt_labels > 0].tolist())  # 0 is padding
    images = [{"id": i, "file_name": image_id} for i, image_id in enumerate(records.image_ids, start=1)]
    categories = [{"id": label} for label in sorted(labels)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _make_coco(images, categories, coco_objects(records)),
            _make_coco(images, categories, coco_detections(records)),
            iouType="bbox",
        )
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    precision = precision[precision > -1]  # -1: a class without objects
    return float(precision.mean()) if precision.size else math.nan


def _make_coco(images: list[dict], categories: list[dict], annotations: Iterable[dict]) -> COCO:
    coco = COCO()
    # pycocotools takes 0 for "no match", so ids count from 1.
    numbered = [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)]
    coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
    coco.createIndex()
    return coco


def coco_objects(records: DetectionRecords, scales: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """COCO's dictionary of each object, without its id; difficult objects are crowds.

    Args:
        records: images are numbered from 1, in their order; category k is label k.
        scales: what x and y of the boxes of each image are multiplied by, [N, 2]; None for 1.
    """
    for first_image, batch in _numbered_batches(records):
        crowds = batch.gt_difficult.int()
        for annotation, crowd in _annotations(first_image, batch.gt_boxes_xyxy, batch.gt_labels, crowds, scales):
            yield {**annotation, "iscrowd": crowd}


def coco_detections(records: DetectionRecords, scales: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """COCO's dictionary of each detection, without an id; arguments as of `coco_objects`."""
    for first_image, batch in _numbered_batches(records):
        found = _annotations(first_image, batch.det_boxes_xyxy, batch.det_labels, batch.det_scores, scales)
        for annotation, score in found:
            yield {**annotation, "score": score}


def _numbered_batches(records: DetectionRecords) -> Iterator[tuple[int, RecordBatch]]:
    """Each batch with the number of its first image, from 1."""
    first_image = 1
    for batch in records.batches:
        yield first_image, batch
        first_image += len(batch.gt_labels)


def _annotations(
    first_image: int, boxes_xyxy: Tensor, labels: Tensor, extra: Tensor, scales: Tensor | None
) -> Iterator[tuple[dict[str, Any], float]]:
    """COCO's dict of each box except padding, with the box's value of `extra` [B, N]."""
    valid = labels > 0
    images = valid.nonzero()[:, 0] + first_image
    boxes_xyxy = boxes_xyxy[valid].double()
    if scales is not None:
        boxes_xyxy = boxes_xyxy * scales[images - 1].repeat(1, 2)
    rows = zip(images.tolist(), labels[valid].tolist(), boxes_xyxy.tolist(), extra[valid].tolist(), strict=True)
    for image, label, (x1, y1, x2, y2), value in rows:
        width, height = x2 - x1, y2 - y1
        box = [x1, y1, width, height]
        yield {"image_id": image, "category_id": label, "bbox": box, "area": width * height}, value
