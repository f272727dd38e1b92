"""Runs a detector on a split under any way to choose bits: mAP, cost, and a row for every image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instaqnas import distributed
from instaqnas.bits import RewardQuality
from instaqnas.config.settings import EvalConfig
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.evaluation.inference import detections_of, negative_loss, quality_of
from instaqnas.experiment.parts import Experiment
from instaqnas.metrics.bootstrap import MatchedSplit
from instaqnas.metrics.coco import coco_ap
from instaqnas.metrics.voc import DetectionRecords, RecordBatch, voc_map
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.bitops import CostTable


@dataclass(frozen=True)
class ImageRow:
    """One image.

    Args:
        image_id: its id in the data set.
        choices: its bit configuration, L indices.
        gbitops: of the detector.
        quality: 0 to 1, or the negative loss.
        objects: number of annotated objects.
        detections: number of detections that count for a quality from 0 to 1.
        smallest_side: shortest side of any object, in pixels of the network's input; NaN without objects.
        difficulty: from the data set; NaN if unknown.
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
    """Figures of one evaluation; mAP and AP from 0 to 1 at IoU 0.5, costs as means over images."""

    map_11pt: float
    map_all_point: float
    ap_11pt: dict[str, float]
    gbitops_detector: float
    gbitops_policy: float
    distinct_configs: int
    images: int
    per_image: list[ImageRow]
    records: DetectionRecords  # with several processes, empty but on the first one

    @property
    def gbitops_total(self) -> float:
        """Mean GBitOps of detector and policy."""
        return self.gbitops_detector + self.gbitops_policy

    @property
    def false_positives_per_empty(self) -> float:
        """Mean number of counted detections in images without objects; NaN without such images.

        Detections count from the score threshold of the reward on, see `ImageRow.detections`.
        """
        counts = [row.detections for row in self.per_image if row.objects == 0]
        return sum(counts) / len(counts) if counts else math.nan

    @property
    def image_recall(self) -> float:
        """Share of images with objects that have a counted detection anywhere; NaN without such images."""
        flagged = [row.detections > 0 for row in self.per_image if row.objects]
        return sum(flagged) / len(flagged) if flagged else math.nan

    @property
    def image_false_alarms(self) -> float:
        """Share of images without objects that have a counted detection; NaN without such images."""
        flagged = [row.detections > 0 for row in self.per_image if not row.objects]
        return sum(flagged) / len(flagged) if flagged else math.nan

    @cached_property
    def matched(self) -> MatchedSplit:
        """Matched detections, for confidence intervals; empty where `records` are."""
        return MatchedSplit.of(self.records, len(self.ap_11pt))

    @cached_property
    def coco_ap(self) -> float:
        """COCO AP, 0 to 1; computed when it is asked for, since it takes far longer than mAP."""
        return coco_ap(self.records)


class MeasuredImage(NamedTuple):
    """One image: its place in the data set, its row, and its fields of a `RecordBatch` without the batch axis."""

    place: int
    row: ImageRow
    record: tuple[Tensor, ...]


class MeasuredBatch(NamedTuple):
    """A batch, or the share of it that one process has: indices in the data set, rows, and boxes of B images."""

    indices: Sequence[int]
    rows: Sequence[ImageRow]
    records: RecordBatch

    @classmethod
    def of(cls, images: Sequence[MeasuredImage]) -> MeasuredBatch:
        """The batch of at least one image."""
        columns = zip(*(image.record for image in images), strict=True)
        records = RecordBatch(*(pad_sequence(list(column), batch_first=True) for column in columns))
        return cls([image.place for image in images], [image.row for image in images], records)

    def images(self) -> list[MeasuredImage]:
        """Its images one by one, their tensors padded as in the batch."""
        records = zip(*self.records, strict=True)
        return [
            MeasuredImage(place, row, record)
            for place, row, record in zip(self.indices, self.rows, records, strict=True)
        ]


def evaluate(
    experiment: Experiment,
    detector: SwitchableSSD,
    loader: DetectionLoader,
    choose_bits: ChooseBits,
    policy_gbitops: float = 0.0,
) -> EvalReport:
    """Figures of a detector on a split; every process gets them.

    Args:
        experiment: names the quality of the rows, the settings of post-processing, and the classes.
        detector: is run in eval mode.
        loader: of the split.
        choose_bits: bit configurations of a batch's images.
        policy_gbitops: cost of choosing them, per image.
    """
    share = measure_split(experiment, detector, loader, choose_bits, experiment.config.reward.quality)
    return report_of_all(share, policy_gbitops, experiment.class_names)


