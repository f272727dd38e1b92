"""Evaluation of a detector under any way to choose bits: mAP, cost, and a table of every image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from instaqnas.config import EvalConfig
from instaqnas.data.loader import Batch
from instaqnas.detector.postprocess import Detections, postprocess
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.metrics.coco import coco_ap
from instaqnas.metrics.image_quality import QualityKind, image_quality
from instaqnas.metrics.voc import DetectionRecords, voc_map
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.bitops import CostTable


@dataclass(frozen=True)
class ImageRow:
    """One image: its bit configuration, GBitOps of the detector, quality (0 to 1), and counts.

    `detections` counts those that the quality counts.
    """

    image_id: str
    choices: list[int]
    gbitops: float
    quality: float
    objects: int
    detections: int


@dataclass(frozen=True)
class EvalReport:
    """Figures of one evaluation; mAP and AP in 0 to 1 at IoU 0.5, costs are means over images."""

    map_11pt: float
    map_all_point: float
    coco_ap: float
    ap_11pt: dict[str, float]
    gbitops_detector: float
    gbitops_policy: float
    distinct_configs: int
    images: int
    per_image: list[ImageRow]

    @property
    def gbitops_total(self) -> float:
        """Detector and policy."""
        return self.gbitops_detector + self.gbitops_policy


@torch.no_grad()
def detect(detector: SwitchableSSD, images: Tensor, choices: Tensor, settings: EvalConfig) -> Detections:
    """Detections of RGB images [B, 3, S, S], 0 to 255, under bit configurations [B, L]; `detector` is in eval mode."""
    output = detector(images, choices)
    return postprocess(
        output.box_offsets,
        output.class_logits,
        detector.default_boxes_cxcywh,
        detector.image_size,
        score_threshold=settings.score_threshold,
        nms_iou=settings.nms_iou,
        candidates_per_class=settings.candidates_per_class,
        max_detections=settings.max_detections,
    )


def quality_of(detections: Detections, batch: Batch, kind: QualityKind, score_threshold: float) -> Tensor:
    """Quality [B] of a batch's detections, in 0 to 1."""
    return image_quality(
        kind,
        detections.boxes_xyxy,
        detections.scores,
        detections.labels,
        batch.boxes_xyxy,
        batch.labels,
        batch.difficult,
        score_threshold,
    )


def evaluate(
    detector: SwitchableSSD,
    batches: Iterable[Batch],
    choose_bits: ChooseBits,
    *,
    costs: CostTable,
    policy_gbitops: float,
    class_names: tuple[str, ...],
    settings: EvalConfig,
    quality: QualityKind,
    quality_threshold: float,
    device: torch.device,
) -> EvalReport:
    """Runs every image once and measures.

    Args:
        batches: evaluation batches, on the CPU.
        choose_bits: bit configurations of a batch's images.
        costs: GBitOps of the detector's configurations.
        policy_gbitops: GBitOps that choosing costs an image; 0 where nothing is computed for it.
        class_names: without the background.
        quality, quality_threshold: the quality of the per-image table, and the lowest score it counts.
    """
    was_training = detector.training
    detector.eval()
    records, rows = DetectionRecords(), []
    for batch in batches:
        batch = batch.to(device)
        choices = choose_bits(batch.images)
        found = detect(detector, batch.images, choices, settings)
        records.add(
            batch.image_ids,
            found.boxes_xyxy,
            found.scores,
            found.labels,
            batch.boxes_xyxy,
            batch.labels,
            batch.difficult,
        )
        columns = (
            choices,
            costs.gbitops(choices),
            quality_of(found, batch, quality, quality_threshold),
            (batch.labels > 0).sum(1),
            ((found.labels > 0) & (found.scores >= quality_threshold)).sum(1),
        )
        rows += map(ImageRow, batch.image_ids, *(column.tolist() for column in columns))
    detector.train(was_training)
    result = voc_map(records, class_names)
    return EvalReport(
        map_11pt=result.map_11pt,
        map_all_point=result.map_all_point,
        coco_ap=coco_ap(records),
        ap_11pt=result.ap_11pt,
        gbitops_detector=sum(row.gbitops for row in rows) / len(rows),
        gbitops_policy=policy_gbitops,
        distinct_configs=len({tuple(row.choices) for row in rows}),
        images=len(rows),
        per_image=rows,
    )
