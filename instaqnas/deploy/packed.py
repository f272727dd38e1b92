"""A file for deployment: bit-packed integer weights, and everything else that inference needs.

The weights of every choice are integers of its bit-width, packed without gaps and then deflated; nested weights are
stored once, at the widest bit-width. The file also holds the rescale of every layer and choice (folded BatchNorm), the
grids of the inputs, the default boxes, the class names, the settings of post-processing and the policy: inference needs
neither config nor training checkpoint. It is a zip container of `torch.save`, written and checked like training
checkpoints.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaqnas.bits import BitChoice, PolicyInput
from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config.reading import from_plain
from instaqnas.config.settings import EvalConfig
from instaqnas.detector.mobilenet import stem_channels
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.policy.budget import PricePoint
from instaqnas.policy.network import PolicyNet, effort_of, policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.integer import InputGrid, IntegerConv2d, integer_conv, replace_convolutions
from instaqnas.quant.quantizers import DoReFaWeights, NestedWeights
from instaqnas.quant.switchable import SwitchableConv2d

STAGE = "packed"
VERSION = 2
TABLES = ("step", "lowest", "highest", "scale", "shift")


@dataclass(frozen=True)
class Architecture:
    """Arguments of `SwitchableSSD` and `PolicyNet`, to build their layers again."""

    bits: DetectorBits
    image_size: int
    width: float
    extras_batch_norm: bool
    policy_pool: int
    policy_width: int
    policy_bits: BitChoice
    policy_input: PolicyInput = "image"  # the default is for files that predate the setting
    policy_effort: bool = False  # likewise

    def detector(self, classes: int) -> SwitchableSSD:
        """A detector with untrained weights; `classes` counts the background."""
        detector = SwitchableSSD(
            classes,
            self.bits,
            image_size=self.image_size,
            width=self.width,
            extras_batch_norm=self.extras_batch_norm,
        )
        if self.policy_input == "stem":
            detector.freeze_stem()
        return detector

    def policy(self, positions: int) -> PolicyNet:
        """A policy with untrained weights."""
        return PolicyNet(
            positions,
            len(self.bits.names),
            pool=self.policy_pool,
            width=self.policy_width,
            bits=self.policy_bits,
            stem_channels=stem_channels(self.width) if self.policy_input == "stem" else None,
            effort=effort_of(self.bits.bit_products) if self.policy_effort else None,
        )

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Architecture:
        """The inverse of `dataclasses.asdict`."""
        bits = dict(plain["bits"])
        for group in ("stem", "depthwise", "extras", "heads"):
            bits[group] = tuple(bits[group])
        bits["choices"] = [tuple(choice) for choice in bits["choices"]]
        if bits.get("levels") is not None:  # files that predate levels have none
            bits["levels"] = [[tuple(choice) for choice in level] for level in bits["levels"]]
        return Architecture(**{**plain, "bits": DetectorBits(**bits), "policy_bits": tuple(plain["policy_bits"])})


@dataclass(frozen=True)
class IntegerModel:
    """A detector and its policy, integer-exact and in eval mode.

    Args:
        class_names: without background.
        costs: GBitOps of the detector's configurations.
        policy_gbitops: cost of one decision.
        settings: of post-processing.
        prices: of the policy for other budgets; empty if its run has none.
    """

    detector: SwitchableSSD
    policy: PolicyNet
    class_names: tuple[str, ...]
    costs: CostTable
    policy_gbitops: float
    settings: EvalConfig
    prices: tuple[PricePoint, ...] = ()


# --- Bits -------------------------------------------------------------------------------------------------------------


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Packs integers 0 to 2^bits - 1, uint8 [n], 1 <= bits <= 8, into a stream without gaps, lowest bit first."""
    planes = np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(planes, bitorder="little").tobytes()


