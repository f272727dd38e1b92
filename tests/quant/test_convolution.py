"""Convolutions by choice equal a loop over images; products of bytes equal those of float64, or are not used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from instaqnas.quant import convolution
from instaqnas.quant.convolution import (
    ByteConv2d,
    choice_conv2d,
    has_byte_products,
    in_floating_point,
    per_image_conv2d,
)
from instaqnas.quant.integer import integer_conv
from instaqnas.quant.switchable import SwitchableConv2d

needs_bytes = pytest.mark.skipif(not has_byte_products(), reason="no fast products of bytes on this machine")
SHAPES = {  # in, out, kernel, stride, padding, groups
    "pointwise": (4, 6, 1, 1, 0, 1),
    "strided pointwise": (4, 6, 1, 2, 0, 1),
    "strided": (4, 6, 3, 2, 1, 1),
    "depthwise": (4, 4, 3, 1, 1, 4),
    "strided depthwise": (5, 5, 3, 2, 1, 5),
    "two groups": (4, 6, 3, 1, 1, 2),
    "one channel": (1, 2, 1, 1, 0, 1),
    "7x7": (3, 4, 7, 2, 3, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def levels(shape: tuple[int, ...], lowest: int, highest: int, seed: int = 0) -> Tensor:
    return torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().to(torch.uint8).contiguous(memory_format=torch.channels_last)


def by_loop(x: Tensor, weight: Tensor, choice: list[int], **settings: int) -> Tensor:
    """By a loop over images, in float64."""
    return torch.cat([F.conv2d(x[b : b + 1].double(), weight[k].double(), **settings) for b, k in enumerate(choice)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@shapes
def test_per_image_convolution_equals_a_loop(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    channels, out, kernel, stride, padding, groups = shape
    x = torch.randn(3, channels, 5, 8, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(3, out, channels // groups, kernel, kernel, dtype=torch.float64)
    settings = {"stride": stride, "padding": padding, "groups": groups}
    found = per_image_conv2d(x, weight, **settings)
    torch.testing.assert_close(found, by_loop(x, weight, [0, 1, 2], **settings))


@pytest.mark.parametrize("worth_packing", [1, 10**6])
@pytest.mark.parametrize("integers", [None, torch.int8, torch.int16])
@pytest.mark.parametrize("choice", [[2, 0, 2, 1, 0], [1, 1, 1, 1, 1]], ids=["mixed", "one"])
@shapes
def test_sums_of_levels_and_their_gradients_equal_a_loop(
    shape: tuple[int, ...],
    choice: list[int],
    integers: torch.dtype | None,
    worth_packing: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of levels are exact in float32, and so to the last bit, however they are multiplied."""
    monkeypatch.setattr(convolution, "PIXELS_WORTH_PACKING", worth_packing)
    channels, out, kernel, stride, padding, groups = shape
    settings = {"stride": stride, "padding": padding, "groups": groups}
    x = levels((5, channels, 7, 9), 0, 255)
    ends = (-128, 127) if integers == torch.int8 else (-255, 255)
    weight = levels((3, out, channels // groups, kernel, kernel), *ends, seed=1).requires_grad_()
    theirs = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    kept = {} if integers is None else {"levels": as_bytes(x), "integers": integers}
    x = (x.clone() if integers is None else torch.full_like(x, torch.nan)).requires_grad_()  # not read beside bytes
    y = choice_conv2d(x, weight, torch.tensor(choice), **settings, **kept)
    expected = by_loop(*theirs, choice, **settings)
    assert torch.equal(y.double(), expected)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    expected.backward(upstream.double())
    for ours, own in zip((x, weight), theirs, strict=True):
        torch.testing.assert_close(ours.grad.double(), own.grad, rtol=1e-4, atol=1e-4 * own.grad.abs().max().item())


def test_where_no_gradient_of_the_input_is_needed_that_of_the_weight_is_the_same() -> None:
    x, weight = levels((4, 3, 5, 5), 0, 15), levels((2, 4, 3, 3, 3), -8, 7).requires_grad_()
    choice, settings = torch.tensor([1, 0, 1, 1]), {"stride": 1, "padding": 1, "groups": 1}
    choice_conv2d(x, weight, choice, **settings, levels=as_bytes(x), integers=torch.int8).sum().backward()
    own = weight.detach().double().requires_grad_()
    by_loop(x, own, choice.tolist(), **settings).sum().backward()
    assert torch.equal(weight.grad.double(), own.grad)


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


@pytest.mark.parametrize("shape", [(8, 16, 3, 2, 1, 1), (8, 8, 3, 1, 1, 8), (8, 16, 1, 1, 0, 1)])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("picked", [None, [1, 0, 1, 1]], ids=["one", "mixed"])
def test_gradients_in_bf16_are_close_on_maps_of_any_size(
    picked: list[int] | None, size: int, shape: tuple[int, ...]
) -> None:
    channels, out, kernel, stride, padding, groups = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, channels, size, size, generator=g).requires_grad_()
    weight = torch.randn(2 if picked else 1, out, channels // groups, kernel, kernel, generator=g).requires_grad_()
    settings = {"stride": stride, "padding": padding, "groups": groups}
    choice = torch.tensor(picked) if picked else None
    with torch.autocast("cpu", torch.bfloat16):
        y = choice_conv2d(x, weight, choice, **settings)
    y.float().square().sum().backward()
    theirs = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    by_loop(*theirs, picked or [0] * 4, **settings).square().sum().backward()
    for ours, own in zip((x, weight), theirs, strict=True):
        torch.testing.assert_close(ours.grad.double(), own.grad, rtol=0, atol=0.05 * own.grad.abs().max().item())


# --- Bytes ------------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "2 bits": (-2, 1),
    "8 bits": (-128, 127),
    "one above 8 bits": (-128, 128),
    "one below 8 bits": (-129, 127),
    "odd levels of 8 bits": (-255, 255),
    "only the highest": (255, 255),
    "only the lowest": (-255, -255),
    "never negative": (0, 200),
    "13 bits": (-4096, 4095),
}


@needs_bytes
@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("ends", WEIGHTS.values(), ids=WEIGHTS.keys())
@shapes
def test_products_of_bytes_are_exact(shape: tuple[int, ...], ends: tuple[int, int], zero: int) -> None:
    channels, out, kernel, stride, padding, groups = shape
    settings = {"stride": stride, "padding": padding, "groups": groups}
    weight = levels((out, channels // groups, kernel, kernel), *ends)
    convolve = ByteConv2d(weight, **settings, zero=zero)
    drawn = levels((2, channels, 6, 9), 0, 255, seed=1)
    for x in (drawn, torch.full_like(drawn, 255), torch.zeros_like(drawn)):
        found = convolve(x.to(torch.uint8).contiguous(memory_format=torch.channels_last))
        assert torch.equal(found.double(), F.conv2d(x.double() - zero, weight.double(), **settings))


def saturating(x: Tensor, weight: Tensor, **settings: int) -> Tensor:
    """As AVX-512 without 8-bit dot products: products are added in pairs in 16 bits."""
    if settings["groups"] > 1 or weight.shape[1] < 2:
        return F.conv2d(x, weight, **settings)
    pairs = [
        F.conv2d(x[:, i : i + 2], weight[:, i : i + 2], **settings).clamp(-(2**15), 2**15 - 1)
        for i in range(0, weight.shape[1], 2)
    ]
    return sum(pairs)


def missing(x: Tensor, weight: Tensor, **settings: int) -> Tensor:
    raise RuntimeError("not built for this processor")


def unknown(x: Tensor, weight: Tensor, **settings: int) -> Tensor:
    raise AttributeError("no such operator")


@pytest.mark.parametrize(
    ("convolve", "exact"),
    [
        (F.conv2d, True),
        (saturating, False),
        (lambda x, weight, **settings: F.conv2d(x, weight, **settings) + 1, False),
        (missing, False),
        (unknown, False),
    ],
)
def test_bytes_are_multiplied_only_where_that_is_exact(
    convolve: Callable, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        def __init__(self, weight: Tensor, **settings: int) -> None:
            self.weight, self.settings = weight, settings

        def __call__(self, x: Tensor) -> Tensor:
            zero = self.settings.pop("zero")
            return convolve(x.double() - zero, self.weight.double(), **self.settings)

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(convolution, "ByteConv2d", Fake)
    assert has_byte_products.__wrapped__() == exact


def test_without_8_bit_dot_products_bytes_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not has_byte_products.__wrapped__()
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert not has_byte_products.__wrapped__()


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
    monkeypatch.setattr(convolution.ByteConv2d, "__init__", None)  # nothing is packed again
    assert torch.equal(layer(x, choice).value(), before)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_an_input_that_is_not_finite_shows_in_training(batch_norm: bool) -> None:
    """Behind a layer with BatchNorm, whose statistics have it; an image would be looked at as floats."""
    first = SwitchableConv2d(4, 4, 1, [(4, 4), (2, 2)], signed_input=True)
    layer = SwitchableConv2d(4, 6, 1, [(4, 4), (2, 2)], batch_norm=batch_norm)
    x, choice = torch.rand(3, 4, 5, 5), torch.tensor([0, 1, 0])
    first.initialize_steps(x)
    layer.initialize_steps(first(x, choice))
    assert layer(first(x, choice), choice).value().isfinite().all()
    x[1, 0, 0, 0] = torch.nan
    assert not layer(first(x, choice), choice).value()[1].isfinite().any()


@needs_bytes
@torch.no_grad()
def test_a_weight_that_is_not_finite_shows() -> None:
    layer = SwitchableConv2d(4, 6, 1, [(4, 4)], batch_norm=False)
    x = torch.rand(2, 4, 5, 5)
    layer.initialize_steps(x)
    assert layer(x).value().isfinite().all()
    layer.weight[0, 0] = torch.nan
    assert layer(x).value().isnan().all()


@needs_bytes
@torch.no_grad()
def test_an_integer_layer_that_has_run_can_be_copied() -> None:
    layer = SwitchableConv2d(4, 6, 3, [(4, 4), (2, 2)]).eval()
    x, choice = torch.rand(2, 4, 5, 5), torch.tensor([1, 0])
    layer.initialize_steps(x)
    whole = integer_conv(layer, "layer")
    y = whole(x, choice).value()
    assert torch.equal(copy.deepcopy(whole)(x, choice).value(), y)
