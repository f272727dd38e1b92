"""Convolutions by choice equal a loop over images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instaqnas.quant import convolution
from instaqnas.quant.convolution import choice_conv2d, per_image_conv2d
from tests.quant.convolution_shapes import levels, shapes


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
    x = (x.clone() if integers is None else torch.full_like(x, torch.nan)).requires_grad_()  # bytes are read instead
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


@pytest.mark.parametrize(("inside", "out", "size"), [(4, 8, 8), (6, 12, 8), (3, 16, 7)])
def test_gradients_of_a_strided_pointwise_convolution_equal_those_in_float64(inside: int, out: int, size: int) -> None:
    """Few channels, channels-last, stride 2: oneDNN's own gradient of the weight writes past its workspace there."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, inside, size, size, generator=g).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(2, out, inside, 1, 1, generator=g).requires_grad_()
    choice = torch.tensor([0, 1, 1, 0])
    y = choice_conv2d(x, weight, choice, stride=2, padding=0, groups=1)
    grad = torch.randn(y.shape, generator=g)
    y.backward(grad)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    rows = [F.conv2d(image[None], exact_weight[k], stride=2) for image, k in zip(exact_x, choice, strict=True)]
    torch.cat(rows).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-5)
