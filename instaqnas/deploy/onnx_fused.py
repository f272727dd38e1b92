"""Convolutions that requantize their own sums: faster than the exact form, and not equal to it in every integer.

`QLinearConv` computes round((sums + bias) * scale) with a bias of whole numbers, so the shift of a layer is rounded to
a unit of its sums. Levels differ from the exact ones by one where that matters. Maps are bytes in the order
[B, H, W, C], for which onnxruntime has an operator of its own: no layer transposes its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from instaqnas.deploy.onnx_graph import ONNXRUNTIME, Graph
from instaqnas.deploy.onnx_layers import (
    BYTE_ZERO,
    CHANNELS_LAST,
    LEVELS,
    Choice,
    Map,
    array,
    as_bytes,
    bit_widths,
    clipped_position,
    fits_bytes,
    named,
    offset,
    row,
    shape_of,
    summed,
)
from instaqnas.quant.integer import IntegerConv2d

LARGEST_PAIR = 2**15 - 1  # of two products that CPUs without 8-bit dot products add in 16 bits
LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class Bytes:
    """Levels of a layer's input with its offset, uint8 [B, H, W, C]."""

    value: str


def can_requantize(layer: IntegerConv2d) -> bool:
    """Whether all weights of a layer are bytes."""
    return fits_bytes(array(layer.weight))


def quantized_bytes(graph: Graph, name: str, layer: IntegerConv2d, x: Map, choice: Choice) -> Bytes:
    """The exact levels of an input that is not quantized yet."""
    levels = as_bytes(graph, layer, clipped_position(graph, layer, x, choice), choice, "bytes")
    return Bytes(graph.op("Transpose", levels, perm=[0, 2, 3, 1], hint=f"{LEVELS}{name}{CHANNELS_LAST}"))


def exact_after_bytes(graph: Graph, name: str, layer: IntegerConv2d, x: Bytes, choice: Choice) -> Map:
    """The exact output of a layer for its levels."""
    levels = graph.op("Transpose", x.value, perm=[0, 3, 1, 2])
    if layer.is_depthwise:
        zero = graph.cast(offset(graph, layer, choice), np.float32)
        levels = graph.op("Sub", graph.cast(levels, np.float32), zero)
    return summed(graph, name, layer, levels, choice)


def requantized(
    graph: Graph,
    name: str,
    layer: IntegerConv2d,
    x: Bytes,
    choice: Choice,
    reader_name: str,
    reader: IntegerConv2d,
    reader_choice: Choice,
) -> Bytes:
    """The levels that the only reader of a layer's output computes from it, about."""
    step = named(graph, row(graph, array(reader.step), reader_choice))
    zero = offset(graph, reader, reader_choice)
    if isinstance(choice, int) or len(layer.choices) == 1:
        levels = _requantized_at(graph, layer, x.value, choice if isinstance(choice, int) else 0, step, zero)
    else:
        branches = []
        for k in range(len(layer.choices)):
            branch = Graph(graph)
            branches.append((branch, [_requantized_at(branch, layer, x.value, k, step, zero)]))
        levels = graph.choose(choice, branches, name)[0]
    most = row(graph, (array(reader.highest) + array(reader.offset)).astype(np.uint8), reader_choice)
    return Bytes(graph.op("Min", levels, named(graph, most), hint=f"{LEVELS}{reader_name}{CHANNELS_LAST}"))


def _requantized_at(graph: Graph, layer: IntegerConv2d, levels: str, k: int, step: str, zero: str) -> str:
    weight = array(layer.weight[k]).astype(np.int32)
    widest = max(1, int(np.abs(weight).max()))
    highest = int(array(layer.highest)[k] + array(layer.offset)[k])
    saturates = 2 * highest * widest > LARGEST_PAIR
    # Weights of few bits are multiplied by a whole number, so that a unit of the sums, and of the bias, is smaller.
    factor = (BYTE_ZERO - 1) // widest if saturates else min(BYTE_ZERO - 1, LARGEST_PAIR // (2 * highest)) // widest
    units = units_of(layer, k, max(1, factor))
    scaled = graph.op("Mul", graph.weight(weight, bit_widths(layer, k)), graph.constant(units.factor))
    limits = graph.constant(np.int32(-BYTE_ZERO)), graph.constant(np.int32(BYTE_ZERO - 1))
    limited = graph.op("Clip", scaled, *limits)  # -(-128) is no byte
    if saturates:  # products of unsigned bytes do not, and take longer
        weight_bytes = graph.cast(graph.op("Add", limited, graph.constant(np.int32(BYTE_ZERO))), np.uint8)
        weight_zero = graph.constant(np.uint8(BYTE_ZERO))
    else:
        weight_bytes, weight_zero = graph.cast(limited, np.int8), graph.constant(np.int8(0))
    return graph.op(
        "QLinearConv",
        levels,
        graph.constant(np.float32(1)),
        offset(graph, layer, k),
        weight_bytes,
        graph.constant(units.scale),
        weight_zero,
        step,
        zero,
        graph.constant(units.bias),
        domain=ONNXRUNTIME,
        channels_last=1,
        **shape_of(layer),
    )


class Units(NamedTuple):
    """The rescale of a layer as scale * (sums of levels * factor * weight + bias) with a positive scale.

    scale float32 [out], bias int32 [out], factor int32 [out, 1, 1, 1].
    """

    scale: np.ndarray
    bias: np.ndarray
    factor: np.ndarray


def units_of(layer: IntegerConv2d, k: int, factor: int) -> Units:
    """The rescale of a layer at choice k, for weights multiplied by `factor` and the sign of the scale."""
    scale, shift = (array(table)[k].astype(np.float64) for table in (layer.scale, layer.shift))
    scale /= factor
    smallest = np.maximum(np.abs(shift) / LARGEST_BIAS, np.finfo(np.float32).tiny)
    is_constant = np.abs(scale) <= smallest  # the output is the shift, whatever the sums are
    unit = np.where(is_constant, smallest, np.abs(scale))
    bias = np.round(shift / unit).astype(np.int32)
    signs = np.where(is_constant, 0, np.sign(scale)).astype(np.int32)
    return Units(unit.astype(np.float32), bias, factor * signs[:, None, None, None])
