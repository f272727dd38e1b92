"""The integer detector, its policy and its post-processing as ONNX operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from torch import nn

from instaqnas.config.settings import EvalConfig
from instaqnas.deploy.onnx_fused import Bytes, can_requantize, exact_after_bytes, quantized_bytes, requantized
from instaqnas.deploy.onnx_graph import Graph
from instaqnas.deploy.onnx_layers import Choice, Map, convolve, value
from instaqnas.detector.default_boxes import CENTER_VARIANCE, SIZE_VARIANCE
from instaqnas.detector.ssd import SOURCE_BLOCKS, SwitchableSSD
from instaqnas.pixels import MEAN_PIXEL, PIXEL_SCALE
from instaqnas.policy.network import PolicyNet, ResidualBlock
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.integer import IntegerConv2d

Form = Literal["exact", "fused"]


@dataclass(frozen=True)
class RawOutputs:
    """Values of `SSDOutput`: box_offsets [B, P, 4] and class_logits [B, P, C]."""

    box_offsets: str
    class_logits: str


@dataclass(frozen=True)
class Found:
    """Values of `Detections`, [B, D, 4], [B, D] and [B, D], with a constant D."""

    boxes_xyxy: str
    scores: str
    labels: str


class DetectorGraph:
    """Adds the layers of a detector to a graph.

    Args:
        graph: gets the operators.
        detector: integer form.
        choice_of: choices of the layers by name; layers that are missing have one choice only.
        form: arithmetic of the layers between stem and heads.
    """

    def __init__(
        self, graph: Graph, detector: SwitchableSSD, choice_of: Mapping[str, Choice], form: Form = "exact"
    ) -> None:
        self.graph, self.detector, self.choice_of, self.form = graph, detector, choice_of, form

    def layer(self, name: str, x: Map | Bytes, reader: str | None = None) -> Map | Bytes:
        """The output of the layer `name`; `reader` is the layer that reads it, if it is the only one."""
        layer, choice = self.layer_and_choice(name)
        if self.form == "exact":
            assert isinstance(x, Map), "only fused layers hand on bytes"
            return convolve(self.graph, name, layer, x, choice)
        if isinstance(x, Map):
            x = quantized_bytes(self.graph, name, layer, x, choice)
        if reader is None or not can_requantize(layer):
            return exact_after_bytes(self.graph, name, layer, x, choice)
        return requantized(self.graph, name, layer, x, choice, reader, *self.layer_and_choice(reader))

    def layer_and_choice(self, name: str) -> tuple[IntegerConv2d, Choice]:
        """A layer, and its choice: 0 if it has only one."""
        layer = cast(IntegerConv2d, self.detector.get_submodule(name))
        return layer, self.choice_of.get(name, 0)

    def map_of(self, name: str, x: Map | Bytes) -> Map:
        """The output of a layer that has several readers."""
        found = self.layer(name, x)
        assert isinstance(found, Map), "bytes are for one reader"
        return found

    def stem(self, pixels: str) -> Map:
        """The output of the stem for normalised images [B, 3, S, S]."""
        layer, choice = self.layer_and_choice("backbone.stem")
        return convolve(
            self.graph, "backbone.stem", layer, Map(pixels), choice
        )  # also in the fused form, the faster way

    def after_stem(self, x: Map) -> RawOutputs:
        """The raw outputs for an output of the stem."""
        sources: list[Map] = []
        carried: Map | Bytes = x
        for block in range(len(self.detector.backbone.blocks)):
            depthwise, pointwise = (f"backbone.blocks.{block}.{kind}" for kind in ("depthwise", "pointwise"))
            carried = self.layer(depthwise, carried, pointwise)
            if block in SOURCE_BLOCKS:
                carried = self.map_of(pointwise, carried)
                sources.append(carried)
            else:
                carried = self.layer(pointwise, carried, f"backbone.blocks.{block + 1}.depthwise")
        for extra in range(len(self.detector.extras)):
            reduced = self.layer(f"extras.{extra}.reduce", sources[-1], f"extras.{extra}.down")
            sources.append(self.map_of(f"extras.{extra}.down", reduced))
        return RawOutputs(
            self._predict("box_heads", sources, 4), self._predict("class_heads", sources, self.detector.classes)
        )

    def _predict(self, heads: str, sources: Sequence[Map], values: int) -> str:
        graph, rows = self.graph, []
        for index, source in enumerate(sources):
            y = value(graph, self.map_of(f"{heads}.{index}", source))
            cells = graph.op("Transpose", y, perm=[0, 2, 3, 1])
            rows.append(graph.op("Reshape", cells, graph.int64(0, -1, values)))
        return graph.op("Concat", *rows, axis=1)


def normalized(graph: Graph, image: str) -> str:
    """Images uint8 [B, S, S, 3] as float32 [B, 3, S, S], about -1 to 1."""
    pixels = graph.cast(graph.op("Transpose", image, perm=[0, 3, 1, 2]), np.float32)
    centred = graph.op("Sub", pixels, graph.constant(np.float32(MEAN_PIXEL)))
    return graph.op("Mul", centred, graph.constant(np.float32(1 / PIXEL_SCALE)))


# --- Policy -----------------------------------------------------------------------------------------------------------


def policy_logits(graph: Graph, policy: PolicyNet, observed: str, side: int) -> str:
    """Logits [B, L, K], as `PolicyNet.forward`.

    Args:
        graph: gets the operators.
        policy: integer form.
        observed: normalised images, or features of the stem after their ReLU, [B, C, side, side].
        side: in pixels.
    """

    names = {layer: f"policy.{name}" for name, layer in policy.named_modules()}

    def run(layer: nn.Module, x: Map) -> Map:
        return convolve(graph, names[layer], cast(IntegerConv2d, layer), x)

    x = graph.op("Relu", value(graph, run(policy.stem, Map(average_pool(graph, observed, side, policy.pool)))))
    if policy.stem_channels is None:
        x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for block in cast("Sequence[ResidualBlock]", policy.blocks):
        inner = value(graph, run(block.second, run(block.first, Map(x))))
        shortcut = x if block.shortcut is None else value(graph, run(block.shortcut, Map(x)))
        x = graph.op("Relu", graph.op("Add", inner, shortcut))
    mean = graph.op("ReduceMean", graph.cast(x, np.float64), graph.int64(2, 3), keepdims=1)
    outputs = value(graph, run(policy.head, Map(graph.cast(mean, np.float32))))
    shape = policy.positions, policy.choices
    flat = graph.op("Reshape", outputs, graph.int64(0, -1))
    own = graph.op("Slice", flat, graph.int64(0), graph.int64(shape[0] * shape[1]), graph.int64(1))
    logits = graph.op("Reshape", own, graph.int64(-1, *shape))
    if policy.effort is None:
        return logits
    effort = graph.op("Gather", flat, graph.int64(-1), axis=1)  # [B, 1]
    change = graph.op("Mul", graph.op("Unsqueeze", effort, graph.int64(2)), graph.constant(policy.effort.numpy()))
    return graph.op("Add", logits, change)


def average_pool(graph: Graph, x: str, side: int, pool: int) -> str:
    """Means over squares of `pool` pixels of [B, C, side, side]; squares at the edge hold the pixels that are left.

    Sums are in float64, so that they do not depend on the order.
    """
    cells = -(-side // pool)
    missing = cells * pool - side
    pads = graph.int64(0, 0, 0, 0, 0, 0, missing, missing)
    padded = graph.cast(graph.op("Pad", x, pads) if missing else x, np.float64)
    squares = graph.op("Reshape", padded, graph.int64(0, 0, cells, pool, cells, pool))
    total = graph.op(
        "ReduceSum", graph.op("ReduceSum", squares, graph.int64(5), keepdims=0), graph.int64(3), keepdims=0
    )
    edge = np.minimum(pool, side - pool * np.arange(cells)).astype(np.float64)
    return graph.cast(graph.op("Div", total, graph.constant(edge[:, None] * edge)), np.float32)


def chosen(graph: Graph, logits: str, price: str, costs: CostTable) -> str:
    """The most likely choices [B, L] after the logits were shifted by -price * GBitOps of each choice."""
    table = graph.constant(costs.gbitops_table().numpy().astype(np.float32))
    shifted = graph.op("Sub", logits, graph.op("Mul", price, table))
    return graph.op("ArgMax", shifted, axis=2, keepdims=0)


def cost_of(graph: Graph, choices: str, costs: CostTable, policy_gbitops: float) -> str:
    """GBitOps [B] of detector and policy under choices [B, L], float64."""
    columns = graph.op("Transpose", choices, perm=[1, 0])  # [L, B]
    picked = graph.op("GatherElements", graph.constant(costs.table.numpy()), columns, axis=1)
    bitops = graph.op("Add", graph.op("ReduceSum", picked, graph.int64(0), keepdims=0), graph.int64(costs.fixed))
    detector = graph.op("Div", graph.cast(bitops, np.float64), graph.constant(np.float64(1e9)))
    return graph.op("Add", detector, graph.constant(np.float64(policy_gbitops)))


# --- Post-processing --------------------------------------------------------------------------------------------------


def decoded(graph: Graph, box_offsets: str, defaults_cxcywh: np.ndarray, image_size: int) -> str:
    """Boxes xyxy [B, P, 4] in pixels, inside the image: `default_boxes.decode` and clipping."""
    centers, sizes = defaults_cxcywh[:, :2], graph.constant(defaults_cxcywh[:, 2:])
    offsets = graph.ops("Split", box_offsets, outputs=2, axis=2, num_outputs=2)
    moved = graph.op("Mul", graph.op("Mul", offsets[0], graph.constant(np.float32(CENTER_VARIANCE))), sizes)
    center = graph.op("Add", moved, graph.constant(centers))
    size = graph.op(
        "Mul", graph.op("Exp", graph.op("Mul", offsets[1], graph.constant(np.float32(SIZE_VARIANCE)))), sizes
    )
    half = graph.op("Mul", size, graph.constant(np.float32(0.5)))
    boxes = graph.op("Concat", graph.op("Sub", center, half), graph.op("Add", center, half), axis=2)
    pixels = graph.op("Mul", boxes, graph.constant(np.float32(image_size)))
    return graph.op("Clip", pixels, graph.constant(np.float32(0)), graph.constant(np.float32(image_size)))


def postprocessed(graph: Graph, raw: RawOutputs, detector: SwitchableSSD, settings: EvalConfig) -> Found:
    """Detections, as `detector.postprocess.postprocess` finds them, padded to a constant number D."""
    defaults = detector.default_boxes_cxcywh.numpy()
    boxes_per_image, labels = len(defaults), detector.classes - 1
    candidates = min(settings.candidates_per_class, boxes_per_image)
    boxes = decoded(graph, raw.box_offsets, defaults, detector.image_size)
    probabilities = graph.op("Transpose", graph.op("Softmax", raw.class_logits, axis=2), perm=[0, 2, 1])
    objects = graph.op("Slice", probabilities, graph.int64(1), graph.int64(detector.classes), graph.int64(1))
    scores, places = graph.ops("TopK", objects, graph.int64(candidates), outputs=2, axis=2)  # [B, C - 1, N]

    # Suppression runs within each class of each image: the classes of all images are its batch.
    rows = graph.op("Reshape", places, graph.int64(0, -1))  # [B, (C - 1) * N]
    own_boxes = graph.op("GatherND", boxes, graph.op("Unsqueeze", rows, graph.int64(2)), batch_dims=1)
    groups = graph.op("Reshape", own_boxes, graph.int64(-1, candidates, 4))
    group_scores = graph.op("Reshape", scores, graph.int64(-1, 1, candidates))
    kept = graph.op(
        "NonMaxSuppression",
        groups,
        group_scores,
        graph.int64(candidates),
        graph.constant(np.float32(settings.nms_iou)),
        # The operator wants more than its threshold, the project at least that much.
        graph.constant(np.nextafter(np.float32(settings.score_threshold), np.float32(-1))),
    )

    zeros = graph.op("ConstantOfShape", graph.op("Shape", group_scores))
    own_scores = graph.op("ScatterND", zeros, kept, graph.op("GatherND", group_scores, kept))
    kept_scores = graph.op("Reshape", own_scores, graph.int64(-1, labels * candidates))
    most = min(settings.max_detections, labels * candidates)
    best, order = graph.ops("TopK", kept_scores, graph.int64(most), outputs=2, axis=1)  # [B, D]
    best_boxes = graph.op("GatherND", own_boxes, graph.op("Unsqueeze", order, graph.int64(2)), batch_dims=1)
    label = graph.op("Add", graph.op("Div", order, graph.int64(candidates)), graph.int64(1))
    is_found = graph.op("Greater", best, graph.constant(np.float32(0)))
    return Found(
        graph.op("Mul", best_boxes, graph.op("Unsqueeze", graph.cast(is_found, np.float32), graph.int64(2))),
        best,
        graph.op("Mul", label, graph.cast(is_found, np.int64)),
    )
