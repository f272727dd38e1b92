"""MACs of every layer, and the GBitOps of bit configurations.

GBitOps = sum over layers of MACs x weight bits x activation bits / 1e9. MACs are measured once, by sending one image
through the network; the cost of a configuration is then a sum over a table. As usual, only convolutions are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instaqnas.bits import BitChoice
from instaqnas.quant.affine import Affine
from instaqnas.quant.switchable import SwitchableConv2d


@dataclass(frozen=True)
class LayerCost:
    """Cost of one convolution.

    name: its name in the network.
    macs: multiply-accumulates per image.
    params: number of parameters, including step sizes and BatchNorm.
    weights: number of elements in the weight of one choice.
    choices: its K bit choices.
    """

    name: str
    macs: int
    params: int
    weights: int
    choices: tuple[BitChoice, ...]

    def bitops(self, choice: int = 0) -> int:
        """MACs x weight bits x activation bits of one image at choice k = `choice`."""
        weight_bits, activation_bits = self.choices[choice]
        return self.macs * weight_bits * activation_bits

    def weight_bytes(self, choice: int = 0) -> int:
        """Bytes of the bit-packed weight at choice k = `choice`."""
        return (self.weights * self.choices[choice][0] + 7) // 8


@torch.no_grad()
def measure_layers(network: nn.Module, forward: Callable[[], object]) -> list[LayerCost]:
    """Costs of all convolutions of `network`, in the order in which they run.

    `forward()` sends one image through the network, which is in evaluation mode during the call.
    """
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
        layers: costs of all convolutions.
        positions: for each of the L positions, in the order of the columns of `choices`: its name, and the names of the
            layers that share its choice.

    Attributes:
        table: bit operations [L, K] of each choice at each position, int64.
        fixed: bit operations of all other layers.
    """

    def __init__(self, layers: Sequence[LayerCost], positions: Mapping[str, Sequence[str]]) -> None:
        by_name = {layer.name: layer for layer in layers}
        self.positions = tuple(positions)
        controlled = {name for names in positions.values() for name in names}
        self.fixed = sum(layer.bitops() for layer in layers if layer.name not in controlled)
        rows = []
        for names in positions.values():
            choices = range(len(by_name[names[0]].choices))
            rows.append([sum(by_name[name].bitops(k) for name in names) for k in choices])
        self.table = torch.tensor(rows, dtype=torch.int64)  # integers: sums stay exact

    def gbitops(self, choices: Tensor) -> Tensor:
        """GBitOps [B], float64 on the CPU, of the bit configurations `choices` [B, L]."""
        picked = self.table.gather(1, choices.cpu().T)  # [L, B]
        return (self.fixed + picked.sum(0)).double() / 1e9

    def gbitops_table(self) -> Tensor:
        """GBitOps of each choice at each position, float64 [L, K], without the `fixed` part."""
        return self.table.double() / 1e9

    def lowest(self) -> float:
        """GBitOps of the cheapest configuration."""
        return (self.fixed + int(self.table.amin(1).sum())) / 1e9

    def highest(self) -> float:
        """GBitOps of the most expensive configuration."""
        return (self.fixed + int(self.table.amax(1).sum())) / 1e9
