"""Evaluation of a detector under any way to choose bits: mAP, cost, and a table of every image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap, zip_longest
from operator import attrgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instaqnas.config import EvalConfig
from instaqnas.data.loader import Batch
from instaqnas.detector.postprocess import Detections, postprocess
from instaqnas.detector.ssd import SSDOutput, SwitchableSSD
from instaqnas.metrics.coco import coco_ap
from instaqnas.metrics.image_quality import QualityKind, image_quality
from instaqnas.metrics.voc import DetectionRecords, RecordBatch, voc_map
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.quantizers import Affine
from instaqnas.training import distributed

RewardQuality = QualityKind | Literal["loss"]


@dataclass(frozen=True)
class ImageRow:
    """One image: its bit configuration, GBitOps of the detector, quality, counts, and what may make it hard.

    quality: 0 to 1, or the negative loss.
    detections: those that a quality from 0 to 1 counts.
    smallest_side: shortest side of any object, in pixels of the network's input; NaN without objects.
    difficulty: from the data set; NaN where it is not known.
    """

    image_id: str
    choices: list[int]
    gbitops: float
    quality: float
    objects: int
    detections: int
    smallest_side: float
    difficulty: float


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


class MeasuredImage(NamedTuple):
    """An image: its place in the dataset, its row, and what was detected, the fields of a `RecordBatch` without B."""

    index: int
    row: ImageRow
    record: tuple[Tensor, ...]


class Measured(NamedTuple):
    """A batch, or a process's share of it: places of the images in the dataset, their rows, and what was detected."""

    indices: Sequence[int]
    rows: Sequence[ImageRow]
    records: RecordBatch

    @classmethod
    def of(cls, images: Sequence[MeasuredImage]) -> Measured:
        """The batch of one or more images."""
        indices, rows, records = zip(*images, strict=True)
        columns = (pad_sequence(column, batch_first=True) for column in zip(*records, strict=True))
        return cls(indices, rows, RecordBatch(*columns))

    def images(self) -> list[MeasuredImage]:
        """Its images one by one, their tensors padded as they were."""
        records = zip(*self.records, strict=True)
        return list(starmap(MeasuredImage, zip(self.indices, self.rows, records, strict=True)))


def detections_of(detector: SwitchableSSD, output: SSDOutput, settings: EvalConfig) -> Detections:
    """Detections in what `detector` has put out."""
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
    """Detections of RGB images [B, 3, S, S], 0 to 255, under bit configurations [B, L]; `detector` is in eval mode.

    `stem` is what `detector.look` has made of the images, if a policy has looked.
    """
    return detections_of(detector, detector(images, choices, stem), settings)


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


def negative_loss(detector: SwitchableSSD, output: SSDOutput, batch: Batch) -> Tensor:
    """Quality [B] of the outputs for a batch: minus the multibox loss of each image alone, a sum over its objects.

    At most 0, with no lower end. An image without objects has 0 whatever is detected, and difficult objects count like
    all others: so the detector is trained.
    """
    return -detector.image_losses(output, batch.boxes_xyxy, batch.labels)


@torch.no_grad()
def measure(
    detector: SwitchableSSD,
    batches: Iterable[Batch],
    choose_bits: ChooseBits,
    *,
    costs: CostTable,
    settings: EvalConfig,
    quality: RewardQuality,
    quality_threshold: float,
    difficulties: Sequence[float],
    device: torch.device,
) -> list[Measured]:
    """Runs every image once; batch by batch, this process's shares.

    Args:
        batches: evaluation batches, on the CPU: this process's shares of them.
        choose_bits: bit configurations of a batch's images.
        costs: GBitOps of the detector's configurations.
        quality, quality_threshold: the quality of the per-image table, and the lowest score it counts.
        difficulties: of the images of the dataset; NaN where it is not known.
    """
    was_training = detector.training
    detector.eval()
    share = []
    for batch in batches:
        batch = batch.to(device)
        look = detector.look(batch.images)
        choices = choose_bits(look.seen, batch.keys)
        output = detector(batch.images, choices, look.stem)
        found = detections_of(detector, output, settings)
        boxes = (found.boxes_xyxy, found.scores, found.labels, batch.boxes_xyxy, batch.labels, batch.difficult)
        columns = (
            choices,
            costs.gbitops(choices),
            negative_loss(detector, output, batch)
            if quality == "loss"
            else quality_of(found, batch, quality, quality_threshold),
            batch.objects,
            ((found.labels > 0) & (found.scores >= quality_threshold)).sum(1),
            batch.smallest_side,
        )
        indices = [key.index for key in batch.keys]
        hard = [difficulties[index] for index in indices]
        rows = list(map(ImageRow, batch.image_ids, *(column.tolist() for column in columns), hard))
        share.append(Measured(indices, rows, RecordBatch(*(t.cpu() for t in boxes))))
    detector.train(was_training)
    return share


def report_of_all(share: list[Measured], policy_gbitops: float, class_names: tuple[str, ...]) -> EvalReport:
    """The report on the images of all processes, from each one's share; all get it.

    Args:
        share: what `measure` returns.
        policy_gbitops: GBitOps that choosing costs an image; 0 where nothing is computed for it.
        class_names: without the background.
    """
    shares = distributed.gathered(share)
    report = None if shares is None else _report(_joined(shares), policy_gbitops, class_names)
    return distributed.from_writer(report)


def _joined(shares: Sequence[list[Measured]]) -> list[Measured]:
    """The batches that processes have measured their shares of, with the images in the order of the dataset."""
    if len(shares) == 1:
        return shares[0]
    batches = zip_longest(*shares)  # the last batch may not do for all processes
    return [
        Measured.of(sorted((image for part in parts if part for image in part.images()), key=attrgetter("index")))
        for parts in batches
    ]


def records_of(batches: Sequence[Measured]) -> DetectionRecords:
    """What mAP is computed from."""
    records = DetectionRecords()
    for batch in batches:
        records.add([row.image_id for row in batch.rows], *batch.records)
    return records


def _report(batches: Sequence[Measured], policy_gbitops: float, class_names: tuple[str, ...]) -> EvalReport:
    records, rows = records_of(batches), [row for batch in batches for row in batch.rows]
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
