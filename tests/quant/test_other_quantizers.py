"""LSQ, PACT and DoReFa: levels lie on their grids, and every gradient equals that in their papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from instaqnas.quant.affine import Affine
from instaqnas.quant.quantizers import (
    ActivationQuantizer,
    DoReFaActivations,
    DoReFaWeights,
    LsqActivations,
    LsqPlusActivations,
    LsqWeights,
    PactActivations,
    activation_quantizer,
    weight_quantizer,
)

BITS = tuple(range(2, 9))
NAMES = ("lsq_plus", "lsq", "pact", "dorefa")


def round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def calibrated(name: str, bits: tuple[int, ...], *, signed: bool) -> ActivationQuantizer:
    quantizer = activation_quantizer(name, bits, signed=signed)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 5, 5, generator=g)
    quantizer.initialize(x if signed else x.relu())
    return quantizer.double()


def fake(quantizer: ActivationQuantizer, x: Tensor, choice: Tensor) -> Tensor:
    levels, step = quantizer(x, choice)
    return levels * step[choice].view(-1, 1, 1, 1)


def sample(images: int, *, signed: bool, seed: int = 0) -> Tensor:
    x = torch.randn(images, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return x if signed else x.relu()


# --- Properties of all quantizers at all bit-widths -------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_become_at_most_2_to_the_bits_integers_one_step_apart(name: str, signed: bool) -> None:
    all_bits = BITS if signed else (1, *BITS)
    quantizer = calibrated(name, all_bits, signed=signed)
    for k, bits in enumerate(all_bits):
        x = torch.linspace(-30 if signed else 0, 30, 20001, dtype=torch.float64).view(1, 1, 1, -1)
        levels, _ = quantizer(x, torch.tensor([k]))
        found = levels.unique()
        assert torch.equal(found, found.round())
        assert (found.diff() == 1).all()
        symmetric = signed and name in ("pact", "dorefa")  # no level without its negative
        assert len(found) == 2**bits - symmetric
        assert 0 in found
        assert (levels.flatten().diff() >= 0).all()  # monotone


def levels_by_hand(name: str, bits: int, *, signed: bool, zero_point: float = 0.0) -> Tensor:
    """All levels of a grid of inputs, in order."""
    if not signed:
        lowest, highest = 0, 2**bits - 1
    elif name in ("pact", "dorefa"):
        lowest, highest = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    else:
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.arange(lowest, highest + 1).double() - zero_point


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_on_the_grid_come_back_unchanged_and_those_beyond_become_its_ends(name: str, signed: bool) -> None:
    quantizer = calibrated(name, BITS, signed=signed)
    zeros = quantizer.zero_point.tolist() if name == "lsq_plus" and signed else [0.0] * len(BITS)
    for k, bits in enumerate(BITS):
        levels = levels_by_hand(name, bits, signed=signed, zero_point=round(zeros[k]))
        step = quantizer.grid(1).step[k].item()
        beyond = torch.tensor([levels[0] - 0.6, levels[0] - 1e3, levels[-1] + 0.6, levels[-1] + 1e3])
        x = torch.cat([levels, beyond]) * step
        found = quantizer(x.view(1, 1, 1, -1), torch.tensor([k]))[0].flatten()
        assert torch.equal(found, torch.cat([levels, levels[[0, 0, -1, -1]]]))


def test_dorefa_weights_whose_tanh_is_on_the_grid_become_its_levels() -> None:
    for bits in BITS:
        last = 2**bits - 1
        levels = torch.arange(-last, last + 1, 2).double().view(-1, 1, 1, 1)
        found, step = DoReFaWeights([bits]).double()((0.9 * levels / last).atanh())
        assert torch.equal(found[0], levels)
        assert step.item() == pytest.approx(0.9 / last)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_quantizing_a_quantized_input_changes_nothing(name: str, signed: bool) -> None:
    quantizer = calibrated(name, BITS, signed=signed)
    choice = torch.arange(len(BITS))
    once = fake(quantizer, sample(len(BITS), signed=signed), choice)
    torch.testing.assert_close(fake(quantizer, once, choice), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weights_become_integers_in_range_and_rise_with_the_weight(name: str) -> None:
    quantizer = weight_quantizer(name, BITS)
    weight = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(2)).sort(0).values
    quantizer.initialize(weight)
    levels, step = quantizer(weight)
    assert step.shape == (len(BITS), 1)
    for k, bits in enumerate(BITS):
        assert torch.equal(levels[k], levels[k].round())
        assert (levels[k].diff(dim=0) >= 0).all()
        lowest, highest = (
            (1 - 2**bits, 2**bits - 1) if name in ("pact", "dorefa") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
        assert lowest <= levels[k].min() < 0 < levels[k].max() <= highest


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_affine_map_is_absorbed_as_if_it_had_been_computed(name: str, signed: bool) -> None:
    g = torch.Generator().manual_seed(3)
    y = torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64)
    scale, shift = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    choice = torch.tensor([0, 2, 1, 2])
    upstream = torch.randn(y.shape, generator=g, dtype=torch.float64)
    results = []
    for lazy in (True, False):
        quantizer = calibrated(name, (2, 4, 8), signed=signed)
        leaves = [t.clone().requires_grad_() for t in (y, scale, shift)]
        x = Affine(*leaves)
        (fake(quantizer, x if lazy else x.value(), choice) * upstream).sum().backward()
        results.append([leaf.grad for leaf in leaves] + [p.grad for p in quantizer.parameters()])
    for absorbed, computed in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, computed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "signed"), [("lsq_plus", True), ("lsq", False), ("pact", True), ("pact", False)])
def test_1000_adversarial_steps_leave_step_sizes_positive_and_outputs_finite(name: str, signed: bool) -> None:
    """Large gradients, a large rate: to the lower end of the range and from there to the upper one."""
    x = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weights, inputs = weight_quantizer(name, (2, 4, 8)), activation_quantizer(name, (2, 4, 8), signed=signed)
    learning = [quantizer for quantizer in (weights, inputs) if [*quantizer.parameters()]]
    for quantizer in learning:
        quantizer.initialize(x)
    descent = torch.optim.SGD([p for quantizer in learning for p in quantizer.parameters()], lr=10.0)
    ends = {}
    for sign, steps in ((1, 300), (-1, 700)):
        for _ in range(steps):
            descent.zero_grad()
            grids = [quantizer.grid(27) for quantizer in learning]
            assert all((grid.step > 0).all() and grid.step.isfinite().all() for grid in grids)
            # What learns moves one of them: the step size, or of PACT the end of the range.
            (sign * 1e4 * sum(grid.step.sum() + grid.highest.sum() for grid in grids)).backward()
            descent.step()
        ends[sign] = [quantizer.grid(27).step for quantizer in learning]
        levels, step = weights(x)
        assert (levels * step.view(-1, 1, 1, 1, 1)).isfinite().all()
        levels, step = inputs(x, torch.arange(3))
        assert (levels * step.view(-1, 1, 1, 1)).isfinite().all()
    for quantizer, smallest, largest in zip(learning, ends[1], ends[-1], strict=True):
        # Alpha, the last level, has the bounds that step sizes have elsewhere.
        last = quantizer.highest[:, None] if name == "pact" else 1
        torch.testing.assert_close(smallest * last, torch.full((3, 1), 1e-8), rtol=1e-4, atol=0)
        torch.testing.assert_close(largest * last, torch.full((3, 1), 1e8), rtol=1e-4, atol=0)


# --- PACT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_pact_equals_its_paper_in_values_and_gradients(bits: int, signed: bool) -> None:
    alpha = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x = sample(1, signed=signed, seed=bits).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    # equation 1, and the gradients of equation 3: 1 to alpha where x is clipped, else 0; signed, -1 where it is below
    clipped = torch.where(x < alpha, x, alpha.expand_as(x))
    if signed:
        clipped = torch.where(x > -alpha, clipped, -alpha.expand_as(x))
        assert (x < -alpha).any()
    scale = (2 ** (bits - signed) - 1) / alpha.detach()
    expected = clipped + ((clipped * scale).round() / scale - clipped).detach()
    expected.backward(upstream)

    quantizer = PactActivations([bits], signed=signed).double()
    with torch.no_grad():
        quantizer.log_alpha.fill_(alpha.log())
    own = x.detach().clone().requires_grad_()
    levels, step = quantizer(own, None)
    (levels * step).backward(upstream)
    torch.testing.assert_close(levels * step, expected)
    torch.testing.assert_close(own.grad, x.grad)
    torch.testing.assert_close(quantizer.log_alpha.grad[0], alpha.grad * alpha)  # alpha is held as a logarithm


def test_pact_starts_at_ten() -> None:
    assert PactActivations([2, 4], signed=False).log_alpha.exp().tolist() == pytest.approx([10, 10])


# --- DoReFa -----------------------------------------------------------------------------------------------------------


def dorefa_weights_of_the_paper(weight: Tensor, bits: int) -> Tensor:
    """Equation 9: 2 * quantize(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, rounded straight through."""
    last = 2**bits - 1
    t = weight.tanh()
    unit = t / (2 * t.abs().max().detach()) + 0.5
    return 2 * (round_straight_through(unit * last) / last) - 1


@pytest.mark.parametrize("bits", BITS)
def test_dorefa_weights_equal_the_paper_up_to_their_constant_range(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 3, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(weight.shape, generator=g, dtype=torch.float64)
    largest = weight.detach().tanh().abs().max()
    expected = dorefa_weights_of_the_paper(weight, bits) * largest
    expected.backward(upstream)
    own = weight.detach().clone().requires_grad_()
    levels, step = DoReFaWeights([bits]).double()(own)
    (levels[0] * step[0]).backward(upstream)
    torch.testing.assert_close(levels[0] * step[0], expected)
    torch.testing.assert_close(own.grad, weight.grad)
    assert torch.equal(levels.detach().remainder(2), torch.ones_like(levels))  # odd integers


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_dorefa_activations_are_clamped_to_one_and_rounded(bits: int, signed: bool) -> None:
    x = sample(1, signed=signed, seed=bits).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    last = 2 ** (bits - signed) - 1
    expected = round_straight_through(x.clamp(-1 if signed else 0, 1) * last) / last
    expected.backward(upstream)
    own = x.detach().clone().requires_grad_()
    levels, step = DoReFaActivations([bits], signed=signed).double()(own, None)
    (levels * step).backward(upstream)
    torch.testing.assert_close(levels * step, expected)
    elsewhere = x != 0  # unsigned, an end of the clamp: torch gives those a gradient of its own
    torch.testing.assert_close(own.grad[elsewhere], x.grad[elsewhere])
    assert (own.grad[x.abs() > 1] == 0).all()


# --- LSQ --------------------------------------------------------------------------------------------------------------


def test_lsq_has_no_zero_point_where_lsq_plus_has_one() -> None:
    for kind, names in ((LsqActivations, {"log_step"}), (LsqPlusActivations, {"log_step", "zero_point"})):
        assert {name for name, _ in kind([2, 4], signed=True).named_parameters()} == names
        assert {name for name, _ in kind([2, 4], signed=False).named_parameters()} == {"log_step"}


@pytest.mark.parametrize("signed", [True, False])
def test_lsq_activations_equal_their_paper_in_values_and_gradients(signed: bool) -> None:
    quantizer = calibrated("lsq", BITS, signed=signed)
    x, choice = sample(9, signed=signed).requires_grad_(), torch.tensor([6, 0, 3, 3, 1, 2, 4, 5, 0])
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # equations 1 to 3; the ends of the range count as inside
    step = quantizer.log_step.detach().exp().requires_grad_()
    images = []
    for image, k in zip(x, choice.tolist(), strict=True):
        lowest, highest = levels_by_hand("lsq", BITS[k], signed=signed)[[0, -1]]
        position = image / step[k]
        clipped = torch.where(position < lowest, lowest, torch.where(position > highest, highest, position))
        images.append(round_straight_through(clipped) * step[k])
    expected = torch.stack(images)
    expected.backward(upstream)

    own = x.detach().clone().requires_grad_()
    found = fake(quantizer, own, choice)
    found.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own.grad, x.grad)
    # section 2.2, numel of one image; per step, since the logarithm descends
    factor = torch.tensor([1 / math.sqrt(75 * (2 ** (bits - signed) - 1)) for bits in BITS], dtype=torch.float64)
    torch.testing.assert_close(quantizer.log_step.grad, step.grad * factor / step.detach())


def test_step_sizes_per_channel_equal_one_quantizer_for_each_channel() -> None:
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(4, 3, 3, 3, generator=g, dtype=torch.float64) * torch.tensor([0.1, 1, 5, 20]).view(4, 1, 1, 1)
    upstream = torch.randn(2, *weight.shape, generator=g, dtype=torch.float64)
    together = LsqWeights([2, 4], channels=4).double()
    together.initialize(weight)
    levels, step = together(weight)
    assert step.shape == (2, 4)
    (levels * step.view(2, 4, 1, 1, 1) * upstream).sum().backward()
    for channel in range(4):
        alone = LsqWeights([2, 4]).double()
        alone.initialize(weight[channel : channel + 1])
        own_levels, own_step = alone(weight[channel : channel + 1])
        (own_levels * own_step.view(2, 1, 1, 1, 1) * upstream[:, channel : channel + 1]).sum().backward()
        assert torch.equal(own_levels[:, 0], levels[:, channel])
        torch.testing.assert_close(own_step[:, 0], step[:, channel])
        torch.testing.assert_close(alone.log_step.grad[:, 0], together.log_step.grad[:, channel])


@pytest.mark.parametrize("make", [lambda: weight_quantizer("lsq", (4,)), lambda: LsqActivations((4,), signed=False)])
def test_first_steps_of_lsq_are_those_of_its_paper(make: Callable) -> None:
    quantizer = make()
    quantizer.initialize(torch.tensor([1.0, 1.0, 2.0, 0.0]).view(4, 1, 1, 1))  # mean 1
    highest = 7 if quantizer.signed else 15
    assert quantizer.grid(1).step.item() == pytest.approx(2 / math.sqrt(highest))
