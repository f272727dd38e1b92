"""The switchable convolution equals a loop over images, each run alone through torch's own operators."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.quant.switchable import (
    BitChoice,
    PerChoiceBatchNorm,
    SwitchableConv2d,
    calibrate,
    reestimate_batch_norm,
    use_batch_renorm,
)

MIXED = [(2, 3), (4, 4), (8, 8)]
WITH_OFF = [(3, 4), (32, 32), (32, 4), (5, 32)]


@dataclass(frozen=True)
class Case:
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    signed_input: bool = False


CASES = {
    "pointwise": Case(4, 6, 1),
    "depthwise": Case(5, 5, 3, groups=5),
    "strided": Case(4, 6, 3, stride=2),
    "strided depthwise": Case(4, 4, 3, stride=2, groups=4),
    "strided pointwise": Case(4, 6, 1, stride=2),
    "signed input": Case(3, 4, 7, stride=2, signed_input=True),
}


def build(
    case: Case, choices: list[tuple[int, int]], *, batch_norm: bool, seed: int = 0, **settings: str | bool
) -> SwitchableConv2d:
    """A layer in float64 whose parameters and statistics all differ, so that no mix-up can hide."""
    layer = SwitchableConv2d(
        case.in_channels,
        case.out_channels,
        case.kernel_size,
        choices,
        stride=case.stride,
        groups=case.groups,
        batch_norm=batch_norm,
        signed_input=case.signed_input,
        **settings,
    ).double()
    g = torch.Generator().manual_seed(seed)
    layer.initialize_steps(inputs(case, 8, seed=seed + 1))
    with torch.no_grad():
        if layer.weight.dim() == 5:  # separate
            layer.weight += 0.3 * torch.randn(layer.weight.shape, generator=g).double()
        for name, parameter in layer.named_parameters():
            if name.endswith("log_step"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            elif name.endswith("log_alpha"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=g).double() - 2  # 10 clips nothing
        if layer.norm is None:
            layer.bias.copy_(torch.randn(case.out_channels, generator=g))
        else:
            for tensor, offset in ((layer.norm.weight, 1), (layer.norm.bias, 0), (layer.norm.running_mean, 0)):
                tensor.copy_(offset + 0.5 * torch.randn(tensor.shape, generator=g))
            layer.norm.running_var.copy_(torch.rand(layer.norm.running_var.shape, generator=g) + 0.5)
    return layer


def value_of(network: nn.Module, x: Tensor) -> Tensor:
    y = network(x)
    return y if isinstance(y, Tensor) else y.value()


def inputs(case: Case, images: int, *, size: int = 7, seed: int = 1) -> Tensor:
    x = torch.randn(images, case.in_channels, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return x if case.signed_input else x.relu()


# --- The reference ----------------------------------------------------------------------------------------------------


def round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def clipped(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The ends count as inside."""
    low, high = (torch.as_tensor(end, dtype=x.dtype) for end in (low, high))
    return torch.where(x < low, low, torch.where(x > high, high, x))


