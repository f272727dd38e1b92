"""The switchable convolution equals a loop over images, each run alone through torch's own operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from instaqnas.bits import BitChoice
from instaqnas.quant import byte_conv, convolution, quantizers, switchable
from instaqnas.quant.byte_conv import ByteConv2d, in_floating_point
from instaqnas.quant.switchable import SwitchableConv2d, calibrate
from tests.quant.convolution_shapes import needs_bytes
from tests.quant.switchable_reference import (
    CASES,
    MIXED,
    Case,
    Chain,
    build,
    convolve_alone,
    ends,
    inputs,
    reference,
    widest,
)

WITH_OFF = [(3, 4), (32, 32), (32, 4), (5, 32)]


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
    """Apart from weights and their levels; feature maps are far larger here."""

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


# --- Full precision ---------------------------------------------------------------------------------------------------


def value_of(network: nn.Module, x: Tensor) -> Tensor:
    y = network(x)
    return y if isinstance(y, Tensor) else y.value()


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


def test_calibration_updates_running_statistics_as_one_training_step_does() -> None:
    torch.manual_seed(0)
    network = Chain()
    for layer in (network.first, network.second):
        layer.norm.running_mean.fill_(3.0)
    x, choice = torch.randn(5, 3, 6, 6), torch.tensor([0, 2, 2, 0, 2])  # none at choice 1
    calibrate(network, lambda: network(x, choice))
    after = {name: value.clone() for name, value in network.named_buffers()}
    for layer in (network.first, network.second):  # the same step again, now that step sizes are known
        layer.norm.running_mean.fill_(3.0)
        layer.norm.running_var.fill_(1.0)
    network.train()(x, choice)
    for name, value in network.named_buffers():
        assert torch.equal(value, after[name]), name
    mean = network.second.norm.running_mean
    assert (mean[[0, 2]] != 3).all()
    assert (mean[1] == 3).all()


def test_calibration_is_over_once_it_returns() -> None:
    network = Chain()
    choice = torch.tensor([0, 1, 2])
    calibrate(network, lambda: network(torch.randn(3, 3, 6, 6), choice))
    before = {name: value.clone() for name, value in network.named_parameters()}
    network(100 * torch.randn(3, 3, 6, 6), choice)
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name])


# --- Bytes ------------------------------------------------------------------------------------------------------------


@needs_bytes
@pytest.mark.parametrize("kind", [{}, {"weights": "nested"}, {"quantizer": "dorefa"}, {"quantizer": "pact"}])
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_a_layer_on_bytes_equals_itself_in_floating_point(
    kernel: int, kind: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = SwitchableConv2d(16, 8, kernel, [(2, 2), (8, 8), (4, 8)], **kind).eval()
    x, choice = 2 * torch.randn(6, 16, 9, 9), torch.tensor([1, 0, 2, 1, 0, 1])
    layer.initialize_steps(x)
    monkeypatch.setattr(convolution, "PIXELS_WORTH_PACKING", 1)
    bytes_seen = []
    multiply = ByteConv2d.__call__
    monkeypatch.setattr(ByteConv2d, "__call__", lambda conv, x: bytes_seen.append(x.dtype) or multiply(conv, x))
    by_bytes = layer(x, choice).value()
    assert bytes_seen == [torch.uint8] * 3
    with torch.enable_grad():
        in_training = layer(x, choice).value()
    assert len(bytes_seen) == 6
    with in_floating_point():
        in_floats = layer(x, choice).value()
    assert len(bytes_seen) == 6
    assert torch.equal(by_bytes, in_floats)
    assert torch.equal(in_training, in_floats)


@needs_bytes
@torch.no_grad()
def test_a_packed_weight_follows_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SwitchableConv2d(4, 6, 3, [(3, 3), (4, 4)]).eval()
    x, choice = torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 1, 0])
    layer.initialize_steps(x)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def in_floats(layer: nn.Module) -> Tensor:
        with in_floating_point():
            return copy.deepcopy(layer)(x, choice).value()

    def descend() -> None:
        with torch.enable_grad():
            layer(x, choice).value().square().sum().backward()
        optimizer.step()

    changes = {
        "nothing": lambda: None,
        "a step of the optimizer": descend,
        "a checkpoint": lambda: layer.load_state_dict({k: 1.5 * v for k, v in layer.state_dict().items()}),
        "a step size": lambda: layer.weight_quantizer.log_step.add_(0.7),
        "a weight": lambda: layer.weight.lerp_(torch.randn(6, 4, 3, 3), 0.5),
        "another tensor": lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(6, 4, 3, 3))),
    }
    before = layer(x, choice).value()
    for name, change in changes.items():
        assert layer._packed is not None
        change()
        found = layer(x, choice).value()
        assert torch.equal(found, in_floats(layer)), name
        assert name == "nothing" or not torch.equal(found, before), name
        before = found
    average(x, choice)
    average.update_parameters(layer)
    average.update_parameters(layer)
    first = average(x, choice).value()
    layer.weight.mul_(1.3)
    average.update_parameters(layer)
    assert torch.equal(average(x, choice).value(), in_floats(average))
    assert not torch.equal(average(x, choice).value(), first)
    before = layer(x, choice).value()
    layer(x, choice)
    monkeypatch.setattr(convolution.ByteConv2d, "__init__", None)  # no weight may be packed again
    assert torch.equal(layer(x, choice).value(), before)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


# --- NaN --------------------------------------------------------------------------------------------------------------

PRODUCERS = {  # of a map that is not finite, from one that is not
    "full precision": ([(32, 32)], {}),
    "full precision, bias": ([(32, 32)], {"batch_norm": False}),
    "some choices at 32 bits": ([(4, 4), (32, 32)], {}),
    "some choices at 32 bits, bias": ([(4, 4), (32, 32)], {"batch_norm": False}),
    "some weights at 32 bits": ([(4, 32), (32, 32)], {}),
    "inputs at 32 bits": ([(4, 32)], {}),
    "quantized signed input": ([(4, 4)], {"signed_input": True}),
    "quantized signed input, two choices": ([(4, 4), (2, 2)], {"signed_input": True, "batch_norm": False}),
}


class StandIn:
    """`ByteConv2d` in float64."""

    def __init__(self, weight: Tensor, **settings: int) -> None:
        self.weight, self.settings = weight.double(), settings

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        y = F.conv2d(x.double(), self.weight, **self.settings).float()
        return y.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[True, False], ids=["bytes", "floats"])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers multiply as on a machine with or without byte products, here by a stand-in."""
    monkeypatch.setattr(byte_conv, "has_byte_products", lambda: request.param)
    for module in (convolution, switchable):
        monkeypatch.setattr(module, "ByteConv2d", StandIn)


