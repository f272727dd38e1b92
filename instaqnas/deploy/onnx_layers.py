"""Layers of integer networks as ONNX operators, with exactly the arithmetic of `instaqnas.quant.integer`.

Between quantization and rescale all numbers are whole. Convolutions are `ConvInteger` on bytes; weights are bytes with
a zero-point of 128, because products of unsigned and signed bytes saturate on CPUs without 8-bit dot products.
Depthwise convolutions are ordinary ones of whole numbers in float32, whose sums are far below 2^24: `ConvInteger` has
no fast form for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import Tensor

from instaqnas.deploy.onnx_graph import Graph
from instaqnas.quant.integer import IntegerConv2d

Choice = int | str  # index of a bit choice: known at the export, or the name of an int64 scalar
Row = np.ndarray | str  # one row of a table: known at the export, or the name of a value
BYTE_ZERO = 128  # zero-point of weights
LEVELS = "levels of "  # how names of quantized inputs begin
CHANNELS_LAST = " [B, H, W, C]"  # how they end in this order


@dataclass(frozen=True)
class Map:
    """The feature map scale * y + shift before its ReLU, not computed yet, as `Affine`.

    y: float32 [B, C, H, W].
    scale, shift: [C, 1, 1]; both None for 1 and 0.
    """

    y: str
    scale: Row | None = None
    shift: Row | None = None


def value(graph: Graph, x: Map) -> str:
    """The feature map [B, C, H, W], without ReLU."""
    if x.scale is None or x.shift is None:
        return x.y
    return graph.op("Add", graph.op("Mul", x.y, named(graph, x.scale)), named(graph, x.shift))


def convolve(graph: Graph, name: str, layer: IntegerConv2d, x: Map, choice: Choice = 0) -> Map:
    """The output of a layer for its input, at one of its K bit choices; `choice` is ignored where K = 1.

    The value with the levels of its input is called `levels of NAME`, with a number.
    """
    if len(layer.choices) == 1:
        choice = 0
    return summed(graph, name, layer, quantized(graph, layer, x, choice, f"{LEVELS}{name}"), choice)


def quantized(graph: Graph, layer: IntegerConv2d, x: Map, choice: Choice, hint: str) -> str:
    """The levels of a layer's input: float32 for a depthwise layer, else bytes."""
    clipped = clipped_position(graph, layer, x, choice)
    if layer.is_depthwise:
        return graph.op("Round", clipped, hint=hint)
    return as_bytes(graph, layer, clipped, choice, hint)


def as_bytes(graph: Graph, layer: IntegerConv2d, clipped: str, choice: Choice, hint: str) -> str:
    """The levels from `clipped_position` plus the offset of the layer, uint8."""
    return graph.op("QuantizeLinear", clipped, graph.constant(np.float32(1)), offset(graph, layer, choice), hint=hint)


def clipped_position(graph: Graph, layer: IntegerConv2d, x: Map, choice: Choice) -> str:
    """The input in units of the layer's step size, clipped but not rounded, float32."""
    step = row(graph, array(layer.step)[:, None, None, None], choice)
    if x.scale is None or x.shift is None:
        position = graph.op("Mul", x.y, named(graph, divided(graph, np.ones((1, 1, 1), np.float32), step)))
    else:
        scaled = graph.op("Mul", x.y, named(graph, divided(graph, x.scale, step)))
        position = graph.op("Add", scaled, named(graph, divided(graph, x.shift, step)))
    ends = [named(graph, row(graph, array(table), choice)) for table in (layer.lowest, layer.highest)]
    # The ends are whole numbers, so clipping before rounding gives the same levels.
    return graph.op("Clip", position, *ends)


def summed(graph: Graph, name: str, layer: IntegerConv2d, levels: str, choice: Choice) -> Map:
    """The convolution of the levels from `quantized`, and its rescale."""
    scale, shift = (array(table)[:, :, None, None] for table in (layer.scale, layer.shift))
    return Map(sums(graph, name, layer, levels, choice), row(graph, scale, choice), row(graph, shift, choice))