def ends(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def widest(layer: SwitchableConv2d) -> int:
    return max(bits for bits, _ in layer.choices if bits != 32)


def lsq(x: Tensor, step: Tensor, offset: Tensor | float, bits: int, signed: bool) -> Tensor:
    level = clipped(x / step + offset, *ends(bits, signed))
    return (round_straight_through(level) - offset) * step


def fake_weight(layer: SwitchableConv2d, p: dict[str, Tensor], k: int) -> Tensor:
    """LSQ, nested LSQ (Any-Precision) or DoReFa written out; the weight of choice k."""
    bits, weight = layer.choices[k][0], p["weight"]
    weight = weight[k] if weight.dim() == 5 else weight
    if bits == 32:
        return weight
    log_step = p.get("weight_quantizer.log_step")
    if log_step is None:
        largest, last = weight.detach().tanh().abs().max(), 2**bits - 1
        unit = weight.tanh() / (2 * largest) + 0.5
        return (2 * round_straight_through(unit * last) / last - 1) * largest
    if len(log_step) == len(layer.choices):
        return lsq(weight, log_step[k].exp().view(-1, 1, 1, 1), 0.0, bits, True)
    width = log_step[0].exp().view(-1, 1, 1, 1) * 2 ** (widest(layer) - bits)
    lowest, highest = ends(bits, True)
    # The middle of the interval that the weight falls to; the middles of the first and last are the ends of the range.
    position = clipped(weight / width, lowest + 0.5, highest + 0.5)
    middle = (weight / width).detach().floor().clamp(lowest, highest) + 0.5
    return (position + (middle - position).detach()) * width


def fake_input(layer: SwitchableConv2d, p: dict[str, Tensor], image: Tensor, k: int) -> Tensor:
    """LSQ, LSQ+, PACT or DoReFa written out."""
    bits, signed = layer.choices[k][1], layer.input_quantizer.signed
    if bits == 32:
        return image if signed else image.relu()
    if "input_quantizer.log_step" in p:
        zero = p.get("input_quantizer.zero_point")
        offset = 0.0 if zero is None else round_straight_through(zero[k])
        return lsq(image, p["input_quantizer.log_step"][k].exp(), offset, bits, signed)
    log_alpha = p.get("input_quantizer.log_alpha")
    alpha = torch.ones(()) if log_alpha is None else log_alpha[k].exp()
    levels = ends(bits, signed)[1] / alpha.detach()
    image = clipped(image, -alpha if signed else 0.0, alpha)
    return image + ((image * levels).round() / levels - image).detach()


def convolve_alone(layer: SwitchableConv2d, p: dict[str, Tensor], image: Tensor, k: int) -> Tensor:
    """One image [1, in, H, W] at choice k, by F.conv2d of fake-quantized weight and input."""
    weight = fake_weight(layer, p, k)
    kernel_size = weight.shape[-1]
    image = fake_input(layer, p, image, k)
    return F.conv2d(image, weight, p.get("bias"), layer.stride, kernel_size // 2, groups=layer.groups)


def reference(
    layer: SwitchableConv2d, p: dict[str, Tensor], x: Tensor, choice: list[int], mean: Tensor, var: Tensor
) -> Tensor:
    """Every image alone, then F.batch_norm over the images of each choice; updates `mean` and `var` in training."""
    alone = [convolve_alone(layer, p, x[b : b + 1], k) for b, k in enumerate(choice)]
    if layer.norm is not None:
        for k in sorted(set(choice)):
            members = [b for b, own in enumerate(choice) if own == k]
            group = torch.cat([alone[b] for b in members])
            scale, shift = p["norm.weight"][k], p["norm.bias"][k]
            group = F.batch_norm(group, mean[k], var[k], scale, shift, layer.training, 0.1, 1e-5)
            for b, y in zip(members, group.split(1), strict=True):
                alone[b] = y
    return torch.cat(alone)


def gradient_scales(layer: SwitchableConv2d, x: Tensor) -> dict[str, Tensor]:
    """LSQ's factor 1 / sqrt(numel * highest level) on the gradients of step sizes and zero-points; others have 1."""
    signed = layer.input_quantizer.signed
    weight_highest = torch.tensor([ends(min(bits, 8), True)[1] for bits, _ in layer.choices]).double()
    input_highest = torch.tensor([ends(min(bits, 8), signed)[1] for _, bits in layer.choices]).double()
    scales = {}
    if hasattr(layer.weight_quantizer, "log_step"):
        steps, channels = layer.weight_quantizer.log_step.shape
        highest = weight_highest if steps == len(layer.choices) else ends(widest(layer), True)[1] * torch.ones(1)
        numel = layer.weight[0].numel() if layer.weight.dim() == 5 else layer.weight.numel()
        scales["weight_quantizer.log_step"] = (numel / channels * highest).rsqrt().view(-1, 1)
    if hasattr(layer.input_quantizer, "log_step"):
        scales["input_quantizer.log_step"] = scales["input_quantizer.zero_point"] = (
            x[0].numel() * input_highest
        ).rsqrt()
    for name, value in layer.named_parameters():
        if name.endswith("log_step"):  # 1 / s^2: a step on log s moves s as far as one on s would
            scales[name] = scales[name] * value.detach().exp() ** -2
    return scales


def assert_equals_reference(
    case: Case,
    choices: list[tuple[int, int]],
    choice: list[int],
    *,
    batch_norm: bool,
    training: bool,
    **settings: str | bool,
) -> None:
    layer = build(case, choices, batch_norm=batch_norm, **settings)
    layer.train(training)
    p = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    statistics = (torch.zeros(0), torch.zeros(0))
    if layer.norm is not None:
        statistics = (layer.norm.running_mean.clone(), layer.norm.running_var.clone())
    x = inputs(case, len(choice))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    y = layer(ours, torch.tensor(choice)).value()
    expected = reference(layer, p, theirs, choice, *statistics)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    if layer.norm is not None:
        torch.testing.assert_close(layer.norm.running_mean, statistics[0])
        torch.testing.assert_close(layer.norm.running_var, statistics[1])

    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).double()
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    scales = gradient_scales(layer, x)
    for name, value in layer.named_parameters():
        wanted = torch.zeros_like(value) if p[name].grad is None else p[name].grad * scales.get(name, 1.0)
        torch.testing.assert_close(value.grad, wanted, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", "bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_gradients_and_statistics_equal_a_loop_over_images(case: Case, batch_norm: bool, training: bool) -> None:
    assert_equals_reference(case, MIXED, [2, 0, 1, 0, 2, 2], batch_norm=batch_norm, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", ["pointwise", "strided", "signed input"])
def test_choices_without_quantization_mix_with_others(case: str, training: bool) -> None:
    assert_equals_reference(CASES[case], WITH_OFF, [3, 0, 1, 2, 1, 0], batch_norm=True, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_norm", [True, False], ids=["norm", "bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_choice_equals_a_loop_over_images(case: Case, batch_norm: bool, training: bool) -> None:
    assert_equals_reference(case, [(3, 4)], [0, 0, 0], batch_norm=batch_norm, training=training)


KINDS = {
    "separate": {"weights": "separate"},
    "nested": {"weights": "nested"},
    "per channel": {"per_channel": True},
    "nested per channel": {"weights": "nested", "per_channel": True},
    "lsq": {"quantizer": "lsq"},
    "pact": {"quantizer": "pact"},
    "pact separate": {"quantizer": "pact", "weights": "separate"},
    "dorefa": {"quantizer": "dorefa"},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("case", ["pointwise", "strided depthwise", "signed input"])
def test_every_quantizer_and_kind_of_weight_equals_a_loop_over_images(case: str, kind: dict[str, str | bool]) -> None:
    for choices in (MIXED, WITH_OFF):
        choice = [2, 0, 1, 0, 2, len(choices) - 1]
        assert_equals_reference(CASES[case], choices, choice, batch_norm=True, training=True, **kind)


@pytest.mark.parametrize("choice", [[0, 0, 0], [1], [2, 2]])
def test_a_batch_in_which_choices_are_absent_equals_the_loop(choice: list[int]) -> None:
    for training in (True, False):
        assert_equals_reference(CASES["pointwise"], MIXED, choice, batch_norm=True, training=training)


@pytest.mark.parametrize("kind", [{}, *KINDS.values()], ids=["lsq_plus", *KINDS.keys()])
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_k(kind: dict[str, str | bool], kernel: int) -> None:
    """But for the weights and what belongs to them; feature maps are far larger here."""

    def kept(choices: list[BitChoice]) -> int:
        layer = SwitchableConv2d(8, 8, kernel, choices, **kind)
        x = torch.randn(8, 8, 40, 40).relu().requires_grad_()
        choice = torch.arange(8) % 2
        calibrate(layer, lambda: layer(x, choice))
        sizes = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = layer(x, choice).value()
        y.sum().backward()
        return sum(sizes.values())

    two, eight = kept([(2, 2), (3, 3)]), kept([(bits, bits) for bits in (2, 3, 4, 5, 6, 7, 8)] + [(8, 2)])
    assert two > 8 * 8 * 40 * 40 * 4  # a feature map
    assert eight < 1.1 * two


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def test_an_absent_choice_keeps_its_statistics_and_gets_no_gradient() -> None:
    layer = build(CASES["strided"], MIXED, batch_norm=True).train()
    before = {name: value.clone() for name, value in layer.norm.named_buffers()}
    layer(inputs(CASES["strided"], 3), torch.tensor([2, 0, 2])).value().square().sum().backward()
    for name, value in layer.norm.named_buffers():
        assert torch.equal(value[1], before[name][1])
        assert (value[[0, 2]] != before[name][[0, 2]]).all()
    for parameter in (layer.norm.weight, layer.norm.bias, layer.weight_quantizer.log_step):
        assert torch.equal(parameter.grad[1], torch.zeros_like(parameter.grad[1]))
        assert parameter.grad.isfinite().all()


def test_evaluation_leaves_the_statistics_alone() -> None:
    layer = build(CASES["pointwise"], MIXED, batch_norm=True).eval()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer(inputs(CASES["pointwise"], 3), torch.tensor([2, 0, 2]))
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name])


def test_running_variance_is_the_unbiased_one_by_hand() -> None:
    layer = SwitchableConv2d(1, 1, 1, [(32, 32), (32, 32)]).train()
    nn.init.ones_(layer.weight)
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0], [100.0, 100.0]]).view(3, 1, 1, 2)
    layer(x, torch.tensor([0, 0, 1]))
    # choice 0: 1, 3, 5, 7 have mean 4 and variance 20 / 3; choice 1: mean 100, variance 0; momentum 0.1 from 0 and 1
    assert layer.norm.running_mean.flatten().tolist() == pytest.approx([0.4, 10.0])
    assert layer.norm.running_var.flatten().tolist() == pytest.approx([0.9 + 2 / 3, 0.9])