def calibrated_chain(first: SwitchableConv2d | None, *, batch_norm: bool = True) -> tuple[nn.ModuleList, Tensor]:
    """`first` and two layers of bytes behind it, calibrated, and the choices of three images."""
    layers = nn.ModuleList([] if first is None else [first])
    for _ in range(2):
        layers.append(SwitchableConv2d(4, 4, 1, [(2, 2), (4, 4)], batch_norm=batch_norm))
    choice = torch.tensor([0, 1, 1])
    x = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(layers, lambda: run_chain(layers, x, choice))
    return layers, choice


def run_chain(layers: nn.ModuleList, x: Tensor, choice: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, choice)
    return x.value()


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", PRODUCERS.values(), ids=PRODUCERS.keys())
def test_a_nan_behind_any_layer_stays_one_in_the_layers_of_bytes(
    kind: tuple[list[BitChoice], dict[str, bool]], training: bool, with_gradients: bool
) -> None:
    choices, settings = kind
    layers, choice = calibrated_chain(SwitchableConv2d(4, 4, 1, choices, **settings))
    layers.train(training)
    x = torch.rand(3, 4, 8, 8)
    with torch.set_grad_enabled(with_gradients):
        assert run_chain(layers, x, choice).isfinite().all()
        x[1, 2, 3, 4] = torch.nan
        assert layers[0](x, choice).value()[1].isnan().any()
        assert run_chain(layers, x, choice)[1].isnan().all()


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_plain_input_that_is_not_finite_shows_behind_layers_of_bytes(batch_norm: bool, value: float) -> None:
    layers, choice = calibrated_chain(None, batch_norm=batch_norm)
    layers.eval()
    x = torch.rand(3, 4, 8, 8)
    assert run_chain(layers, x, choice).isfinite().all()
    x[1, 2, 3, 4] = value
    assert run_chain(layers, x, choice)[1].isnan().all()


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("worth_packing", [1, 10**6])
@pytest.mark.parametrize("kind", [{}, {"weights": "nested"}, {"weights": "separate"}, {"quantizer": "dorefa"}])
def test_a_nan_in_a_weight_shows_however_bytes_are_multiplied(
    kind: dict[str, str], worth_packing: int, with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "PIXELS_WORTH_PACKING", worth_packing)
    layer = SwitchableConv2d(4, 6, 1, [(4, 4), (2, 2)], batch_norm=False, **kind)
    x, choice = torch.rand(2, 4, 5, 5), torch.tensor([0, 0])
    layer.initialize_steps(x)
    with torch.set_grad_enabled(with_gradients):
        assert layer(x, choice).value().isfinite().all()
        with torch.no_grad():
            layer.weight.view(-1)[0] = torch.nan
        assert layer(x, choice).value()[:, 0].isnan().all()


@torch.no_grad()
def test_sums_of_bytes_are_not_searched_for_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of three layers of bytes reads its whole input; the others read tables of scale and shift."""
    layers, choice = calibrated_chain(SwitchableConv2d(4, 4, 1, [(4, 4)]))
    searched = []
    check = quantizers.all_finite
    monkeypatch.setattr(
        quantizers, "all_finite", lambda *tensors: searched.append([t.dim() for t in tensors]) or check(*tensors)
    )
    run_chain(layers.eval(), torch.rand(3, 4, 8, 8), choice)
    assert searched == [[2, 2, 4], [2, 2], [2, 2]]
