"""Integer inference equals fake quantization to the last bit; its sums equal an int64 convolution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.bits import BitChoice
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.errors import InputError
from instaqnas.policy.network import PolicyNet
from instaqnas.quant import integer
from instaqnas.quant.affine import Affine
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.byte_conv import has_byte_products, in_floating_point
from instaqnas.quant.integer import InputGrid, IntegerConv2d, integer_conv, to_integer
from instaqnas.quant.quantizers import Quantizer
from instaqnas.quant.switchable import SwitchableConv2d, calibrate
from tests.quant.convolution_shapes import needs_bytes


@pytest.fixture(autouse=True)
def _reference_in_floating_point() -> Iterator[None]:
    with in_floating_point():
        yield


ENGINES = {"32-bit products": False, "bytes": True}
CHOICES = {"K=1": [(8, 8)], "K=5": [(2, 2), (8, 3), (3, 8), (8, 8), (6, 5)]}


@dataclass(frozen=True)
class Case:
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    signed_input: bool = False
    batch_norm: bool = True
    size: tuple[int, int] = (7, 9)


CASES = {
    "pointwise": Case(5, 7, 1),
    "strided pointwise, bias": Case(5, 3, 1, stride=2, batch_norm=False),
    "signed pointwise": Case(5, 7, 1, signed_input=True, size=(6, 4)),
    "3x3": Case(4, 6, 3, size=(8, 5)),
    "3x3 of one channel and pixel": Case(1, 2, 3, size=(1, 1)),
    "strided 3x3, bias": Case(4, 6, 3, stride=2, batch_norm=False),
    "signed strided 3x3 as the stem of the detector": Case(3, 8, 3, stride=2, signed_input=True, size=(10, 10)),
    "signed strided 7x7 as the stem of the policy": Case(3, 4, 7, stride=2, signed_input=True, size=(9, 12)),
    "signed 7x7, larger than the map": Case(2, 3, 7, signed_input=True, size=(2, 3)),
    "depthwise": Case(5, 5, 3, groups=5),
    "strided depthwise, even": Case(5, 5, 3, stride=2, groups=5, size=(8, 6)),
    "strided depthwise, odd": Case(5, 5, 3, stride=2, groups=5),
    "signed depthwise, bias": Case(3, 3, 3, groups=3, signed_input=True, batch_norm=False),
}
KINDS = {
    "lsq_plus": {},
    "lsq_plus separate": {"weights": "separate"},
    "lsq_plus nested per channel": {"weights": "nested", "per_channel": True},
    "lsq per channel": {"quantizer": "lsq", "per_channel": True},
    "lsq separate per channel": {"quantizer": "lsq", "weights": "separate", "per_channel": True},
    "lsq nested": {"quantizer": "lsq", "weights": "nested"},
    "pact": {"quantizer": "pact"},
    "pact separate": {"quantizer": "pact", "weights": "separate"},
    "dorefa": {"quantizer": "dorefa"},
    "dorefa separate": {"quantizer": "dorefa", "weights": "separate"},
}


@torch.no_grad()
def build(case: Case, choices: list[BitChoice], **settings: str | bool) -> SwitchableConv2d:
    """A layer in evaluation whose parameters and statistics all differ, so that no mix-up can hide."""
    torch.manual_seed(0)
    layer = SwitchableConv2d(
        case.in_channels,
        case.out_channels,
        case.kernel_size,
        choices,
        stride=case.stride,
        groups=case.groups,
        batch_norm=case.batch_norm,
        signed_input=case.signed_input,
        **settings,
    ).eval()
    layer.weight.copy_(0.6 * torch.randn(layer.weight.shape))
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if hasattr(quantizer, "log_alpha"):
            quantizer.log_alpha.sub_(1.5)  # ten clips nothing
    layer.initialize_steps(inputs(case, 8, seed=1))
    for name, parameter in layer.named_parameters():
        if name.endswith(("log_step", "log_alpha")):
            parameter += 0.3 * torch.randn(parameter.shape)
    if layer.norm is None:
        layer.bias.normal_()
    else:
        for tensor, offset in ((layer.norm.weight, 1), (layer.norm.bias, 0), (layer.norm.running_mean, 0)):
            tensor.copy_(offset + 0.5 * torch.randn(tensor.shape))
        layer.norm.running_var.uniform_(0.5, 1.5)
    return layer


def inputs(case: Case, images: int, *, seed: int = 2) -> Tensor:
    """Not centred, so that a learned zero-point is not 0."""
    g = torch.Generator().manual_seed(seed)
    return 1.3 * torch.randn(images, case.in_channels, *case.size, generator=g) + 0.4


def int64_convolution(levels: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    """Convolution of one image's integers [C, H, W], padded with 0 to keep the size, by a loop over the kernel.

    weight: [out, C / groups, k, k], groups 1 or C.
    """
    side = weight.shape[-1]
    levels, weight = F.pad(levels.long(), [side // 2] * 4), weight.long()
    total = 0
    for i in range(side):
        for j in range(side):
            window = levels[:, i : levels.shape[1] - side + 1 + i : stride, j : levels.shape[2] - side + 1 + j : stride]
            if groups == 1:
                total = total + (weight[:, :, i, j, None, None] * window).sum(1)
            else:
                total = total + weight[:, 0, i, j, None, None] * window
    return total


def use_engine(monkeypatch: pytest.MonkeyPatch, by_bytes: bool) -> None:
    """Has integer layers multiply as on a machine with or without products of bytes."""
    if by_bytes and not has_byte_products():
        pytest.skip("no fast products of bytes on this machine")
    monkeypatch.setattr(integer, "has_byte_products", lambda: by_bytes)


# --- One layer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_equals_fake_quantization(
    layer: SwitchableConv2d, whole: IntegerConv2d, x: Tensor, picked: list[int]
) -> None:
    choice = torch.tensor(picked)
    known = choice if len(layer.choices) > 1 else None
    levels, _ = layer.input_quantizer(x, known)
    weight, _ = layer.weight_quantizer(layer.weight)
    stored, y = whole.levels(x, known), whole(x, known)
    assert stored.dtype == torch.uint8
    offset = whole.offset[choice].view(-1, 1, 1, 1)
    assert torch.equal(stored - offset, levels)
    for image, k in enumerate(picked):
        sums = int64_convolution(levels[image], weight[k], layer.stride, layer.groups)
        assert torch.equal(y.y[image].long(), sums)
    assert torch.equal(y.value(), layer(x, known).value())


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_levels_sums_and_outputs_are_those_of_fake_quantization(
    case: Case, kind: dict, choices: list[BitChoice]
) -> None:
    layer = build(case, choices, **kind)
    whole = integer_conv(layer, "layer")
    last = len(choices) - 1
    mixed = [last, 0, last // 2, last, 0, min(1, last)]
    for picked in (mixed, [0, 0, 0], [last] * 2, [last // 2]):
        assert_equals_fake_quantization(layer, whole, inputs(case, len(picked)), picked)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("case", ["pointwise", "strided 3x3, bias", "depthwise"])
def test_activations_of_one_bit_are_those_of_fake_quantization(case: str, kind: dict) -> None:
    layer = build(CASES[case], [(2, 1), (3, 1), (2, 2)], **kind)
    assert_equals_fake_quantization(layer, integer_conv(layer, "layer"), inputs(CASES[case], 4), [0, 2, 1, 0])


@pytest.mark.parametrize("by_bytes", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("kind", ["lsq_plus nested per channel", "dorefa separate"])
@pytest.mark.parametrize("case", ["pointwise", "strided 3x3, bias", "signed strided 7x7 as the stem of the policy"])
def test_every_engine_multiplies_the_same(
    case: str, kind: str, by_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, by_bytes)
    layer = build(CASES[case], CHOICES["K=5"], **KINDS[kind])
    picked = [3, 0, 2, 4, 1, 3]
    assert_equals_fake_quantization(layer, integer_conv(layer, "layer"), inputs(CASES[case], 6), picked)


@pytest.mark.parametrize("case", ["pointwise", "3x3", "strided depthwise, odd"])
@pytest.mark.parametrize("kind", ["lsq_plus", "dorefa"])
def test_a_layer_reads_what_an_integer_layer_before_it_writes(case: str, kind: str) -> None:
    case, choices = CASES[case], CHOICES["K=5"]
    first = build(Case(2, case.in_channels, 3, signed_input=True), choices, **KINDS[kind])
    second = build(case, choices, **KINDS[kind])
    x, choice = inputs(Case(2, 2, 3), 5), torch.tensor([4, 0, 1, 3, 1])
    whole = [integer_conv(layer, "layer") for layer in (first, second)]
    with torch.no_grad():
        expected = second(first(x, choice), choice.flip(0)).value()
    assert torch.equal(whole[1](whole[0](x, choice), choice.flip(0)).value(), expected)


def test_an_affine_input_with_one_factor_for_all_is_absorbed_too() -> None:
    case = CASES["pointwise"]
    layer = build(case, CHOICES["K=5"])
    x = Affine(inputs(case, 3), torch.full((1, 1), 0.7), torch.linspace(-1, 1, 5)[None])
    choice = torch.tensor([3, 0, 3])
    with torch.no_grad():
        assert torch.equal(integer_conv(layer, "layer")(x, choice).value(), layer(x, choice).value())


@torch.no_grad()
def test_positions_in_the_middle_between_two_levels_go_to_the_even_one() -> None:
    """Where scale or shift are half a step; times the reciprocal of a step size they would not always be."""
    layer = build(Case(2, 1, 1), [(8, 8)] * 100)
    step = layer.input_quantizer.grid(1).step  # [K, 1]
    assert (step * step.reciprocal() != 1).any()
    y = torch.arange(-7, 250, 2).expand(100, 2, -1)[..., None]
    x = Affine(y.int(), torch.cat([step / 2, step / 2], 1), torch.cat([0 * step, 4 * step], 1))
    expected = [[max(0, round(value / 2 + shift)) for value in range(-7, 250, 2)] for shift in (0, 4)]
    choice = torch.arange(100)
    for levels in (
        layer.input_quantizer(x, choice)[0],
        integer_conv(layer, "layer").levels(x, choice).float(),
    ):
        assert torch.equal(levels[..., 0], torch.tensor(expected).float().expand(100, -1, -1))


def unit_layer(case: Case, weight: float, zero_point: float = 0.0) -> IntegerConv2d:
    """At 8 bits, step sizes 1, all weights the same."""
    layer = SwitchableConv2d(
        case.in_channels, case.out_channels, case.kernel_size, [(8, 8)], groups=case.groups,
        batch_norm=False, signed_input=case.signed_input,
    ).eval()  # fmt: skip
    with torch.no_grad():
        layer.weight.fill_(weight)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            quantizer.log_step.zero_()
        if case.signed_input:
            layer.input_quantizer.zero_point.fill_(zero_point)
    return integer_conv(layer, "layer")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("zero_point", [-128.0, -100.4, 0.0, 100.0, 127.0])
def test_padding_is_the_zero_point(zero_point: float, groups: int) -> None:
    case = Case(2, 2, 3, groups=groups, signed_input=True)
    layer = unit_layer(case, 1.0, zero_point)
    value = -2.0 if zero_point > 0 else 2.0  # on the grid of zero-point 127: -255 to 0; of -128: 0 to 255
    y = layer(torch.full((1, 2, 3, 3), value)).y
    inside = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]])  # pixels of the map under the kernel
    assert torch.equal(y[0, 0].long(), inside * int(value) * (2 if groups == 1 else 1))


def test_8_unsigned_bits_are_stored_as_they_are() -> None:
    x = torch.tensor([-3.0, 0, 0.4, 1, 127, 128, 254, 255, 300]).view(1, 1, 3, 3)
    levels = [0, 0, 0, 1, 127, 128, 254, 255, 255]
    layer = unit_layer(Case(1, 1, 1), -200.0)
    assert layer.levels(x, None).flatten().tolist() == levels
    assert layer(x).y.flatten().tolist() == [-128 * level for level in levels]


@pytest.mark.parametrize("by_bytes", ENGINES.values(), ids=ENGINES.keys())
def test_sums_do_not_overflow(by_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, by_bytes)
    grid = InputGrid(torch.ones(1), torch.zeros(1), torch.full((1,), 255.0))
    weight = torch.full((1, 2, 1024, 3, 3), 255)
    weight[:, 1] = -255
    layer = IntegerConv2d([(8, 8)], weight, grid, torch.ones(1, 2), torch.zeros(1, 2), stride=1, groups=1)
    x = torch.full((1, 1024, 3, 3), 255.0)
    x[0, 17, 1, 1] = 254
    y = layer(x).y[0]
    whole = 255 * 255 * 9 * 1024 - 255  # 599,270,145, more than float32 holds to the last digit
    error = 64 if by_bytes else 0
    assert y[:, 1, 1].tolist() == pytest.approx([whole, -whole], rel=0, abs=error)
    assert y[0, 0, 0].item() == pytest.approx(255 * 255 * 4 * 1024 - 255, rel=0, abs=error)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_image_does_not_depend_on_the_rest_of_its_batch(case: Case) -> None:
    whole = integer_conv(build(case, CHOICES["K=5"]), "layer")
    x, choice = inputs(case, 6), torch.tensor([2, 0, 4, 0, 2, 3])
    together = whole(x, choice).value()
    for part in ([0], [3, 1], [5, 4, 2]):
        assert torch.equal(whole(x[part], choice[part]).value(), together[part])


# --- Whole networks ---------------------------------------------------------------------------------------------------

EXACT_CHOICES = [(2, 2), (3, 8), (8, 4)]
DETECTORS = {
    "pointwise": {},
    "backbone": {"positions": "backbone", "quantizer": "dorefa", "weights": "separate"},
    "backbone+extras": {"positions": "backbone+extras", "quantizer": "pact"},
    "all, nested": {"positions": "all", "weights": "nested", "per_channel": True},
    "all, separate": {"positions": "all", "quantizer": "lsq", "weights": "separate"},
}


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(seed)).byte()


def settle(network: nn.Module, forward: Callable[[], object]) -> None:
    """Step sizes and running statistics as after a long training on the images of `forward`."""
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.momentum = 1.0
    calibrate(network, forward)
    network.eval()


def random_choices(detector: SwitchableSSD, count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(len(detector.choice_names), (count, len(detector.positions)), generator=g)


def settled_detector(**settings: str | bool) -> SwitchableSSD:
    torch.manual_seed(0)
    fixed = {"stem": (8, 8), "depthwise": (8, 8), "extras": (4, 4), "heads": (8, 8)}
    bits = DetectorBits(EXACT_CHOICES, **fixed, **settings)
    detector = SwitchableSSD(4, bits, image_size=64, width=0.125)
    settle(detector, lambda: detector(random_images(6), random_choices(detector, 6, seed=1)))
    return detector


def settled_policy(bits: BitChoice = (8, 8)) -> PolicyNet:
    torch.manual_seed(0)
    policy = PolicyNet(13, 3, pool=2, width=4, bits=bits)
    settle(policy, lambda: policy(random_images(6)))
    return policy


@pytest.mark.parametrize("settings", DETECTORS.values(), ids=DETECTORS.keys())
@torch.no_grad()
def test_a_detector_gives_the_same_outputs_under_random_configurations(settings: dict) -> None:
    detector = settled_detector(**settings)
    whole = to_integer(detector)
    assert not [module for module in whole.modules() if isinstance(module, SwitchableConv2d)]
    images, seen = random_images(4, seed=5), []
    for seed in range(3):
        choices = random_choices(detector, 4, seed)
        expected, found = detector(images, choices), whole(images, choices)
        assert torch.equal(found.box_offsets, expected.box_offsets)
        assert torch.equal(found.class_logits, expected.class_logits)
        for image in range(4):
            alone = whole(images[image : image + 1], choices[image : image + 1])
            assert torch.equal(alone.box_offsets[0], found.box_offsets[image])
            assert torch.equal(alone.class_logits[0], found.class_logits[image])
        seen.append(expected.class_logits)
    assert not torch.allclose(seen[0], seen[1])  # configurations matter at all


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 8)])
@torch.no_grad()
def test_a_policy_gives_the_same_logits(bits: BitChoice) -> None:
    policy, images = settled_policy(bits), random_images(5, seed=5)
    whole = to_integer(policy)
    logits = whole(images)
    assert torch.equal(logits, policy(images))
    assert logits.std() > 0
    for image in range(5):
        assert torch.equal(whole(images[image : image + 1])[0], logits[image])


@torch.no_grad()
def test_a_policy_on_the_stem_sees_and_answers_the_same() -> None:
    detector = settled_detector()
    detector.freeze_stem()
    torch.manual_seed(0)
    policy = PolicyNet(13, 3, pool=4, width=4, bits=(8, 8), stem_channels=8)
    settle(policy, lambda: policy(detector.observe(random_images(6)).input))
    whole, whole_policy, images = to_integer(detector), to_integer(policy), random_images(5, seed=5)
    observation, expected = whole.observe(images), detector.observe(images)
    assert torch.equal(observation.input, expected.input)
    logits = whole_policy(observation.input)
    assert torch.equal(logits, policy(expected.input))
    assert logits.std() > 0
    choices = random_choices(detector, 5, seed=5)
    found = whole(images, choices, observation.stem)
    assert torch.equal(found.class_logits, detector(images, choices, expected.stem).class_logits)
    assert torch.equal(found.class_logits, whole(images, choices).class_logits)


@needs_bytes
@torch.no_grad()
def test_an_integer_layer_that_has_run_can_be_copied() -> None:
    layer = SwitchableConv2d(4, 6, 3, [(4, 4), (2, 2)]).eval()
    x, choice = torch.rand(2, 4, 5, 5), torch.tensor([1, 0])
    layer.initialize_steps(x)
    whole = integer_conv(layer, "layer")
    y = whole(x, choice).value()
    assert torch.equal(copy.deepcopy(whole)(x, choice).value(), y)


def test_the_network_itself_stays_as_it_was() -> None:
    policy = settled_policy().train()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    whole = to_integer(policy)
    assert not whole.training
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


# --- What has no integers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [[(32, 32)], [(32, 8)], [(8, 32)], [(4, 4), (32, 4)], [(4, 4), (4, 32)]])
def test_full_precision_is_refused(choices: list[BitChoice]) -> None:
    layer = build(CASES["pointwise"], choices)
    with pytest.raises(InputError, match="^some.layer: bits .*: 32 means full precision, which has no integers$"):
        integer_conv(layer, "some.layer")


@pytest.mark.parametrize("part", ["weight_quantizer", "input_quantizer"])
@pytest.mark.parametrize("kind", ["lsq_plus", "lsq_plus nested per channel"])
def test_an_uncalibrated_layer_is_refused(kind: str, part: str) -> None:
    layer = build(CASES["3x3"], CHOICES["K=5"], **KINDS[kind])
    quantizer: Quantizer = getattr(layer, part)
    with torch.no_grad():
        quantizer.log_step[-1] = torch.nan
    with pytest.raises(InputError, match="^some.layer: not calibrated"):
        integer_conv(layer, "some.layer")


PARTS_OF_A_LAYER = ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


@pytest.mark.parametrize("part", PARTS_OF_A_LAYER)
@pytest.mark.parametrize("quantizer", ["lsq", "dorefa"])
def test_a_layer_that_is_not_finite_is_refused(quantizer: str, part: str) -> None:
    layer = build(CASES["3x3"], CHOICES["K=5"], quantizer=quantizer)
    layer.state_dict()[part][0] = torch.nan
    with pytest.raises(InputError, match="^some.layer: its weight, bias or BatchNorm has NaN or infinite values$"):
        integer_conv(layer, "some.layer")


def test_a_zero_point_that_is_not_finite_is_refused() -> None:
    layer = build(CASES["signed pointwise"], CHOICES["K=5"])
    with torch.no_grad():
        layer.input_quantizer.zero_point[1] = torch.nan
    with pytest.raises(InputError, match="^some.layer: not calibrated"):
        integer_conv(layer, "some.layer")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", ["pointwise", "signed pointwise", "strided 3x3, bias"])
def test_an_input_that_is_not_finite_is_refused(case: str, value: float) -> None:
    whole = integer_conv(build(CASES[case], CHOICES["K=5"]), "layer")
    x, choice = inputs(CASES[case], 3), torch.tensor([0, 3, 1])
    damaged = x.clone()
    damaged[1, 2, 0, 1] = value
    ones, zeros = torch.ones(3, x.shape[1]), torch.zeros(3, x.shape[1])
    not_finite = torch.where(torch.arange(3)[:, None] == 1, value, ones)
    for bad in (damaged, Affine(damaged, ones, zeros), Affine(x, not_finite, zeros), Affine(x, ones, not_finite)):
        with pytest.raises(ValueError, match="the input has NaN or infinite values, which have no integers"):
            whole(bad, choice)
    assert whole(Affine(x, ones, zeros), choice).value().isfinite().all()


@pytest.mark.parametrize("zero_point", [-129.0, 128.0])
def test_a_zero_point_outside_the_grid_is_refused_where_there_is_padding(zero_point: float) -> None:
    with pytest.raises(InputError, match="^layer: the zero-point lies outside the grid, padding has no integer$"):
        unit_layer(Case(1, 1, 3, signed_input=True), 1.0, zero_point)


@pytest.mark.parametrize("zero_point", [-300.0, 300.0])
def test_a_zero_point_outside_the_grid_does_no_harm_without_padding(zero_point: float) -> None:
    layer = build(CASES["signed pointwise"], CHOICES["K=5"])
    with torch.no_grad():
        layer.input_quantizer.zero_point[1:3] = zero_point
    whole = integer_conv(layer, "layer")
    x = inputs(CASES["signed pointwise"], 5) - zero_point * layer.input_quantizer.log_step.detach().exp()[1]
    assert_equals_fake_quantization(layer, whole, x, [2, 1, 0, 1, 3])


def test_groups_between_one_and_all_are_refused() -> None:
    layer = build(Case(4, 6, 3, groups=2), CHOICES["K=5"])
    with pytest.raises(ValueError, match="groups must be 1 or the input channels, got 2"):
        integer_conv(layer, "layer")


def test_messages_about_a_network_name_the_layer() -> None:
    policy = settled_policy()
    with torch.no_grad():
        policy.blocks[1].shortcut.input_quantizer.log_step.fill_(torch.nan)
    with pytest.raises(InputError, match=r"^blocks\.1\.shortcut: not calibrated"):
        to_integer(policy)
