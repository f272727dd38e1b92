"""Whole ONNX models of a packed detector: policy, choice of bits, detector and post-processing in one graph.

| model      | inputs                                 | outputs                                                       |
|------------|----------------------------------------|---------------------------------------------------------------|
| adaptive   | image uint8 [1, S, S, 3], price [1]    | boxes [N, 4], scores [N], labels [N], choices [L], gbitops [1] |
| fixed      | image uint8 [B, S, S, 3]               | boxes [B, D, 4], scores [B, D], labels [B, D]                  |
| policy     | image uint8 [B, S, S, 3], price [1]    | choices [B, L], gbitops [B]                                    |

Images are RGB of the size of the network. Boxes are xyxy in pixels of that size, best first. Label 1 is the first class
name, label 0 is padding. `price` is optional and 0 for the policy as it was trained; a higher price lowers the mean
cost. `gbitops` is the cost of detector and policy. `metadata` lists everything else that a program needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from instaqnas.deploy.onnx_graph import IR_VERSION, OPSETS, Graph
from instaqnas.deploy.onnx_layers import Choice, value
from instaqnas.deploy.onnx_networks import (
    DetectorGraph,
    Form,
    RawOutputs,
    chosen,
    cost_of,
    normalized,
    policy_logits,
    postprocessed,
)
from instaqnas.deploy.onnx_session import FORMAT
from instaqnas.deploy.packed import IntegerModel
from instaqnas.errors import InputError

IMAGE, PRICE = "image", "price"


def adaptive_model(model: IntegerModel, form: Form = "exact") -> onnx.ModelProto:
    """The policy and its detector for one image."""
    detector, graph = model.detector, Graph()
    pixels = normalized(graph, IMAGE)
    if detector.stem_is_frozen:
        stem = DetectorGraph(graph, detector, {}).stem(pixels)
        observed, side = graph.op("Relu", value(graph, stem)), -(-detector.image_size // 2)
    else:
        stem, observed, side = None, pixels, detector.image_size
    choices = chosen(graph, policy_logits(graph, model.policy, observed, side), PRICE, model.costs)
    row = graph.op("Squeeze", choices, graph.int64(0))  # [L]
    at = [graph.op("Gather", row, graph.constant(np.int64(place))) for place in range(len(detector.positions))]

    def run(into: Graph, choice_of: dict[str, Choice]) -> RawOutputs:
        layers = DetectorGraph(into, detector, choice_of, form)
        return layers.after_stem(layers.stem(pixels) if stem is None else stem)

    if len(detector.positions) == 1 and len(detector.choice_names) > 1:
        branches = []
        for level in range(len(detector.choice_names)):
            branch = Graph(graph)
            raw = run(branch, level_choices(model, level))
            branches.append((branch, [raw.box_offsets, raw.class_logits]))
        raw = RawOutputs(*graph.choose(at[0], branches, detector.positions[0]))
    else:
        raw = run(
            graph,
            {name: choice for choice, names in zip(at, detector.layers_at.values(), strict=True) for name in names},
        )
    found = postprocessed(graph, raw, detector, model.settings)
    places = graph.op("NonZero", graph.op("Squeeze", found.labels, graph.int64(0)))
    first = graph.op("Squeeze", places, graph.int64(0))
    outputs = {
        name: graph.op("Gather", graph.op("Squeeze", output, graph.int64(0)), first)
        for name, output in (("boxes", found.boxes_xyxy), ("scores", found.scores), ("labels", found.labels))
    }
    outputs |= {"choices": row, "gbitops": cost_of(graph, choices, model.costs, model.policy_gbitops)}
    shapes = {"boxes": ("N", 4), "scores": ("N",), "labels": ("N",), "choices": (len(at),), "gbitops": (1,)}
    return _model(graph, model, "adaptive", outputs, shapes, 1, form)


def fixed_model(model: IntegerModel, config: Sequence[int], form: Form = "exact") -> onnx.ModelProto:
    """The detector at one bit configuration [L], for batches; without policy."""
    detector, graph = model.detector, Graph()
    places = zip(detector.layers_at.values(), config, strict=True)
    choice_of: dict[str, Choice] = {name: choice for names, choice in places for name in names}
    layers = DetectorGraph(graph, detector, choice_of, form)
    raw = layers.after_stem(layers.stem(normalized(graph, IMAGE)))
    found = postprocessed(graph, raw, detector, model.settings)
    outputs = {"boxes": found.boxes_xyxy, "scores": found.scores, "labels": found.labels}
    shapes = {"boxes": ("B", "D", 4), "scores": ("B", "D"), "labels": ("B", "D")}
    return _model(graph, model, "fixed", outputs, shapes, "B", form)


def policy_model(model: IntegerModel) -> onnx.ModelProto:
    """The policy alone, for batches, with the stem of the detector if it reads the stem."""
    detector, graph = model.detector, Graph()
    observed, side = normalized(graph, IMAGE), detector.image_size
    if detector.stem_is_frozen:
        stem = DetectorGraph(graph, detector, {}).stem(observed)
        observed, side = graph.op("Relu", value(graph, stem)), -(-side // 2)
    choices = chosen(graph, policy_logits(graph, model.policy, observed, side), PRICE, model.costs)
    outputs = {"choices": choices, "gbitops": cost_of(graph, choices, model.costs, model.policy_gbitops)}
    shapes = {"choices": ("B", len(detector.positions)), "gbitops": ("B",)}
    return _model(graph, model, "policy", outputs, shapes, "B", "exact")


def choice_named(model: IntegerModel, name: str) -> int:
    """The index of a bit choice.

    Raises: InputError if there is none of this name.
    """
    names = model.detector.choice_names
    if name not in names:
        raise InputError(f"--fixed {name}: unknown choice; known: {', '.join(names)}")
    return names.index(name)


def level_choices(model: IntegerModel, level: int) -> dict[str, Choice]:
    """The same choice for all layers that the policy controls."""
    return {name: level for names in model.detector.layers_at.values() for name in names}


def metadata(model: IntegerModel, kind: str, form: Form) -> dict[str, str]:
    """Metadata of a file: `format`, `kind` and `form` as they are, everything else as JSON.

    class_names: without background, label 1 first.
    image_size: S.
    choice_names: of the K bit choices; positions: of the L choices of an image.
    policy_gbitops: cost of one decision, a part of `gbitops`.
    prices: pairs (price, mean GBitOps) measured on the validation split, the lowest cost first; empty if unknown.
    """
    values = {
        "class_names": model.class_names,
        "image_size": model.detector.image_size,
        "choice_names": model.detector.choice_names,
        "positions": model.detector.positions,
        "policy_gbitops": model.policy_gbitops,
        "prices": model.prices,
        "score_threshold": model.settings.score_threshold,
    }
    return {"format": FORMAT, "kind": kind, "form": form} | {key: json.dumps(value) for key, value in values.items()}


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model to a file that appears when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        onnx.save(model, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _model(
    graph: Graph,
    model: IntegerModel,
    kind: str,
    outputs: dict[str, str],
    shapes: dict[str, tuple[int | str, ...]],
    batch: int | str,
    form: Form,
) -> onnx.ModelProto:
    """The model of a complete graph, its outputs renamed."""
    side = model.detector.image_size
    inputs = [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [batch, side, side, 3])]
    if kind != "fixed":
        inputs.append(helper.make_tensor_value_info(PRICE, TensorProto.FLOAT, [1]))
        default = onnx.numpy_helper.from_array(np.zeros(1, np.float32), PRICE)
        graph.initializers[PRICE.encode()] = default  # an input with a value of its own is optional
    infos = []
    for name, output in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [output], [name], name=name))
        infos.append(helper.make_tensor_value_info(name, _type_of(name), shapes[name]))
    proto = helper.make_model(
        graph.proto(inputs, infos), opset_imports=[helper.make_opsetid(*pair) for pair in OPSETS], ir_version=IR_VERSION
    )
    proto.producer_name = "instaqnas"
    helper.set_model_props(proto, metadata(model, kind, form))
    return proto


def _type_of(output: str) -> Any:
    types = {"labels": TensorProto.INT64, "choices": TensorProto.INT64, "gbitops": TensorProto.DOUBLE}
    return types.get(output, TensorProto.FLOAT)