def test_float32_statistics_hold_for_channels_far_off_centre() -> None:
    norm = PerChoiceBatchNorm(3, 2).train()
    y = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)) + 30  # mean of 30 standard deviations
    expected = F.batch_norm(y.double(), None, None, training=True).float()
    torch.testing.assert_close(norm(y, None, torch.zeros(6, dtype=torch.int64)).value(), expected, rtol=0, atol=2e-3)


def test_statistics_keep_float32_where_the_sums_are_bf16() -> None:
    norm = PerChoiceBatchNorm(3, 2).train()
    y = (torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = norm(y, None, torch.zeros(6, dtype=torch.int64)).value()
    expected = F.batch_norm(y.double(), None, None, training=True).float()
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-3)


def test_one_pixel_leaves_the_running_statistics_alone() -> None:
    norm = PerChoiceBatchNorm(3, 2).train()
    norm(torch.randn(3, 3, 1, 1), None, torch.tensor([0, 1, 1]))
    assert norm.running_var[0].tolist() == [1, 1, 1]
    assert (norm.running_var[1] != 1).all()


def test_a_constant_channel_becomes_its_bias() -> None:
    norm = PerChoiceBatchNorm(2, 2).train()
    nn.init.constant_(norm.bias, 0.7)
    y = torch.zeros(3, 2, 5, 5, requires_grad=True)
    normalised = norm(y, torch.full((2, 1), 0.01), torch.tensor([0, 1, 0])).value()
    torch.testing.assert_close(normalised, torch.full_like(y, 0.7))
    normalised.square().sum().backward()
    assert y.grad.isfinite().all()


