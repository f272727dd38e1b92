"""From raw outputs to detections, batched over images and classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from instaqnas.detector.default_boxes import decode


@dataclass(frozen=True)
class Detections:
    """Detections of B images, by descending score, padded to the largest number of any image.

    boxes_xyxy: [B, D, 4] in pixels of the network's input.
    scores: [B, D] in (0, 1], 0 for padding.
    labels: [B, D], 0 for padding.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor


@torch.no_grad()
def postprocess(
    box_offsets: Tensor,
    class_logits: Tensor,
    defaults_cxcywh: Tensor,
    image_size: int,
    *,
    score_threshold: float,
    nms_iou: float,
    candidates_per_class: int,
    max_detections: int,
) -> Detections:
    """Decodes boxes, drops low scores, and suppresses overlapping boxes of the same class (NMS).

    Args:
        box_offsets: [B, P, 4].
        class_logits: [B, P, C], class 0 is background.
        defaults_cxcywh: [P, 4] in units of the image side.
        image_size: side of the network's input in pixels.
        score_threshold: lowest score that is kept.
        nms_iou: highest IoU that two kept boxes of one class may have.
        candidates_per_class: boxes per class and image that enter NMS, the best by score.
        max_detections: detections kept per image.
    """
    images, _, classes = class_logits.shape
    boxes = clip_boxes_to_image(decode(box_offsets.float(), defaults_cxcywh) * image_size, (image_size, image_size))
    scores = class_logits.float().softmax(-1)[..., 1:].transpose(1, 2)  # [B, C-1, P]
    scores, candidates = scores.topk(min(candidates_per_class, scores.shape[2]), dim=2)
    image, label, rank = (scores >= score_threshold).nonzero(as_tuple=True)
    boxes, scores = boxes[image, candidates[image, label, rank]], scores[image, label, rank]
    # In double precision, because batched_nms may separate its groups by offsets too large for single precision.
    kept = batched_nms(boxes.double(), scores.double(), image * classes + label, nms_iou)  # by score
    kept = kept[image[kept].argsort(stable=True)]  # by image, then by score
    image, label, boxes, scores = image[kept], label[kept] + 1, boxes[kept], scores[kept]
    per_image = torch.bincount(image, minlength=images)
    place = torch.arange(len(kept), device=image.device) - (per_image.cumsum(0) - per_image)[image]
    shape = (images, min(max_detections, int(per_image.max()) if len(kept) else 0))
    fits = place < shape[1]
    slot = (image[fits], place[fits])
    padded = Detections(boxes.new_zeros(*shape, 4), scores.new_zeros(shape), label.new_zeros(shape))
    padded.boxes_xyxy[slot], padded.scores[slot], padded.labels[slot] = boxes[fits], scores[fits], label[fits]
    return padded
