"""Opens an ONNX model of `onnx_export` for inspection: the integers that enter each layer as further outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from instaqnas.deploy.onnx_layers import CHANNELS_LAST, LEVELS

CHOSEN = "given choices"


def probed(proto: onnx.ModelProto, positions: Sequence[str], choices: Sequence[int]) -> onnx.ModelProto:
    """A copy of a model that also outputs the levels of all layers, see `levels_by_layer`.

    Args:
        proto: any model of `onnx_export`.
        positions: names of the L positions.
        choices: the bit configuration [L] that an adaptive model runs, in place of the policy's.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    graph = opened.graph
    by_position = dict(zip(positions, choices, strict=True))
    nodes = list(_inlined(proto.graph.node, by_position, graph.initializer))
    last = next((node for node in nodes if "choices" in node.output), None)
    if last is not None and proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1:
        graph.initializer.append(numpy_helper.from_array(np.array(choices, np.int64), CHOSEN))
        nodes = [_renamed(node, last.input[0], CHOSEN) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    levels = [name for node in nodes for name in node.output if name.startswith(LEVELS)]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in levels)
    return opened


def levels_by_layer(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The integers that enter each layer, [B, C, H, W], by the name of the layer; bytes have the layer's offset."""
    found = {}
    for output, levels in outputs.items():
        if output.startswith(LEVELS):
            name = output.removeprefix(LEVELS).rpartition("_")[0]
            is_last = name.endswith(CHANNELS_LAST)
            found[name.removesuffix(CHANNELS_LAST)] = levels.transpose(0, 3, 1, 2) if is_last else levels
    return found


def _renamed(node: onnx.NodeProto, old: str, new: str) -> onnx.NodeProto:
    """The node with another input where it read `old`."""
    if old in node.input:
        node.input[:] = [new if name == old else name for name in node.input]
    return node


def _inlined(
    nodes: Iterable[onnx.NodeProto], choices: Mapping[str, int], initializers: Any
) -> Iterator[onnx.NodeProto]:
    """The nodes, with those of the chosen branch for each `If`; adds the branch's constants to `initializers`."""
    for node in nodes:
        if node.op_type != "If":
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            yield copied
            continue
        position, _, number = node.name.rpartition("_")[0].rpartition(" is ")
        wanted = "then_branch" if choices[position] == int(number) else "else_branch"
        branch = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
        initializers.extend(branch.initializer)
        yield from _inlined(branch.node, choices, initializers)
        for inside, outside in zip(branch.output, node.output, strict=True):
            yield helper.make_node("Identity", [inside.name], [outside])