def sums(graph: Graph, name: str, layer: IntegerConv2d, levels: str, choice: Choice) -> str:
    """The convolution of the levels, whole numbers in float32 [B, out, H', W']."""
    if isinstance(choice, int):
        return _sums_at(graph, layer, levels, choice)
    branches = []
    for k in range(len(layer.choices)):
        branch = Graph(graph)
        branches.append((branch, [_sums_at(branch, layer, levels, k)]))
    return graph.choose(choice, branches, name)[0]


def _sums_at(graph: Graph, layer: IntegerConv2d, levels: str, k: int) -> str:
    weight = array(layer.weight[k]).astype(np.int32)
    widths = bit_widths(layer, k)
    if layer.is_depthwise:
        floats = graph.cast(graph.weight(weight, widths), np.float32)
        # `Round` changes nothing, but keeps optimizers from multiplying the scale into the weight.
        return graph.op("Round", graph.op("Conv", levels, floats, **shape_of(layer)))
    zero = offset(graph, layer, k)
    if fits_bytes(weight):
        total = _integer_convolution(graph, layer, levels, zero, graph.weight(weight, widths))
    else:  # odd levels 2q + 1 of 8 bits
        halves = _integer_convolution(graph, layer, levels, zero, graph.weight((weight - 1) >> 1, widths))
        ones = graph.constant(np.ones((1, *weight.shape[1:]), np.int32))
        all_levels = _integer_convolution(graph, layer, levels, zero, ones)
        total = graph.op("Add", graph.op("Mul", halves, graph.constant(np.int32(2))), all_levels)
    return graph.cast(total, np.float32)


def _integer_convolution(graph: Graph, layer: IntegerConv2d, levels: str, zero: str, weight: str) -> str:
    shifted = graph.cast(graph.op("Add", weight, graph.constant(np.int32(BYTE_ZERO))), np.uint8)
    return graph.op("ConvInteger", levels, shifted, zero, graph.constant(np.uint8(BYTE_ZERO)), **shape_of(layer))


def fits_bytes(weight: np.ndarray) -> bool:
    """Whether all levels are signed bytes: all but odd levels 2q + 1 of 8 bits."""
    return bool(weight.min() >= -BYTE_ZERO and weight.max() < BYTE_ZERO)


def bit_widths(layer: IntegerConv2d, k: int) -> list[int]:
    """Where to cut the weight of choice k in pieces, see `Graph.weight`: at all bit-widths if weights are nested."""
    own = layer.choices[k][0]
    widths = sorted({bits for bits, _ in layer.choices})
    return [bits for bits in widths if bits <= own] if is_nested(layer) else [own]


def is_nested(layer: IntegerConv2d) -> bool:
    """Whether the weight of every choice has the top bits of the widest one's integers."""
    integers = [(weight - 1) >> 1 if bool((weight & 1).all()) else weight for weight in array(layer.weight)]
    widths = [bits for bits, _ in layer.choices]
    widest = widths.index(max(widths))
    return all(
        np.array_equal(integer, integers[widest] >> (widths[widest] - bits))
        for integer, bits in zip(integers, widths, strict=True)
    )


def shape_of(layer: IntegerConv2d) -> dict[str, Any]:
    """Attributes of a convolution."""
    return {
        "strides": [layer.stride] * 2,
        "pads": [layer.kernel_size // 2] * 4,
        "kernel_shape": [layer.kernel_size] * 2,
        "group": layer.groups,
    }


def offset(graph: Graph, layer: IntegerConv2d, choice: Choice) -> str:
    """The byte that stands for level 0 of the input, uint8."""
    return named(graph, row(graph, array(layer.offset).astype(np.uint8), choice))


def array(x: Tensor) -> np.ndarray:
    """A tensor as an array."""
    return x.detach().numpy()


def row(graph: Graph, table: np.ndarray, choice: Choice) -> Row:
    """The row of a choice in a table [K, ...]; the same rows need no choice."""
    if (table == table[:1]).all():
        return cast(np.ndarray, table[0])
    return table[choice] if isinstance(choice, int) else graph.op("Gather", graph.constant(table), choice)


def divided(graph: Graph, a: Row, b: Row) -> Row:
    """a / b in float32."""
    if isinstance(a, str) or isinstance(b, str):
        return graph.op("Div", named(graph, a), named(graph, b))
    return a / b


def named(graph: Graph, x: Row) -> str:
    """The name of a value that may be known at the export."""
    return x if isinstance(x, str) else graph.constant(x)