# --- Full precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_choice_at_32_bits_is_an_ordinary_convolution_with_batch_norm(case: Case) -> None:
    layer = build(case, [(32, 32)], batch_norm=True)
    plain = nn.Sequential(
        nn.Conv2d(
            case.in_channels,
            case.out_channels,
            case.kernel_size,
            case.stride,
            case.kernel_size // 2,
            groups=case.groups,
            bias=False,
        ),
        nn.BatchNorm2d(case.out_channels),
    ).double()
    with torch.no_grad():
        plain[0].weight.copy_(layer.weight)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(plain[1], name).copy_(getattr(layer.norm, name)[0])
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())

    descents = [torch.optim.SGD(network.parameters(), lr=0.05) for network in (layer, plain)]
    for step in range(3):
        x = inputs(case, 4, seed=step)
        for network, descent in zip((layer, plain), descents, strict=True):
            descent.zero_grad()
            value_of(network, x).sigmoid().sum().backward()
            descent.step()
    for training in (True, False):
        layer.train(training)
        plain.train(training)
        x = inputs(case, 4, seed=8)
        torch.testing.assert_close(layer(x).value(), plain(x))
    torch.testing.assert_close(layer.norm.running_var[0], plain[1].running_var)


def test_one_choice_at_32_bits_with_bias_is_an_ordinary_convolution() -> None:
    layer = build(CASES["strided"], [(32, 32)], batch_norm=False)
    plain = nn.Conv2d(4, 6, 3, 2, 1).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    x = inputs(CASES["strided"], 4)
    torch.testing.assert_close(layer(x).value(), plain(x))