def measure_split(
    experiment: Experiment,
    detector: SwitchableSSD,
    loader: DetectionLoader,
    choose_bits: ChooseBits,
    quality: RewardQuality,
) -> list[MeasuredBatch]:
    """Runs every image of a split once; returns this process's share of each batch, its rows with `quality`."""
    return measure(
        detector,
        distributed.progress_bar(loader, "evaluate"),
        choose_bits,
        costs=detector_costs(detector),
        settings=experiment.config.eval,
        quality=quality,
        quality_threshold=experiment.config.reward.score_threshold,
        difficulties=[annotation.difficulty for annotation in loader.annotations],
        device=experiment.device,
    )


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
) -> list[MeasuredBatch]:
    """Runs every image once.

    Args:
        detector: is run in eval mode and left in the mode it was in.
        batches: evaluation batches on the CPU: the shares of this process.
        choose_bits: bit configurations of a batch's images.
        costs: GBitOps of the detector's configurations.
        settings: of post-processing.
        quality: of the rows.
        quality_threshold: lowest score of a detection that counts for a quality from 0 to 1.
        difficulties: of all images of the data set; NaN if unknown.
        device: of the detector.
    """
    was_training = detector.training
    detector.eval()
    share = []
    for batch in batches:
        batch = batch.to(device)
        observation = detector.observe(batch.images)
        choices = choose_bits(observation.input, batch.keys)
        output = detector(batch.images, choices, observation.stem)
        found = detections_of(detector, output, settings)
        if quality == "loss":
            qualities = negative_loss(detector, output, batch)
        else:
            qualities = quality_of(found, batch, quality, quality_threshold)
        counted = ((found.labels > 0) & (found.scores >= quality_threshold)).sum(1)
        gbitops, indices = costs.gbitops(choices), [key.index for key in batch.keys]
        values = {
            "image_id": batch.image_ids,
            "choices": choices.tolist(),
            "gbitops": gbitops.tolist(),
            "quality": qualities.tolist(),
            "objects": batch.objects.tolist(),
            "detections": counted.tolist(),
            "smallest_side": batch.smallest_side.tolist(),
            "difficulty": [difficulties[index] for index in indices],
        }
        rows = [ImageRow(**{name: column[b] for name, column in values.items()}) for b in range(len(indices))]
        boxes = (found.boxes_xyxy, found.scores, found.labels, batch.boxes_xyxy, batch.labels, batch.difficult)
        share.append(MeasuredBatch(indices, rows, RecordBatch(*(tensor.cpu() for tensor in boxes))))
    detector.train(was_training)
    return share


def report_of_all(share: Sequence[MeasuredBatch], policy_gbitops: float, class_names: tuple[str, ...]) -> EvalReport:
    """The report on the images of all processes, from the share of each; every process gets it.

    Args:
        share: from `measure`.
        policy_gbitops: cost of choosing bits, per image.
        class_names: without the background.
    """
    shares = distributed.gathered(share)
    report = None if shares is None else _report(_joined(shares), policy_gbitops, class_names)
    if report is not None and distributed.world_size() > 1:
        # Detections stay with the writer, which alone writes reports: they are tens of megabytes on a large split.
        distributed.from_writer(replace(report, records=DetectionRecords()))
        return report
    return distributed.from_writer(report)


def records_of(batches: Sequence[MeasuredBatch]) -> DetectionRecords:
    """Detections and objects of all images, from which mAP is computed."""
    records = DetectionRecords()
    for batch in batches:
        records.add([row.image_id for row in batch.rows], *batch.records)
    return records


def _joined(shares: Sequence[Sequence[MeasuredBatch]]) -> Sequence[MeasuredBatch]:
    """Whole batches from the shares of all processes, their images in the order of the data set."""
    if len(shares) == 1:
        return shares[0]
    joined = []
    for parts in zip_longest(*shares):  # the last batch may have no image for some process
        images = [image for part in parts if part is not None for image in part.images()]
        joined.append(MeasuredBatch.of(sorted(images, key=lambda image: image.place)))
    return joined


def _report(batches: Sequence[MeasuredBatch], policy_gbitops: float, class_names: tuple[str, ...]) -> EvalReport:
    records, rows = records_of(batches), [row for batch in batches for row in batch.rows]
    result = voc_map(records, class_names)
    return EvalReport(
        map_11pt=result.map_11pt,
        map_all_point=result.map_all_point,
        ap_11pt=result.ap_11pt,
        gbitops_detector=sum(row.gbitops for row in rows) / len(rows),
        gbitops_policy=policy_gbitops,
        distinct_configs=len({tuple(row.choices) for row in rows}),
        images=len(rows),
        per_image=rows,
        records=records,
    )
