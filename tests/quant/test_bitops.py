"""Costs: torch's flop counter and hand arithmetic are the judges."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs, detector_layers
from instaqnas.policy.network import PolicyNet, policy_gbitops, policy_layers
from instaqnas.quant.bitops import CostTable, LayerCost, measure_layers
from instaqnas.quant.switchable import SwitchableConv2d, calibrate

PAPER = DetectorBits([(3, 4), (4, 4), (5, 4)], stem=(8, 8), depthwise=(8, 8), extras=(4, 4), heads=(8, 8))
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
EXTRAS = [(256, 512), (128, 256), (128, 256), (128, 256)]


def hand_macs(image_size: int, classes: int) -> dict[str, int]:
    """MACs of MobileNetV1-SSD per kind of layer: positions x kernel x input channels x output channels."""
    side = (image_size + 1) // 2
    macs = {"stem": side**2 * 9 * 3 * 32, "depthwise": 0, "pointwise": 0, "extras": 0, "heads": 0}
    channels, sources = 32, []
    for block, (out, stride) in enumerate(BLOCKS):
        side = (side + stride - 1) // stride
        macs["depthwise"] += side**2 * 9 * channels
        macs["pointwise"] += side**2 * channels * out
        channels = out
        if block in (10, 12):
            sources.append((side, channels))
    for inner, out in EXTRAS:
        macs["extras"] += side**2 * channels * inner
        side = (side + 1) // 2
        macs["extras"] += side**2 * 9 * inner * out
        channels = out
        sources.append((side, channels))
    macs["heads"] = sum(s**2 * 9 * c * 6 * (4 + classes) for s, c in sources)
    return macs


def kind(layer: LayerCost) -> str:
    kinds = [k for k in ("stem", "depthwise", "pointwise", "extras", "heads") if k in layer.name]
    assert len(kinds) == 1
    return kinds[0]


def matrix_flops(x: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def convolution_flops(_x: list[int], _scale: float, _zero: int, weight: list[int], *_: object, **shapes: list) -> int:
    return 2 * math.prod(shapes["out_shape"]) * math.prod(weight[1:])


BYTES = {  # products that torch's counter does not know
    torch.ops.onednn.qlinear_pointwise: matrix_flops,
    torch.ops.onednn.qconv2d_pointwise: convolution_flops,
}


def counted_macs(network: nn.Module, *args: Tensor) -> int:
    network.eval().requires_grad_(False)  # the counter follows modules by hooks on gradients otherwise
    with FlopCounterMode(display=False, custom_mapping=BYTES) as counter:
        network(*args)
    return counter.get_total_flops() // 2


def same_choice(k: int) -> Tensor:
    return torch.full((1, 13), k)


# --- MACs of the detector ---------------------------------------------------------------------------------------------


def test_macs_of_the_detector_equal_the_flop_counters_and_the_published_figure() -> None:
    detector = SwitchableSSD(21, DetectorBits.full_precision())
    layers = detector_layers(detector)
    total = sum(layer.macs for layer in layers)
    assert total == counted_macs(detector, torch.zeros(1, 3, 300, 300), same_choice(0))
    assert f"{total / 1e6:.2f}" == "1526.99"


def test_macs_of_every_kind_of_layer_equal_hand_arithmetic_and_the_published_figures() -> None:
    layers = detector_layers(SwitchableSSD(21, PAPER))
    assert len(layers) == 1 + 13 + 13 + 8 + 12
    assert len({layer.name for layer in layers}) == len(layers)
    measured = dict.fromkeys(("stem", "depthwise", "pointwise", "extras", "heads"), 0)
    for layer in layers:
        measured[kind(layer)] += layer.macs
    assert measured == hand_macs(300, 21)
    published = {"stem": 19.440, "depthwise": 31.722, "pointwise": 1004.044, "extras": 61.899, "heads": 409.882}
    assert {name: round(macs / 1e6, 3) for name, macs in measured.items()} == published


@pytest.mark.parametrize("image_size, classes", [(112, 4), (131, 21), (224, 2)])
def test_other_sizes_and_class_counts_equal_hand_arithmetic(image_size: int, classes: int) -> None:
    layers = detector_layers(SwitchableSSD(classes, DetectorBits.full_precision(), image_size=image_size))
    assert sum(layer.macs for layer in layers) == sum(hand_macs(image_size, classes).values())


@pytest.mark.parametrize("width, image_size", [(0.5, 112), (0.25, 150)])
def test_macs_under_a_width_multiplier_equal_the_flop_counters(width: float, image_size: int) -> None:
    detector = SwitchableSSD(4, DetectorBits.full_precision(), image_size=image_size, width=width)
    image = torch.zeros(1, 3, image_size, image_size)
    assert sum(layer.macs for layer in detector_layers(detector)) == counted_macs(detector, image, same_choice(0))


def test_a_batch_of_mixed_choices_computes_every_image_once() -> None:
    detector = SwitchableSSD(4, PAPER, image_size=112, width=0.25)
    one = sum(layer.macs for layer in detector_layers(detector))
    images, choices = torch.zeros(5, 3, 112, 112), torch.randint(3, (5, 13))
    assert counted_macs(detector, images, choices) == 5 * one


def test_parameters_of_all_layers_are_those_of_the_network() -> None:
    detector = SwitchableSSD(21, DetectorBits.full_precision())
    total = sum(layer.params for layer in detector_layers(detector))
    assert total == sum(p.numel() for p in detector.parameters())
    assert f"{total / 1e6:.1f}" == "9.5"


# --- GBitOps of the detector ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, gbitops", [(8, 97.727148032), (4, 24.431787008)])
def test_gbitops_at_uniform_bits_are_the_published_ones(bits: int, gbitops: float) -> None:
    costs = detector_costs(SwitchableSSD(21, DetectorBits.uniform(bits)))
    assert costs.gbitops(same_choice(0)).tolist() == [gbitops]
    assert costs.highest() == gbitops


def test_gbitops_in_the_paper_setting_are_the_published_ones() -> None:
    costs = detector_costs(SwitchableSSD(21, PAPER))
    choices = torch.tensor([0, 1, 2])[:, None].expand(3, 13)
    assert costs.gbitops(choices).tolist() == [42.54570496, 46.561882112, 50.578059264]
    assert costs.highest() == 50.578059264


def test_gbitops_of_random_configurations_equal_a_sum_over_layers() -> None:
    detector = SwitchableSSD(4, PAPER, image_size=112, width=0.5)
    layers, costs = detector_layers(detector), detector_costs(detector)
    fixed_bits = {"stem": 64, "depthwise": 64, "extras": 16, "heads": 64}
    choices = torch.randint(3, (20, 13), generator=torch.Generator().manual_seed(0))
    expected = []
    for configuration in choices.tolist():
        total, position = 0, 0
        for layer in layers:
            if kind(layer) == "pointwise":
                total += layer.macs * (12, 16, 20)[configuration[position]]
                position += 1
            else:
                total += layer.macs * fixed_bits[kind(layer)]
        expected.append(total / 1e9)
    assert costs.gbitops(choices).tolist() == expected
    assert costs.gbitops(choices).dtype == torch.float64


# --- The table itself -------------------------------------------------------------------------------------------------


def toy_layers() -> list[LayerCost]:
    return [
        LayerCost("a", 1_000_000_007, 1, 1, ((8, 8),)),
        LayerCost("b", 300, 1, 1, ((2, 2), (4, 3), (8, 8))),
        LayerCost("c", 5_000_000_003, 1, 1, ((4, 4),)),
        LayerCost("d", 70_000, 1, 1, ((2, 2), (4, 3), (32, 32))),
    ]


def test_bitops_of_a_layer_are_macs_times_both_bits() -> None:
    assert [toy_layers()[1].bitops(k) for k in range(3)] == [1200, 3600, 19200]
    assert toy_layers()[0].bitops() == 64_000_000_448


@pytest.mark.parametrize("positions", [("b", "d"), ("d", "b")])
def test_a_table_equals_a_naive_sum_for_every_configuration(positions: tuple[str, str]) -> None:
    products, macs = (4, 12), {"b": 300, "d": 70_000}
    last = {"b": 64, "d": 1024}
    costs = CostTable(toy_layers(), {name: [name] for name in positions})
    configurations = list(itertools.product(range(3), repeat=2))
    random.Random(0).shuffle(configurations)
    expected = []
    for configuration in configurations:
        total = 1_000_000_007 * 64 + 5_000_000_003 * 16
        for name, k in zip(positions, configuration, strict=True):
            total += macs[name] * (*products, last[name])[k]
        expected.append(total / 1e9)
    assert costs.gbitops(torch.tensor(configurations)).tolist() == expected
    assert costs.highest() == max(expected)


class TwoLayers(nn.Module):
    """Layers that run in another order than they are defined."""

    def __init__(self) -> None:
        super().__init__()
        self.late = SwitchableConv2d(4, 6, 1, [(2, 3), (4, 4)])
        self.early = SwitchableConv2d(3, 4, 3, [(8, 8)], stride=2, batch_norm=False, signed_input=True)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        return self.late(self.early(x), choice)


def test_layers_are_measured_in_the_order_in_which_they_run() -> None:
    network = TwoLayers()
    layers = measure_layers(network, lambda: network(torch.zeros(1, 3, 5, 7), torch.zeros(1, dtype=torch.int64)))
    assert [layer.name for layer in layers] == ["early", "late"]
    assert [layer.macs for layer in layers] == [3 * 4 * 9 * 3 * 4, 3 * 4 * 4 * 6]
    assert [layer.choices for layer in layers] == [((8, 8),), ((2, 3), (4, 4))]
    # early: weights, bias, two step sizes, zero-point; late: weights, two step sizes and two BatchNorm rows per choice
    assert [layer.params for layer in layers] == [108 + 4 + 3, 24 + 2 * 2 + 2 * 2 * 6]


def test_measuring_leaves_no_trace() -> None:
    network, x, choice = TwoLayers(), torch.rand(2, 3, 6, 6), torch.tensor([0, 1])
    calibrate(network, lambda: network(x, choice))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for training in (True, False):
        network.train(training)
        layers = measure_layers(network, lambda: network(x[:1], choice[:1]))
        assert network.training == network.late.training == training
    count = len(layers)
    network(x, choice)
    assert len(layers) == count
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_failing_forward_leaves_no_hooks_behind() -> None:
    network = TwoLayers().train()
    with pytest.raises(RuntimeError):
        measure_layers(network, lambda: network(torch.zeros(1, 99, 5, 7), torch.zeros(1, dtype=torch.int64)))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


# --- Policy -----------------------------------------------------------------------------------------------------------


def test_cost_of_the_paper_policy_is_the_published_one() -> None:
    policy = PolicyNet(13, 3, pool=2, width=16, bits=(8, 8))
    layers = policy_layers(policy, 300)
    assert f"{sum(layer.macs for layer in layers) / 1e6:.2f}" == "36.53"
    assert f"{policy_gbitops(policy, 300):.2f}" == "2.34"


@pytest.mark.parametrize("pool, macs", [(2, "36.53"), (8, "3.11")])
def test_macs_of_the_policy_equal_the_flop_counters(pool: int, macs: str) -> None:
    policy = PolicyNet(13, 3, pool=pool, width=16, bits=(32, 32))
    total = sum(layer.macs for layer in policy_layers(policy, 300))
    assert total == counted_macs(policy, torch.zeros(1, 3, 300, 300))
    assert f"{total / 1e6:.2f}" == macs
    assert policy_gbitops(policy, 300) == total * 1024 / 1e9
    assert f"{sum(p.numel() for p in policy.parameters()) / 1e6:.3f}" == "0.314"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_table_takes_configurations_from_cuda() -> None:
    choices = torch.randint(3, (4, 2))
    costs = CostTable(toy_layers(), {"b": ["b"], "d": ["d"]})
    assert torch.equal(costs.gbitops(choices.cuda()), costs.gbitops(choices))