# --- Other properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_evaluation_an_image_does_not_depend_on_the_rest_of_its_batch(case: Case) -> None:
    layer = build(case, MIXED, batch_norm=True).eval()
    x, choice = inputs(case, 6), torch.tensor([2, 0, 1, 0, 2, 1])
    together = layer(x, choice).value()
    for part in ([0], [3, 1], [5, 4, 2]):
        torch.testing.assert_close(layer(x[part], choice[part]).value(), together[part])


def test_a_quantized_product_equals_integer_arithmetic_to_the_last_bit() -> None:
    layer = SwitchableConv2d(32, 16, 3, [(8, 8), (4, 8)], batch_norm=False)
    with torch.no_grad():  # powers of two: rescaling is exact
        layer.weight_quantizer.log_step.copy_(torch.tensor([[2.0**-9], [2.0**-5]]).log())
        layer.input_quantizer.log_step.copy_(torch.tensor([2.0**-6, 2.0**-6]).log())
    g = torch.Generator().manual_seed(0)
    weight_levels = torch.randint(-8, 8, layer.weight.shape, generator=g)
    input_levels = torch.randint(0, 256, (2, 32, 6, 6), generator=g)
    sums = F.conv2d(input_levels.double(), weight_levels.double(), padding=1)  # integers: exact in float64
    for k, (weight_step, input_step) in enumerate([(2.0**-9, 2.0**-6), (2.0**-5, 2.0**-6)]):
        with torch.no_grad():
            layer.weight.copy_(weight_levels * weight_step)
            y = layer(input_levels.float() * input_step, torch.tensor([k, k])).value()
        own_steps = layer.weight_quantizer.log_step[k].exp() * layer.input_quantizer.log_step[k].exp()
        assert torch.equal(y, sums.float() * own_steps)


def test_an_uncalibrated_layer_gives_nan_and_not_numbers() -> None:
    layer = SwitchableConv2d(3, 4, 3, [(2, 2), (4, 4)], batch_norm=False)
    assert layer(torch.rand(2, 3, 5, 5), torch.tensor([0, 1])).value().isnan().all()


# --- Calibration ------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two layers, the second of which applies the ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SwitchableConv2d(3, 4, 3, [(8, 8)], signed_input=True)
        self.second = SwitchableConv2d(4, 5, 1, MIXED)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        return self.second(self.first(x), choice).value()


