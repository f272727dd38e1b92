"""COCO average precision of `DetectionRecords`, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator

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
    images = [{"id": i, "file_name": image_id} for i, image_id in enumerate(records.image_ids)]
    categories = [{"id": label} for label in sorted(labels)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _make_coco(images, categories, _objects(records)),
            _make_coco(images, categories, _detections(records)),
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


def _objects(records: DetectionRecords) -> Iterator[dict]:
    for first_image, batch in _numbered_batches(records):
        crowds = batch.gt_difficult.int()
        for annotation, crowd in _annotations(first_image, batch.gt_boxes_xyxy, batch.gt_labels, crowds):
            yield {**annotation, "iscrowd": crowd}


def _detections(records: DetectionRecords) -> Iterator[dict]:
    for first_image, batch in _numbered_batches(records):
        for annotation, score in _annotations(first_image, batch.det_boxes_xyxy, batch.det_labels, batch.det_scores):
            yield {**annotation, "score": score}


def _numbered_batches(records: DetectionRecords) -> Iterator[tuple[int, RecordBatch]]:
    """Each batch with the number of its first image."""
    first_image = 0
    for batch in records.batches:
        yield first_image, batch
        first_image += len(batch.gt_labels)


def _annotations(first_image: int, boxes_xyxy: Tensor, labels: Tensor, extra: Tensor) -> Iterator[tuple[dict, float]]:
    """COCO's dict of each box except padding, with the box's value of `extra` [B, N]."""
    valid = labels > 0
    images = valid.nonzero()[:, 0] + first_image
    rows = zip(
        images.tolist(), labels[valid].tolist(), boxes_xyxy[valid].double().tolist(), extra[valid].tolist(), strict=True
    )
    for image, label, (x1, y1, x2, y2), value in rows:
        width, height = x2 - x1, y2 - y1
        box = [x1, y1, width, height]
        yield {"image_id": image, "category_id": label, "bbox": box, "area": width * height}, value
