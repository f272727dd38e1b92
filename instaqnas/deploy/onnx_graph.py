"""ONNX graphs from Python calls: operators by name, constants stored once, branches of `If`, weights at their own bits.

A value is the name of a tensor in the graph. The batch axis is the first one, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from instaqnas.deploy.packed import pack_bits

ONNXRUNTIME = "com.microsoft"  # domain of operators that the standard lacks
OPSETS, IR_VERSION = (("", 25), (ONNXRUNTIME, 1)), 13  # the first with integers of 2 bits
STORED = {4: TensorProto.UINT4, 2: TensorProto.UINT2}  # types of fewer than 8 bits


@dataclass
class Graph:
    """Nodes, constants and inputs of a graph, or of a branch, which also sees all values of its `parent`."""

    parent: Graph | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[bytes, onnx.TensorProto] = field(default_factory=dict)  # by type, shape and content
    names: list[str] = field(default_factory=list)  # all that the root has given

    @property
    def root(self) -> Graph:
        """The graph that is not a branch."""
        return self if self.parent is None else self.parent.root

    def name(self, hint: str) -> str:
        """A name that no other value has."""
        names = self.root.names
        names.append(f"{hint}_{len(names)}")
        return names[-1]

    def op(self, kind: str, *inputs: str, hint: str = "", **attributes: Any) -> str:
        """The output of an operator; attributes as in the ONNX standard. Its name begins with `hint`."""
        return self.ops(kind, *inputs, outputs=1, hint=hint, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, hint: str = "", **attributes: Any) -> list[str]:
        """The outputs of an operator that has several."""
        found = [self.name(hint or kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, found, name=found[0], **attributes))
        return found

    def constant(self, value: np.ndarray | np.generic) -> str:
        """A constant of the value's type; equal ones are stored once."""
        return self._stored(numpy_helper.from_array(np.asarray(value)))

    def int64(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.constant(np.array(values, np.int64))

    def cast(self, x: str, to: type[np.generic]) -> str:
        """`x` as another type."""
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(to)))

    def choose(
        self, index: str, branches: Sequence[tuple[Graph, Sequence[str]]], position: str, first: int = 0
    ) -> list[str]:
        """The values of one of the branches of this graph; only that branch is computed.

        Args:
            index: of the branch, an int64 scalar from 0.
            branches: graphs with this one as their parent, and as many values in each.
            position: names the `If` nodes: `POSITION is 0`, and so on.
            first: number of the first branch.
        """
        (graph, values), *others = branches
        if not others:  # nothing is left to choose
            self.nodes += graph.nodes
            self.initializers |= graph.initializers
            return list(values)
        rest = Graph(self)
        other_values = rest.choose(rest.op("Sub", index, rest.constant(np.int64(1))), others, position, first + 1)
        is_first = self.op("Equal", index, self.constant(np.int64(0)))
        return self.ops(
            "If",
            is_first,
            outputs=len(values),
            hint=f"{position} is {first}",
            then_branch=graph.proto([], values),
            else_branch=rest.proto([], other_values),
        )

    def proto(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[str | onnx.ValueInfoProto]) -> Any:
        """The graph in ONNX's form. Outputs of a branch are names, their types follow from the nodes."""
        infos = [onnx.ValueInfoProto(name=item) if isinstance(item, str) else item for item in outputs]
        return helper.make_graph(self.nodes, "graph", inputs, infos, list(self.initializers.values()))

    def weight(self, levels: np.ndarray, widths: Sequence[int]) -> str:
        """A convolution's weight, int32, stored without gaps at its own bits.

        Sessions compute the expression once, when they load the file.

        Args:
            levels: integers q of b = widths[-1] bits, or odd integers 2q + 1.
            widths: ascending bit-widths at which the bits are cut in pieces. Weights that share their top bits, as
                nested ones do, share the stored pieces.
        """
        bits, is_odd = widths[-1], bool((levels & 1).all())
        values = ((levels - 1) >> 1 if is_odd else levels) + 2 ** (bits - 1)
        assert values.min() >= 0, "the levels have the bits of their choice"
        assert values.max() < 2**bits, "the levels have the bits of their choice"
        pieces, below = [], bits
        for size in piece_sizes(widths):
            below -= size
            piece = (values >> below) & (2**size - 1)
            pieces.append(self._scaled(self._piece(piece.astype(np.uint8), size), 2**below))
        total = pieces[0]
        for piece in pieces[1:]:
            total = self.op("Add", total, piece)
        q = self.op("Sub", total, self.constant(np.int32(2 ** (bits - 1))))
        return self.op("Add", self._scaled(q, 2), self.constant(np.int32(1))) if is_odd else q

    def _scaled(self, x: str, factor: int) -> str:
        return x if factor == 1 else self.op("Mul", x, self.constant(np.int32(factor)))

    def _piece(self, values: np.ndarray, bits: int) -> str:
        """Unsigned integers of 8, 4, 2 or 1 bits as int32."""
        if bits == 8:
            return self.cast(self.root.constant(values), np.int32)
        stream = pack_bits(values.ravel(), bits)
        if bits > 1:
            return self.cast(self.root.stored(STORED[bits], values.shape, stream), np.int32)
        # There is no type of 1 bit: eight to a byte.
        column = self.root.constant(np.frombuffer(stream, np.uint8)[:, None])
        shifted = self.op("BitShift", column, self.constant(np.arange(8, dtype=np.uint8)), direction="RIGHT")
        planes = self.op("BitwiseAnd", shifted, self.constant(np.uint8(1)))
        row = self.op("Slice", self.op("Reshape", planes, self.int64(-1)), self.int64(0), self.int64(values.size))
        return self.cast(self.op("Reshape", row, self.int64(*values.shape)), np.int32)

    def stored(self, kind: int, shape: Sequence[int], content: bytes) -> str:
        """A constant of an ONNX type that numpy lacks."""
        return self._stored(helper.make_tensor("", kind, shape, content, raw=True))

    def _stored(self, tensor: onnx.TensorProto) -> str:
        key = tensor.SerializeToString()  # without name
        graph: Graph | None = self
        while graph is not None:
            if key in graph.initializers:
                return graph.initializers[key].name
            graph = graph.parent
        tensor.name = self.name("constant")
        self.initializers[key] = tensor
        return tensor.name


def piece_sizes(widths: Sequence[int]) -> list[int]:
    """Sizes of the pieces, 8, 4, 2 or 1 bits, from the top bits on, with a cut at each of the ascending `widths`."""
    sizes, last = [], 0
    for width in widths:
        gap, last = width - last, width
        sizes += [size for size in (8, 4, 2, 1) if gap & size]
    return sizes