def test_calibration_shows_every_layer_inputs_that_its_predecessors_have_quantized() -> None:
    torch.manual_seed(0)
    network = Chain().eval()
    x, choice = torch.randn(5, 3, 6, 6), torch.tensor([0, 1, 2, 2, 1])
    calibrate(network, lambda: network(x, choice))

    assert not network.training
    assert not network.first.training
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    span = (x.max() - x.min()).item()
    assert network.first.input_quantizer.log_step.exp().item() == pytest.approx(span / 255, rel=1e-5)
    p = dict(network.first.named_parameters())
    convolved = torch.cat([convolve_alone(network.first, p, image[None], 0) for image in x])
    hidden = F.batch_norm(convolved, None, None, training=True).relu()
    expected = [2 * hidden.mean().item() / highest**0.5 for highest in (7, 15, 255)]
    assert network.second.input_quantizer.log_step.exp().tolist() == pytest.approx(expected, rel=1e-4)


def test_calibration_is_over_once_it_returns() -> None:
    network = Chain()
    choice = torch.tensor([0, 1, 2])
    calibrate(network, lambda: network(torch.randn(3, 3, 6, 6), choice))
    before = {name: value.clone() for name, value in network.named_parameters()}
    network(100 * torch.randn(3, 3, 6, 6), choice)
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name])


# --- Batch renormalization --------------------------------------------------------------------------------------------


def renormalizing(choices: int) -> PerChoiceBatchNorm:
    """With statistics, weights and biases of their own for each choice."""
    torch.manual_seed(choices)
    norm = PerChoiceBatchNorm(2, choices).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    use_batch_renorm(norm, on=True)
    return norm.train()


def test_batch_renorm_normalises_as_evaluation_does_and_has_the_gradients_of_the_batch() -> None:
    norm = renormalizing(2)
    y, factor = torch.randn(5, 2, 3, 3).double().requires_grad_(), torch.tensor([[0.9], [0.8]]).double()
    choice, weights = torch.tensor([0, 1, 0, 0, 0]), torch.randn(5, 2, 3, 3).double()
    expected = copy.deepcopy(norm).eval()(y, factor, choice).value().detach()
    known = norm.running_mean.clone(), norm.running_var.clone()
    found = norm(y, factor, choice).value()
    torch.testing.assert_close(found, expected)  # image 1 is alone with its choice
    (found * weights).sum().backward()
    gradient, y.grad = y.grad.clone(), None
    wanted = 0
    for k in (0, 1):
        x = (y * factor[k])[choice == k]
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        scale = (var + norm.eps).sqrt().detach() / (known[1][k] + norm.eps).sqrt()
        shift = (mean.detach() - known[0][k]) / (known[1][k] + norm.eps).sqrt()
        own_weight, own_bias = norm.weight[k] * scale, norm.bias[k] + norm.weight[k] * shift
        normal = F.batch_norm(x, None, None, own_weight.detach(), own_bias.detach(), training=True, eps=norm.eps)
        wanted = wanted + (normal * weights[choice == k]).sum()
    wanted.backward()
    torch.testing.assert_close(gradient, y.grad)


@pytest.mark.parametrize(("mean", "deviation", "scale", "shift"), [(1000, 100, 3, 5), (-1000, 0.1, 1 / 3, -5)])
def test_batch_renorm_has_limits(mean: float, deviation: float, scale: float, shift: float) -> None:
    norm = renormalizing(2)
    y = mean + deviation * torch.randn(4, 2, 3, 3).double()
    found = norm(y, None, torch.zeros(4, dtype=torch.long)).value()
    limited = scale * norm.weight[0, :, None, None] * F.batch_norm(y, None, None, training=True, eps=norm.eps)
    limited = limited + (norm.bias + shift * norm.weight)[0, :, None, None]
    torch.testing.assert_close(found, limited, rtol=1e-4, atol=1e-4)


def test_batch_renorm_changes_nothing_with_one_choice_or_in_evaluation() -> None:
    factor = torch.tensor([[0.9]]).double()
    for norm, choice in ((renormalizing(1), None), (renormalizing(2).eval(), torch.tensor([0, 1, 1]))):
        plain = copy.deepcopy(norm)
        use_batch_renorm(plain, on=False)
        y = torch.randn(3, 2, 4, 4).double()
        assert torch.equal(norm(y, factor, choice).value(), plain(y, factor, choice).value())


