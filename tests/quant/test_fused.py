"""The fused passes equal their formulas, differentiated by autograd, and compiled they equal themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instaqnas.errors import InputError
from instaqnas.quant import fused
from instaqnas.quant.fused import (
    clip_round,
    clip_round_bytes,
    clip_round_carried,
    compile_passes,
    integer_depthwise,
    sums_of_powers,
)


@pytest.fixture(autouse=True)
def _uncompiled_afterwards() -> Iterator[None]:
    yield
    compile_passes("off")


def tables(images: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    scale = torch.randn(images, channels, generator=g, dtype=dtype) + 2
    shift = torch.randn(images, channels, generator=g, dtype=dtype)
    bits = torch.arange(images) % 4 + 2
    return [scale, shift, torch.zeros(images, dtype=dtype), (2.0**bits - 1).to(dtype)]


def naive_clip_round(y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    position = y * scale[:, :, None, None] + shift[:, :, None, None]
    low, high = lowest.view(-1, 1, 1, 1), highest.view(-1, 1, 1, 1)
    clipped = torch.where(position < low, low, torch.where(position > high, high, position))
    return clipped + (clipped.round() - clipped).detach()


def halfway_positions(images: int, channels: int, pixels: int) -> list[Tensor]:
    """`y` [B, C, N] and tables, whose positions round to one level or the next with how often they are rounded.

    Multiples of 0.5, as float32 products: 0.1 in float32 is a little more than 0.1, and only the rounding of the
    product, which a fused multiply-add leaves out, brings them back to the middle between two levels.
    """
    y = (5.0 + 10 * (torch.arange(pixels) % 700)).expand(images, channels, -1)
    scale = torch.full((images, channels), 0.1)
    shift = -torch.arange(float(images * channels)).view(images, channels) * 7
    ends = torch.tensor([[-100.0, 0.0], [155.0, 255.0]])[:, torch.arange(images) % 2]
    return [y.contiguous(), scale, shift, *ends]


def levels_rounded_twice(y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """By numpy, whose float32 product and sum are rounded each."""
    product = y.numpy() * scale.numpy()[:, :, None]
    assert product.dtype == np.float32
    levels = np.round(product + shift.numpy()[:, :, None])
    return torch.from_numpy(np.clip(levels, lowest.numpy()[:, None, None], highest.numpy()[:, None, None]))


def levels_rounded_once(y: Tensor, scale: Tensor, shift: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """As by a fused multiply-add: float64 holds the product exactly."""
    position = (y.double() * scale.double()[:, :, None] + shift.double()[:, :, None]).float()
    return position.round().clamp(lowest[:, None, None], highest[:, None, None])


def assert_levels_are_rounded_twice(inputs: list[Tensor]) -> None:
    expected = levels_rounded_twice(*inputs)
    assert torch.equal(clip_round(*inputs), expected)
    y, *table = inputs
    lowest = table[2]
    image = last(y[..., None])
    assert torch.equal(clip_round(image, *table)[..., 0], expected)
    for values in (image, image.int()):
        levels = clip_round_bytes(values, *table, -lowest)
        assert levels.dtype == torch.uint8
        assert torch.equal(levels[..., 0] + lowest[:, None, None], expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_and_what_carries_their_gradient_stand_for_the_levels(layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(0)
    y = (4 * torch.randn(3, 5, 4, 6, generator=g)).contiguous(memory_format=layout)
    scale, shift = 1 + torch.rand(3, 5, generator=g), torch.randn(3, 5, generator=g)
    inputs = [y, scale, shift, torch.zeros(3), torch.tensor([3.0, 7.0, 255.0])]
    upstream = torch.randn(y.shape, generator=g)
    levels, carrier = clip_round_carried(*inputs)
    assert levels.dtype == torch.uint8
    assert levels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(levels.float(), clip_round(*inputs))
    assert carrier.untyped_storage().nbytes() == 4
    expected = gradients(naive_clip_round, inputs, upstream)
    for own, other in zip(gradients(lambda *x: clip_round_carried(*x)[1], inputs, upstream), expected, strict=True):
        torch.testing.assert_close(own, other)


def last(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    function(*leaves).backward(upstream)
    return [leaf.grad for leaf in leaves]


def test_levels_and_all_five_gradients_equal_autograd_of_the_formula() -> None:
    y = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = [y, *tables(5, 3, torch.float64)]
    assert torch.equal(clip_round(*inputs), naive_clip_round(*inputs))
    for got, expected in zip(
        gradients(clip_round, inputs, y.flip(0)), gradients(naive_clip_round, inputs, y.flip(0)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def lies_last(y: Tensor) -> bool:
    return y.is_contiguous(memory_format=torch.channels_last)


def test_where_channels_lie_last_all_is_the_same_and_stays_there() -> None:
    y = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = tables(5, 3, torch.float64)
    levels, (same, *sums) = clip_round(last(y), *table), sums_of_powers(last(y))
    assert lies_last(levels)
    assert lies_last(same)
    assert torch.equal(levels, clip_round(y, *table))
    for got, expected in zip((same, *sums), sums_of_powers(y), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    def network(y: Tensor, *table: Tensor) -> Tensor:
        same, sums, squares = sums_of_powers(y)
        return clip_round(same, *table) * (sums + squares)[:, :, None, None]

    inputs = gradients(network, [last(y), *table], last(y.flip(0)))
    assert lies_last(inputs[0])
    for got, expected in zip(inputs, gradients(network, [y, *table], y.flip(0)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_sums_have_a_gradient_that_joins_that_of_the_map() -> None:
    y = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def normalised(y: Tensor, sums: Tensor, squares: Tensor) -> Tensor:
        return y * squares[:, :, None, None] + sums.sin()[:, :, None, None]

    ours = gradients(lambda y: normalised(*sums_of_powers(y)), [y], y.flip(1))
    naive = gradients(lambda y: normalised(y, y.sum((2, 3)), y.square().sum((2, 3))), [y], y.flip(1))
    torch.testing.assert_close(ours, naive)


def test_gradients_of_sums_pass_a_numerical_check() -> None:
    y = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sums_of_powers, [y])


def test_maps_in_half_precision_keep_levels_up_to_256_exact_and_sums_in_float32() -> None:
    y = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, shift, lowest, highest = tables(3, 2, torch.float32)
    levels = clip_round(y, scale * 40, shift, lowest, torch.full_like(highest, 255))
    expected = naive_clip_round(y.float(), scale * 40, shift, lowest, torch.full_like(highest, 255))
    assert levels.dtype == torch.bfloat16
    assert torch.equal(levels.float(), expected)
    assert sums_of_powers(y)[1].dtype == torch.float32


def test_a_position_is_a_rounded_product_and_a_rounded_sum() -> None:
    inputs = halfway_positions(2, 3, 5000)
    assert not torch.equal(levels_rounded_once(*inputs), levels_rounded_twice(*inputs))
    assert inputs[0].numel() <= fused.SMALL
    assert_levels_are_rounded_twice(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_passes_equal_the_uncompiled_ones(layout: torch.memory_format) -> None:
    y = torch.randn(3, 4, 150, 150, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    inputs = [y, *tables(3, 4, torch.float32)]
    assert y.numel() > fused.SMALL  # or nothing would be compiled

    def network(y: Tensor, *table: Tensor) -> Tensor:
        same, sums, squares = sums_of_powers(y)
        return clip_round(same, *table) * (sums + squares)[:, :, None, None]

    upstream = y.flip(2) / 1e4
    plain = [network(*inputs), *gradients(network, inputs, upstream)]
    compile_passes("auto")
    compiled = [network(*inputs), *gradients(network, inputs, upstream)]
    if not fused._compiled:
        pytest.skip("no compiler on this machine")
    inputs = halfway_positions(2, 3, 15000)
    assert inputs[0].numel() > fused.SMALL
    assert_levels_are_rounded_twice(inputs)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=0)
    for got, expected in zip(compiled[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.slow
def test_compiled_integer_passes_before_and_in_depthwise_convolutions_are_exact() -> None:
    y, scale, shift, lowest, highest = halfway_positions(2, 16, 45 * 45)
    expected = levels_rounded_twice(y, scale, shift, lowest, highest)
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (2, 45, 46, 16), generator=g, dtype=torch.uint8)
    taps = torch.randint(-255, 256, (2, 9, 16), generator=g, dtype=torch.int32)
    assert min(y.numel(), levels.numel()) > fused.SMALL
    compile_passes("auto")
    image = last(y[..., None])
    found = clip_round_bytes(image.int(), scale, shift, lowest, highest, -lowest)
    sums = {stride: integer_depthwise(levels, taps, 3, stride) for stride in (1, 2)}
    if not fused._compiled:
        pytest.skip("no compiler on this machine")
    assert found.dtype == torch.uint8
    assert torch.equal(found[..., 0] + lowest[:, None, None], expected)
    for stride, y in sums.items():
        assert y.dtype == torch.int32
        for image in range(2):
            weight = taps[image].T.reshape(16, 1, 3, 3).double()  # integers: exact in float64
            alone = F.conv2d(levels[image].permute(2, 0, 1)[None].double(), weight, stride=stride, groups=16)
            assert torch.equal(y[image], alone[0].permute(1, 2, 0))


def broken_compiler(*_: object, **__: object) -> Callable:
    def compiled(*_: object, **__: object) -> None:
        raise OSError("c++: no such compiler\nand more lines")

    return compiled


def test_without_a_compiler_auto_says_so_in_one_line_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", broken_compiler)
    compile_passes("auto")
    y = torch.randn(3, 4, 150, 150)
    table = tables(3, 4, torch.float32)
    with caplog.at_level(logging.INFO):
        results = [clip_round(y, *table) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here, quantized layers run slower: c++: no such compiler"
    ]
    for levels in results:
        assert torch.equal(levels, naive_clip_round(y, *table))


def test_without_a_compiler_on_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken_compiler)
    compile_passes("on")
    with pytest.raises(InputError, match="runtime.compile: .*: c\\+\\+: no such compiler"):
        clip_round(torch.randn(3, 4, 150, 150), *tables(3, 4, torch.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_the_cpu() -> None:
    y = torch.randn(3, 4, 150, 150, generator=torch.Generator().manual_seed(0))
    inputs = [y, *tables(3, 4, torch.float32)]
    cpu = gradients(clip_round, inputs, y.flip(2))
    compile_passes("auto")
    cuda = gradients(clip_round, [tensor.cuda() for tensor in inputs], y.flip(2).cuda())
    for got, expected in zip(cuda, cpu, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
