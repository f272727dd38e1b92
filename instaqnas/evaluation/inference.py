"""Post-processing of detector outputs, and detection quality of each image."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas.bits import QualityKind
from instaqnas.config.settings import EvalConfig
from instaqnas.data.loader import Batch
from instaqnas.detector.postprocess import Detections, postprocess
from instaqnas.detector.ssd import SSDOutput, SwitchableSSD
from instaqnas.metrics.image_quality import image_quality
from instaqnas.quant.affine import Affine


def detections_of(detector: SwitchableSSD, output: SSDOutput, settings: EvalConfig) -> Detections:
    """Decodes the raw outputs of `detector` into detections, with boxes in pixels of its input."""
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


@torch.no_grad()
def detect(
    detector: SwitchableSSD, images: Tensor, choices: Tensor, settings: EvalConfig, stem: Affine | None = None
) -> Detections:
    """Detects objects in RGB images, each at its own bit configuration.

    Args:
        detector: in eval mode.
        images: [B, 3, S, S], 0 to 255.
        choices: bit configurations [B, L].
        settings: of post-processing.
        stem: output of the frozen stem for these images, if already computed for the policy.
    """
    return detections_of(detector, detector(images, choices, stem), settings)


def quality_of(detections: Detections, batch: Batch, kind: QualityKind, score_threshold: float) -> Tensor:
    """Quality [B] of the detections in each image, 0 to 1."""
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


def negative_loss(detector: SwitchableSSD, output: SSDOutput, batch: Batch) -> Tensor:
    """Minus the multibox loss of each image, summed over its objects: [B], at most 0.

    Difficult objects are left out, as in training.
    """
    return -detector.image_losses(output, batch.boxes_xyxy, batch.labels, batch.difficult)