def unpack_bits(stream: bytes, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 [count].

    Raises: ValueError if the stream has another length.
    """
    if len(stream) != (count * bits + 7) // 8:
        raise ValueError(f"{len(stream)} bytes for {count} values of {bits} bits")
    planes = np.unpackbits(np.frombuffer(stream, np.uint8), count=count * bits, bitorder="little")
    return np.packbits(planes.reshape(count, bits), axis=1, bitorder="little")[:, 0]


# --- Layers -----------------------------------------------------------------------------------------------------------


def _packed_layer(layer: SwitchableConv2d, name: str) -> dict[str, Any]:
    """Weight streams and tables of a layer; `name` is for messages."""
    integer = integer_conv(layer, name)
    is_odd = isinstance(layer.weight_quantizer, NestedWeights | DoReFaWeights)  # levels 2q + 1
    values = (integer.weight.int() - 1) >> 1 if is_odd else integer.weight.int()
    widths = [weight_bits for weight_bits, _ in layer.choices]
    is_nested = isinstance(layer.weight_quantizer, NestedWeights)
    if is_nested:
        widest = widths.index(max(widths))
        assert all(torch.equal(values[k], values[widest] >> (widths[widest] - bits)) for k, bits in enumerate(widths))
        values, widths = values[widest : widest + 1], widths[widest : widest + 1]
    streams = [
        zlib.compress(pack_bits((value + 2 ** (bits - 1)).to(torch.uint8).flatten().numpy(), bits), 9)
        for value, bits in zip(values, widths, strict=True)
    ]
    return {
        "odd": is_odd,
        "nested": is_nested,
        "streams": [torch.frombuffer(bytearray(stream), dtype=torch.uint8) for stream in streams],
        **{table: getattr(integer, table) for table in TABLES},
    }


def _unpacked_layer(layer: SwitchableConv2d, packed: dict[str, Any]) -> IntegerConv2d:
    """The integer convolution with shapes and bits of `layer` and the values of `packed`."""
    choices, shape = len(layer.choices), layer.weight.shape[-4:]
    widths = [weight_bits for weight_bits, _ in layer.choices]
    stored = [max(widths)] if packed["nested"] else widths
    values = []
    for stream, bits in zip(packed["streams"], stored, strict=True):
        size = (shape.numel() * bits + 7) // 8
        inflated = zlib.decompressobj().decompress(stream.numpy().tobytes(), size + 1)
        unsigned = torch.from_numpy(unpack_bits(inflated, bits, shape.numel()).astype(np.int16))
        values.append(unsigned.view(shape) - 2 ** (bits - 1))
    if packed["nested"]:
        values = [values[0] >> (stored[0] - bits) for bits in widths]
    levels = torch.stack(values)
    tables = {table: packed[table] for table in TABLES}
    for name, table in tables.items():
        wanted = (choices, shape[0]) if name in ("scale", "shift") else (choices,)
        if table.shape != wanted or table.dtype != torch.float32 or not torch.isfinite(table).all():
            raise ValueError(f"{name}: expected finite float32 {list(wanted)}")
    return IntegerConv2d(
        layer.choices,
        2 * levels + 1 if packed["odd"] else levels,
        InputGrid(tables["step"], tables["lowest"], tables["highest"]),
        tables["scale"],
        tables["shift"],
        stride=layer.stride,
        groups=layer.groups,
    )


# --- Files ------------------------------------------------------------------------------------------------------------


def save_packed(
    path: Path,
    detector: SwitchableSSD,
    policy: PolicyNet,
    architecture: Architecture,
    class_names: Sequence[str],
    settings: EvalConfig,
    prices: Sequence[PricePoint] = (),
) -> None:
    """Writes the deployment file of a trained detector and its policy. Moves both to the CPU.

    Args:
        path: file to write.
        detector, policy: trained networks.
        architecture: builds networks of their shapes.
        class_names: without background.
        settings: of post-processing.
        prices: of the policy for other budgets, as its checkpoint has them.

    Raises: InputError if a layer has no integer form (`integer_conv`); TrainingError if the file cannot be written.
    """
    networks = {"detector": detector, "policy": policy}
    save_checkpoint(
        path,
        {
            "stage": STAGE,
            "version": VERSION,
            "architecture": _listed(asdict(architecture)),
            "classes": list(class_names),
            "eval": asdict(settings),
            "default_boxes_cxcywh": detector.default_boxes_cxcywh.cpu(),
            "prices": [list(point) for point in prices],
            "effort": None if policy.effort is None else policy.effort.cpu(),
            "networks": {
                kind: {name: _packed_layer(layer, f"{kind}.{name}") for name, layer in _convolutions(network.cpu())}
                for kind, network in networks.items()
            },
        },
    )


def load_packed(path: Path) -> IntegerModel:
    """Reads a file of `save_packed`.

    Raises: InputError if the file is missing, damaged, or not of this format.
    """
    state = load_checkpoint(path)
    if state["stage"] != STAGE or state.get("version") != VERSION:
        raise InputError(f"{path}: not a packed file of version {VERSION}; instaqnas.tools.pack writes them")
    where = "architecture"
    try:
        architecture = Architecture.from_plain(state["architecture"])
        class_names = tuple(map(str, state["classes"]))
        with torch.device("meta"):
            detector = architecture.detector(len(class_names) + 1)
            policy = architecture.policy(len(detector.positions))
        costs, policy_cost = detector_costs(detector), policy_gbitops(policy, detector.image_size)
        for kind, network in (("detector", detector), ("policy", policy)):
            packed, layers = dict(state["networks"][kind]), {}
            for name, layer in _convolutions(network):
                where = f"{kind}.{name}"
                layers[name] = _unpacked_layer(layer, packed.pop(name))
            if packed:
                raise ValueError(f"unknown layers {', '.join(packed)}")
            replace_convolutions(network, layers)
        where = "default_boxes_cxcywh"
        boxes = state["default_boxes_cxcywh"]
        _check_like(boxes, detector.default_boxes_cxcywh)
        effort = None
        if policy.effort is not None:
            where = "effort"
            # Files that predate the table have the one that `PolicyNet` starts from.
            effort = state.get(
                "effort", torch.tensor(effort_of(architecture.bits.bit_products)).expand(policy.effort.shape)
            )
            _check_like(effort, policy.effort)
        where = "prices"  # files that predate them have none
        prices = tuple(PricePoint(float(price), float(gbitops)) for price, gbitops in state.get("prices", []))
        where = "eval"
        settings = from_plain({"data": {"roots": [str(path)]}, "eval": state["eval"]}).eval  # roots have no default
    except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, zlib.error) as error:
        raise InputError(f"{path}: {where}: invalid ({error}); pack the run again") from error
    detector.default_boxes_cxcywh = boxes
    policy.effort = effort
    return IntegerModel(detector.eval(), policy.eval(), class_names, costs, policy_cost, settings, prices)


def _check_like(tensor: Tensor, expected: Tensor) -> None:
    """Raises ValueError if `tensor` is not float32 of the shape of `expected`."""
    if tensor.shape != expected.shape or tensor.dtype != torch.float32:
        raise ValueError(f"expected float32 {list(expected.shape)}")


def _convolutions(network: nn.Module) -> list[tuple[str, SwitchableConv2d]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, SwitchableConv2d)]


def _listed(value: Any) -> Any:
    """`value` with lists for tuples, as a checkpoint's reader returns it."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
