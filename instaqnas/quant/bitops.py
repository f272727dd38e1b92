"""MACs per layer, measured on real shapes once, and the GBitOps of a bit configuration as a table sum.

GBitOps = sum over layers of MACs x weight bits x activation bits / 1e9. Additions, pooling, BatchNorm and the
elementwise operations of quantization are not counted, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instaqnas.quant.quantizers import Affine
from instaqnas.quant.switchable import BitChoice, SwitchableConv2d


@dataclass(frozen=True)
class LayerCost:
    """One convolution: its name in the network, MACs per image, parameters, those that are weights, its bit choices."""

    name: str
    macs: int
    params: int
    weights: int
    choices: tuple[BitChoice, ...]

    def bitops(self, choice: int = 0) -> int:
        """Bit operations of one image at choice number `choice`."""
        weight_bits, activation_bits = self.choices[choice]
        return self.macs * weight_bits * activation_bits

    def weight_bytes(self, choice: int = 0) -> int:
        """Bytes of the weights at choice number `choice`, packed without gaps."""
        return (self.weights * self.choices[choice][0] + 7) // 8


@torch.no_grad()
def measure_layers(network: nn.Module, forward: Callable[[], object]) -> list[LayerCost]:
    """Costs of all convolutions of `network` in the order in which `forward()`, which sends one image, runs them."""
    names = {module: name for name, module in network.named_modules() if isinstance(module, SwitchableConv2d)}
    layers: list[LayerCost] = []

    def record(layer: SwitchableConv2d, _args: tuple, output: Affine) -> None:
        macs = output.y[0].numel() * math.prod(layer.weight.shape[-3:])
        params = sum(p.numel() for p in layer.parameters())
        weights = math.prod(layer.weight.shape[-4:])
        layers.append(LayerCost(names[layer], macs, params, weights, layer.choices))

    hooks = [layer.register_forward_hook(record) for layer in names]
    was_training = network.training
    try:
        network.eval()
        forward()
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return layers


class CostTable:
    """GBitOps of any bit configuration of one network.

    Args:
        layers: all its convolutions.
        positions: names of the layers that the policy controls, in the order of the columns of `choices`.
    """

    def __init__(self, layers: Sequence[LayerCost], positions: Sequence[str]) -> None:
        by_name = {layer.name: layer for layer in layers}
        self.positions = tuple(positions)
        self.fixed = sum(layer.bitops() for layer in layers if layer.name not in set(positions))
        rows = [[by_name[name].bitops(k) for k in range(len(by_name[name].choices))] for name in positions]
        self.table = torch.tensor(rows, dtype=torch.int64)  # [L, K]; integers keep the figures exact

    def gbitops(self, choices: Tensor) -> Tensor:
        """GBitOps per image [B], float64 on the CPU, of bit configurations `choices` [B, L]."""
        picked = self.table.gather(1, choices.cpu().T)  # [L, B]
        return (self.fixed + picked.sum(0)).double() / 1e9

    def gbitops_table(self) -> Tensor:
        """GBitOps of each choice at each position, float64 [L, K]; beside them there are `fixed` bit operations."""
        return self.table.double() / 1e9

    def lowest(self) -> float:
        """GBitOps of the cheapest configuration."""
        return (self.fixed + int(self.table.amin(1).sum())) / 1e9

    def highest(self) -> float:
        """GBitOps of the most expensive configuration."""
        return (self.fixed + int(self.table.amax(1).sum())) / 1e9
