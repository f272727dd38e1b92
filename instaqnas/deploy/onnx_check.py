"""Counts how an ONNX file differs from the integer networks that it was exported from, image by image."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from instaqnas.data.loader import Batch
from instaqnas.deploy.onnx_probe import levels_by_layer, probed
from instaqnas.deploy.onnx_session import OnnxModel, new_session
from instaqnas.deploy.packed import IntegerModel
from instaqnas.detector.postprocess import Detections
from instaqnas.errors import InputError
from instaqnas.evaluation.inference import detect
from instaqnas.metrics.voc import DetectionRecords, voc_map
from instaqnas.quant.integer import IntegerConv2d

SCORE_TOLERANCE, BOX_TOLERANCE = 1e-5, 1e-2  # of one detection; pixels. Exponentials differ in the last bit
SESSIONS = 4  # bit configurations whose models stay in memory


@dataclass
class OnnxComparison:
    """Counts over images, and mAP of both.

    Args:
        images: number of images, once for each configuration that they ran under.
        levels: number of integers that entered layers.
        different_levels: number of differing integers, by layer; layers without differences are left out.
        largest_difference: largest difference of an integer.
        detections: number of detections of the integer networks.
        images_with_different_detections: beyond `SCORE_TOLERANCE` and `BOX_TOLERANCE`.
        images_with_different_choices: number of images.
        map_integer, map_onnx: 11-point mAP under the policy's configurations, 0 to 1.
    """

    images: int = 0
    levels: int = 0
    different_levels: dict[str, int] = field(default_factory=dict)
    largest_difference: float = 0
    detections: int = 0
    images_with_different_detections: int = 0
    images_with_different_choices: int = 0
    map_integer: float = 0
    map_onnx: float = 0


class LevelRecorder:
    """Keeps the integers that enter each layer of integer networks, by forward hooks, without the layer's offset."""

    def __init__(self, model: IntegerModel) -> None:
        self.levels: dict[str, Tensor] = {}  # [B, C, H, W]
        self.offsets: dict[str, Tensor] = {}  # [B, 1, 1, 1]
        for prefix, network in (("", model.detector), ("policy.", model.policy)):
            for name, layer in network.named_modules():
                if isinstance(layer, IntegerConv2d):
                    layer.register_forward_hook(functools.partial(self._keep, prefix + name))

    def _keep(self, name: str, layer: IntegerConv2d, args: tuple, _output: object) -> None:
        x, choice = args if len(args) == 2 and len(layer.choices) > 1 else (args[0], None)
        index = torch.zeros(x.shape[0], dtype=torch.int64) if choice is None else choice
        self.offsets[name] = layer.offset[index].view(-1, 1, 1, 1)
        self.levels[name] = layer.levels(x, choice) - self.offsets[name]


class OnnxCheck:
    """Compares one file of an adaptive model with its integer networks.

    Args:
        model: the integer networks.
        path: the file.

    Raises: InputError if the file cannot be read, or is of another network.
    """

    def __init__(self, model: IntegerModel, path: Path) -> None:
        self.model, self.onnx, self.result = model, OnnxModel.load(path), OnnxComparison()
        if self.onnx.metadata["kind"] != "adaptive":
            raise InputError(f"{path}: has no policy and detector; expected a file without --fixed and --per-level")
        expected = list(model.class_names), list(model.detector.choice_names), list(model.detector.positions)
        if expected != tuple(self.onnx.metadata[key] for key in ("class_names", "choice_names", "positions")):
            raise InputError(f"{path}: other classes, bit choices or positions than the run")
        self.proto = onnx.load(path)
        self.recorder = LevelRecorder(model)
        self._session = functools.lru_cache(SESSIONS)(self._new_session)

    @torch.no_grad()
    def under_policy(self, batches: Iterable[Batch]) -> None:
        """Compares choices, levels and detections under the policy's configurations, and mAP."""
        records = DetectionRecords(), DetectionRecords()
        for batch in batches:
            for b in range(len(batch.images)):
                image = batch.images[b : b + 1]
                choices = self.model.policy(self.model.detector.observe(image).input).argmax(-1)
                outputs = self.onnx.run(image.permute(0, 2, 3, 1).numpy())
                self.result.images_with_different_choices += outputs["choices"].tolist() != choices[0].tolist()
                expected = self.compare(image, choices[0].tolist())
                found = Detections(*(torch.from_numpy(outputs[name])[None] for name in ("boxes", "scores", "labels")))
                objects = batch.boxes_xyxy[b : b + 1], batch.labels[b : b + 1], batch.difficult[b : b + 1]
                for record, boxes in zip(records, (expected, found), strict=True):
                    record.add([batch.image_ids[b]], boxes.boxes_xyxy, boxes.scores, boxes.labels, *objects)
        maps = (voc_map(record, self.model.class_names).map_11pt for record in records)
        self.result.map_integer, self.result.map_onnx = maps

    @torch.no_grad()
    def compare(self, image: Tensor, config: Sequence[int]) -> Detections:
        """Compares levels and detections of one image [1, 3, S, S] under a configuration [L]; returns the expected."""
        model, result = self.model, self.result
        session, names = self._session(tuple(config))
        outputs = dict(zip(names, session.run(names, {"image": image.permute(0, 2, 3, 1).numpy()}), strict=True))
        observation = model.detector.observe(image)
        model.policy(observation.input)
        expected = detect(model.detector, image, torch.tensor([config]), model.settings, observation.stem)
        for layer, levels in levels_by_layer(outputs).items():
            wanted, offset = self.recorder.levels[layer].numpy(), self.recorder.offsets[layer].numpy()
            difference = levels.astype(np.float32) - (offset if levels.dtype == np.uint8 else 0) - wanted
            result.levels += difference.size
            if difference.any():
                count = int(np.count_nonzero(difference))
                result.different_levels[layer] = result.different_levels.get(layer, 0) + count
                result.largest_difference = max(result.largest_difference, float(np.abs(difference).max()))
        result.images += 1
        result.detections += expected.labels.shape[1]
        result.images_with_different_detections += not same_detections(expected, outputs)
        return expected

    def _new_session(self, config: tuple[int, ...]) -> tuple:
        session = new_session(probed(self.proto, self.model.detector.positions, config).SerializeToString())
        return session, [output.name for output in session.get_outputs()]


def same_detections(expected: Detections, outputs: dict[str, np.ndarray]) -> bool:
    """Whether one image has the same detections in both, up to the tolerances, in any order of equal scores."""
    left = list(zip(outputs["labels"].tolist(), outputs["scores"], outputs["boxes"], strict=True))
    rows = zip(expected.labels[0].tolist(), expected.scores[0].numpy(), expected.boxes_xyxy[0].numpy(), strict=True)
    for label, score, box in rows:
        for index, (other, other_score, other_box) in enumerate(left):
            near = abs(other_score - score) <= SCORE_TOLERANCE and np.abs(other_box - box).max() <= BOX_TOLERANCE
            if other == label and near:
                left.pop(index)
                break
        else:
            return False
    return not left