def test_batch_renorm_learns_running_statistics_as_without() -> None:
    norm = renormalizing(2)
    plain = copy.deepcopy(norm)
    use_batch_renorm(plain, on=False)
    y, choice = torch.randn(3, 2, 4, 4).double(), torch.tensor([0, 1, 1])
    assert not torch.equal(norm(y, None, choice).value(), plain(y, None, choice).value())
    assert torch.equal(norm.running_mean, plain.running_mean)
    assert torch.equal(norm.running_var, plain.running_var)


# --- Statistics of BatchNorm taken anew -------------------------------------------------------------------------------


def test_statistics_taken_anew_are_those_of_all_images_of_a_choice() -> None:
    """Two batches of different sizes; choice 1 of the second layer has no image."""
    torch.manual_seed(0)
    network = Chain().double()
    batches = [torch.randn(5, 3, 6, 6).double(), 2 + torch.randn(2, 3, 6, 6).double()]
    choices = [[0, 2, 2, 0, 2], [2, 0]]
    calibrate(network, lambda: network(batches[0], torch.tensor([0, 1, 2, 0, 1])))
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def forward() -> None:
        assert not torch.is_grad_enabled()  # the graphs of all batches would be kept
        for x, choice in zip(batches, choices, strict=True):
            network(x, torch.tensor(choice))

    reestimate_batch_norm(network, forward)

    first, second = (dict(layer.named_parameters()) for layer in (network.first, network.second))
    sums: dict[tuple[str, int], list[Tensor]] = {}
    for x, choice in zip(batches, choices, strict=True):
        convolved = torch.cat([convolve_alone(network.first, first, image[None], 0) for image in x])
        hidden = F.batch_norm(convolved, None, None, training=True)
        for image, y, k in zip(hidden, convolved, choice, strict=True):
            sums.setdefault(("first", 0), []).append(y)
            sums.setdefault(("second", k), []).append(convolve_alone(network.second, second, image[None], k)[0])
    assert sums.keys() == {("first", 0), ("second", 0), ("second", 2)}
    for (layer, k), values in sums.items():
        norm, together = getattr(network, layer).norm, torch.stack(values)
        torch.testing.assert_close(norm.running_mean[k], together.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var[k], together.var((0, 2, 3)))  # unbiased

    after = network.state_dict()
    kept = [name for name in after if "running" not in name]
    assert {"first.weight", "second.norm.weight", "second.input_quantizer.log_step"} <= set(kept)
    assert all(torch.equal(after[name], before[name]) for name in kept)
    for name in ("second.norm.running_mean", "second.norm.running_var"):
        assert torch.equal(after[name][1], before[name][1])
    assert not network.first.training


def test_statistics_taken_anew_without_quantization_are_those_of_all_images() -> None:
    layer = build(CASES["strided"], [(32, 32)], batch_norm=True)
    x = inputs(CASES["strided"], 7)

    def forward() -> None:
        for batch in x.split(4):
            layer(batch)

    reestimate_batch_norm(layer, forward)
    convolved = F.conv2d(x.relu(), layer.weight, stride=2, padding=1)
    torch.testing.assert_close(layer.norm.running_mean[0], convolved.mean((0, 2, 3)))
    torch.testing.assert_close(layer.norm.running_var[0], convolved.var((0, 2, 3)))


def test_training_goes_on_with_running_statistics_after_they_were_taken_anew() -> None:
    norm = PerChoiceBatchNorm(1, 2)
    y = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 2, 2)
    reestimate_batch_norm(norm, lambda: norm(y, None, torch.tensor([0])))
    assert norm.running_mean.flatten().tolist() == [4.0, 0.0]
    norm.train()(y + 10, None, torch.tensor([0]))
    assert norm.running_mean.flatten().tolist() == pytest.approx([5.0, 0.0])  # momentum 0.1 from 4 to 14
