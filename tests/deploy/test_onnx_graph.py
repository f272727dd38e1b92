"""Weights in ONNX files: as many bits as their bit-width, and the same integers when a session has unpacked them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed: scripts/setup.sh --deploy")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: scripts/setup.sh --deploy")

from onnx import TensorProto, helper  # noqa: E402

from instaqnas.deploy.onnx_graph import IR_VERSION, OPSETS, Graph, piece_sizes  # noqa: E402


def outputs_of(graph: Graph, **outputs: str) -> list[np.ndarray]:
    """Runs a graph without inputs whose outputs are int32."""
    for name, value in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [value], [name]))
    infos = [helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in outputs]
    proto = helper.make_model(
        graph.proto([], infos), opset_imports=[helper.make_opsetid("", OPSETS[0][1])], ir_version=IR_VERSION
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})


def stored_bytes(graph: Graph) -> int:
    """Bytes of the constants that are not a few numbers."""
    return sum(len(t.raw_data) for t in graph.initializers.values() if len(t.raw_data) > 64)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_come_back_and_take_their_own_bits(bits: int) -> None:
    levels = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 10, 3, 3)).astype(np.int32)
    graph = Graph()
    (found,) = outputs_of(graph, w=graph.weight(levels, [bits]))
    assert np.array_equal(found, levels)
    assert stored_bytes(graph) == levels.size * bits // 8


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_odd_levels_come_back(bits: int) -> None:
    levels = 2 * np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 7, 1, 1)) + 1
    graph = Graph()
    (found,) = outputs_of(graph, w=graph.weight(levels.astype(np.int32), [bits]))
    assert np.array_equal(found, levels)


def test_nested_weights_are_stored_once() -> None:
    widest = np.random.default_rng(0).integers(-128, 128, (64, 32, 1, 1)).astype(np.int32)
    graph = Graph()
    names = {f"w{bits}": graph.weight(widest >> (8 - bits), [b for b in (2, 5, 8) if b <= bits]) for bits in (8, 2, 5)}
    found = outputs_of(graph, **names)
    for bits, levels in zip((8, 2, 5), found, strict=True):
        assert np.array_equal(levels, widest >> (8 - bits))
    assert stored_bytes(graph) == widest.size


@pytest.mark.parametrize(
    ("widths", "sizes"),
    [([8], [8]), ([3], [2, 1]), ([7], [4, 2, 1]), ([2, 4, 8], [2, 2, 4]), ([3, 4, 5], [2, 1, 1, 1])],
)
def test_sizes_of_pieces(widths: list[int], sizes: list[int]) -> None:
    assert piece_sizes(widths) == sizes


def test_choose_runs_one_of_its_branches() -> None:
    for index in range(3):
        graph = Graph()
        branches = []
        for value in (10, 20, 30):
            branch = Graph(graph)
            branches.append((branch, [branch.op("Mul", branch.constant(np.int32(value)), graph.constant(np.int32(2)))]))
        (found,) = outputs_of(graph, y=graph.choose(graph.constant(np.int64(index)), branches, "level")[0])
        assert found == (20, 40, 60)[index]
