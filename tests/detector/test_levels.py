"""One choice per image for all layers: the same network as with a choice per layer, its choices tied together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instaqnas.bits import Positions
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs, detector_layers, position_count
from instaqnas.policy.bit_config import sandwich, uniformly_random
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.integer import to_integer
from instaqnas.quant.switchable import calibrate
from instaqnas.seeds import SampleKey, uniform_numbers

LEVELS = [(2, 2), (3, 4), (8, 8)]
LAYERS = 47  # 1 + 13 + 13 + 8 + 12: stem, depthwise, pointwise, extras, heads


def build(positions: Positions) -> SwitchableSSD:
    torch.manual_seed(0)
    bits = DetectorBits(LEVELS, (8, 8), (8, 8), (8, 8), (8, 8), positions=positions)
    return SwitchableSSD(3, bits, image_size=64, width=0.125, extras_batch_norm=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(images: Tensor) -> tuple[SwitchableSSD, SwitchableSSD]:
    """A network with levels, and one with a choice for each layer, of the same weights."""
    levels, layers = build("network"), build("all")
    calibrate(levels, lambda: levels(images, torch.arange(6)[:, None] % 3))
    layers.load_state_dict(levels.state_dict())
    return levels.eval(), layers.eval()


def test_a_level_is_the_same_choice_in_all_layers(pair: tuple[SwitchableSSD, SwitchableSSD], images: Tensor) -> None:
    levels, layers = pair
    chosen = torch.tensor([2, 0, 1, 1, 0, 2])[:, None]
    with torch.no_grad():
        tied, apart = levels(images, chosen), layers(images, chosen.expand(-1, LAYERS))
        one_by_one = [levels(image[None], level[None]) for image, level in zip(images, chosen, strict=True)]
    assert torch.equal(tied.class_logits, apart.class_logits)
    assert torch.equal(tied.box_offsets, apart.box_offsets)
    torch.testing.assert_close(tied.class_logits, torch.cat([output.class_logits for output in one_by_one]))


def test_there_is_one_position_and_every_layer_has_its_own_steps_and_statistics_for_each_level() -> None:
    detector = build("network")
    assert detector.positions == ("network",)
    assert position_count("network") == 1
    assert len(detector.layers_at["network"]) == len(detector_layers(detector)) == LAYERS
    norms = [module for module in detector.modules() if isinstance(module, PerChoiceBatchNorm)]
    assert {norm.running_mean.shape[0] for norm in norms} == {3}
    steps = [p for name, p in detector.named_parameters() if name.endswith("input_quantizer.log_step")]
    assert [step.shape[0] for step in steps] == [3] * LAYERS


def test_a_level_costs_all_macs_at_its_bits(pair: tuple[SwitchableSSD, SwitchableSSD]) -> None:
    macs = sum(layer.macs for layer in detector_layers(pair[0]))
    costs = detector_costs(pair[0])
    assert costs.fixed == 0
    assert costs.table.tolist() == [[macs * 4, macs * 12, macs * 64]]
    assert costs.gbitops(torch.tensor([[0], [2]])).tolist() == [macs * 4 / 1e9, macs * 64 / 1e9]


def test_integers_compute_the_same_levels(pair: tuple[SwitchableSSD, SwitchableSSD], images: Tensor) -> None:
    chosen = torch.tensor([2, 0, 1, 1, 0, 2])[:, None]
    with torch.no_grad():
        expected, found = pair[0](images, chosen), to_integer(pair[0])(images, chosen)
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


def test_images_draw_whole_levels(images: Tensor) -> None:
    keys = [SampleKey(0, index, index) for index in range(6)]
    choices = uniformly_random(3, lambda keys: uniform_numbers(keys, position_count("network"), 0))(images, keys)
    assert choices.shape == (6, 1)
    mixed = sandwich([4, 12, 64], lambda keys: uniform_numbers(keys, 1, 0))(images, keys)
    assert mixed[[0, 1, 3, 4], 0].tolist() == [0, 2, 0, 2]  # cheapest and most expensive level in every step


def test_the_stem_of_a_level_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="cannot freeze the stem"):
        build("network").freeze_stem()


# --- Levels with bits of their own in every layer ---------------------------------------------------------------------

PER_LAYER = [[(4, 4)] + [(2, 2)] * 46, [(4, 4)] + [(2, 2), (3, 5)] * 23, [(8, 8)] * 27 + [(3, 1)] * 20]


def per_layer(levels: list[list[tuple[int, int]]]) -> SwitchableSSD:
    torch.manual_seed(0)
    eight = (8, 8)
    bits = DetectorBits([eight], eight, eight, eight, eight, positions="network", levels=levels)
    return SwitchableSSD(3, bits, image_size=64, width=0.125, extras_batch_norm=True)


@pytest.fixture(scope="module")
def mixed(images: Tensor) -> SwitchableSSD:
    detector = per_layer(PER_LAYER)
    calibrate(detector, lambda: detector(images, torch.arange(6)[:, None] % 3))
    return detector.eval()


def test_bits_of_a_level_are_those_of_its_list_in_the_order_of_the_layers(mixed: SwitchableSSD) -> None:
    layers = {layer.name: layer for layer in detector_layers(mixed)}
    assert mixed.choice_names == ("level0", "level1", "level2")
    assert mixed.layer_names[:3] == ("backbone.stem", "backbone.blocks.0.depthwise", "backbone.blocks.0.pointwise")
    assert mixed.layer_names[-1] == "class_heads.5"
    for place, name in enumerate(mixed.layer_names):
        assert layers[name].choices == tuple(level[place] for level in PER_LAYER)
    expected = [
        sum(layers[n].macs * w * a for n, (w, a) in zip(mixed.layer_names, level, strict=True)) for level in PER_LAYER
    ]
    assert detector_costs(mixed).table.tolist() == [expected]


def test_every_level_is_the_network_with_that_level_alone(mixed: SwitchableSSD, images: Tensor) -> None:
    for number, level in enumerate(PER_LAYER):
        alone = per_layer([level]).eval()
        own = alone.state_dict()
        for name, value in mixed.state_dict().items():
            per_level = own[name].shape != value.shape
            own[name] = value[number : number + 1] if per_level else value
        alone.load_state_dict(own)
        with torch.no_grad():
            expected = alone(images, torch.zeros(6, 1, dtype=torch.int64))
            found = mixed(images, torch.full((6, 1), number))
        torch.testing.assert_close(found.class_logits, expected.class_logits)
        torch.testing.assert_close(found.box_offsets, expected.box_offsets)


def test_levels_of_equal_bits_in_a_layer_still_have_their_own_steps(mixed: SwitchableSSD, images: Tensor) -> None:
    layer = mixed.backbone.blocks[0].depthwise  # 2/2 in the first two levels
    assert layer.choices[:2] == ((2, 2), (2, 2))
    before = mixed(images, torch.zeros(6, 1, dtype=torch.int64)).class_logits.detach()
    with torch.no_grad():
        layer.input_quantizer.log_step[1] += 1
    assert torch.equal(mixed(images, torch.zeros(6, 1, dtype=torch.int64)).class_logits.detach(), before)
    with torch.no_grad():
        layer.input_quantizer.log_step[1] -= 1


def test_integers_compute_levels_with_their_own_bits(mixed: SwitchableSSD, images: Tensor) -> None:
    chosen = torch.tensor([2, 0, 1, 1, 0, 2])[:, None]
    with torch.no_grad():
        expected, found = mixed(images, chosen), to_integer(mixed)(images, chosen)
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["backbone", "all", "network"])
def test_the_image_has_at_least_two_bits_where_other_layers_have_one(positions: Positions) -> None:
    choices = [(2, 1), (3, 2)]
    detector = SwitchableSSD(3, DetectorBits(choices, *[(8, 8)] * 4, positions=positions), image_size=64, width=0.125)
    stem, *others = detector_layers(detector)
    assert list(stem.choices) == [(2, 2), (3, 2)]
    assert tuple(choices) in [tuple(layer.choices) for layer in others]
