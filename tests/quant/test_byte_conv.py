"""Products of bytes equal those of float64, or are not used; a NaN is found before it becomes a byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instaqnas.quant import byte_conv
from instaqnas.quant.byte_conv import ByteConv2d, all_finite, has_byte_products, in_floating_point, keeps_bytes
from tests.quant.convolution_shapes import levels, needs_bytes, shapes

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
    monkeypatch.setattr(byte_conv, "ByteConv2d", Fake)
    assert has_byte_products.__wrapped__() == exact


def test_without_8_bit_dot_products_bytes_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not has_byte_products.__wrapped__()
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert not has_byte_products.__wrapped__()


# --- Finite or not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_value_that_is_not_finite_is_found_among_many(layout: torch.memory_format, value: float) -> None:
    x, table = torch.randn(2, 16, 30, 30).contiguous(memory_format=layout), torch.randn(2, 1).expand(2, 16)
    assert all_finite(x, table)
    x[1, 7, 29, 3] = value
    assert not all_finite(x, table)
    assert not all_finite(table, x)
    x[0, 0, 0, 0] = -value  # infinities of both signs do not cancel
    assert not all_finite(x, table)


def test_an_empty_map_and_integers_are_finite() -> None:
    assert all_finite(torch.empty(0, 3, 4, 4), torch.full((2, 2), 2**31 - 1, dtype=torch.int32))


def test_levels_are_kept_as_bytes_in_float32_on_a_cpu_only() -> None:
    x = torch.zeros(1, 1, 2, 2)
    assert keeps_bytes(x)
    assert not keeps_bytes(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not keeps_bytes(x)
    with in_floating_point():
        assert not keeps_bytes(x)
    assert keeps_bytes(x)
