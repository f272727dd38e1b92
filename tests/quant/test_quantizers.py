"""Quantizers: levels lie on their grids, and every gradient equals that in LSQ or LSQ+."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from instaqnas.quant.fused import clip_round
from instaqnas.quant.quantizers import (
    LsqPlusActivations,
    LsqWeights,
    NestedWeights,
    Quantizer,
    level_range,
    weight_quantizer,
)

BITS = tuple(range(2, 9))
GRIDS = [*itertools.product(BITS, (True, False)), (1, False)]  # (bits, signed)
HAND_RANGES = {  # bits: (signed), (unsigned)
    1: (None, (0, 1)),
    2: ((-2, 1), (0, 3)),
    3: ((-4, 3), (0, 7)),
    4: ((-8, 7), (0, 15)),
    5: ((-16, 15), (0, 31)),
    6: ((-32, 31), (0, 63)),
    7: ((-64, 63), (0, 127)),
    8: ((-128, 127), (0, 255)),
}


def hand_range(bits: int, signed: bool) -> tuple[int, int]:
    return HAND_RANGES[bits][0 if signed else 1]


def row(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table column of one entry, as `to_grid` takes it for x [n, m]."""
    return torch.tensor([[float(value)]], dtype=dtype)


def to_grid(x: Tensor, step: Tensor, lowest: Tensor, highest: Tensor, zero: Tensor | None = None) -> Tensor:
    """Levels of x [n, ...] on the grids of table columns [n, 1, ...] or [1, 1, ...], by `clip_round` as in quantizers.

    For gradients of tables that no quantizer learns as they are.
    """
    scale, lowest, highest = (table.flatten().expand(len(x)) for table in (1 / step, lowest, highest))
    if zero is not None:
        shift = round_straight_through(zero).flatten().expand(len(x))
        lowest, highest = lowest - shift, highest - shift
    return clip_round(x.reshape(len(x), 1, -1), scale[:, None], torch.zeros_like(scale)[:, None], lowest, highest).view(
        x.shape
    )


def grid_of(x: Tensor, step: float, bits: int, signed: bool, zero_point: float = 0.0) -> Tensor:
    """Levels of x [n] by the activation quantizer."""
    quantizer = LsqPlusActivations([bits], signed=signed).to(x.dtype)
    return with_steps(quantizer, [step], [zero_point] if signed else None)(x.view(1, 1, 1, -1), None)[0].flatten()


def round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def naive_fake_quantize(x: Tensor, step: Tensor, lowest: Tensor, highest: Tensor, zero: Tensor | float) -> Tensor:
    """LSQ+ equation 1 written out, differentiated by autograd."""
    zero = round_straight_through(zero) if isinstance(zero, Tensor) else zero
    clipped = torch.minimum(torch.maximum(x / step + zero, lowest), highest)
    return (round_straight_through(clipped) - zero) * step


def with_steps(quantizer: Quantizer, steps: list[float], zero_points: list[float] | None = None) -> Quantizer:
    with torch.no_grad():
        log_step = torch.tensor(steps, dtype=quantizer.log_step.dtype).log()
        quantizer.log_step.copy_(log_step.view_as(quantizer.log_step))
        if zero_points is not None:
            quantizer.zero_point.copy_(torch.tensor(zero_points))
    return quantizer


# --- Levels of the grids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_level_range_is_that_of_the_hand_table(bits: int, signed: bool) -> None:
    assert level_range(bits, signed=signed) == hand_range(bits, signed)


def test_a_signed_grid_has_at_least_2_bits() -> None:
    with pytest.raises(ValueError, match="at least 2 bits"):
        LsqPlusActivations([2, 1], signed=True)
    with pytest.raises(ValueError, match="at least 2 bits"):
        LsqWeights([1])


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
@pytest.mark.parametrize("step", [0.037, 1.0, 2.9])
def test_a_representable_grid_comes_back_unchanged(bits: int, signed: bool, step: float) -> None:
    lowest, highest = hand_range(bits, signed)
    levels = torch.arange(lowest, highest + 1).float()
    assert torch.equal(grid_of(levels * step, step, bits, signed), levels)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point", [-3.0, 0.0, 2.0])
def test_with_a_zero_point_the_grid_is_shifted_and_zero_stays_zero(bits: int, zero_point: float) -> None:
    lowest, highest = hand_range(bits, True)
    levels = torch.arange(lowest, highest + 1).float() - zero_point
    assert torch.equal(grid_of(levels * 0.21, 0.21, bits, True, zero_point), levels)
    if lowest <= zero_point <= highest:
        assert grid_of(torch.zeros(1), 0.21, bits, True, zero_point).item() == 0


def test_a_zero_point_between_integers_is_rounded() -> None:
    x = torch.linspace(-3, 3, 41)
    assert torch.equal(grid_of(x, 0.3, 3, True, 1.4), grid_of(x, 0.3, 3, True, 1.0))


def test_the_weight_quantizer_returns_every_representable_grid_of_its_table_unchanged() -> None:
    steps = [0.01 * 2**k * 1.1 for k in range(len(BITS))]
    quantizer = with_steps(LsqWeights(BITS), steps)
    for k, bits in enumerate(BITS):
        lowest, highest = hand_range(bits, True)
        levels = torch.arange(lowest, highest + 1).float().view(2, -1, 1, 1)
        grids, step = quantizer(levels * steps[k])
        assert grids.shape == (len(BITS), *levels.shape)
        assert torch.equal(grids[k], levels)
        torch.testing.assert_close(step[:, 0], torch.tensor(steps))


@pytest.mark.parametrize("signed", [True, False])
def test_the_activation_quantizer_gives_every_image_the_grid_of_its_choice(signed: bool) -> None:
    steps, zeros = [0.5 / (k + 1) for k in range(len(BITS))], [float(k % 3 - 1) for k in range(len(BITS))]
    quantizer = with_steps(LsqPlusActivations(BITS, signed=signed), steps, zeros if signed else None)
    choice = torch.tensor([6, 0, 3, 3, 1, 2, 4, 5, 0])
    levels = torch.empty(len(choice), 1, 16, 16)
    for image, k in enumerate(choice.tolist()):
        lowest, highest = hand_range(BITS[k], signed)
        count = highest - lowest + 1
        levels[image] = (lowest + torch.arange(256) % count - (zeros[k] if signed else 0.0)).view(1, 16, 16)
    own_steps = torch.tensor(steps)[choice]
    grids, step = quantizer(levels * own_steps.view(-1, 1, 1, 1), choice)
    assert torch.equal(grids, levels)
    torch.testing.assert_close(step[choice], own_steps)


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_levels_are_integers_in_range_at_most_half_a_step_off_and_rise_with_x(bits: int, signed: bool) -> None:
    lowest, highest = hand_range(bits, signed)
    step = 0.083
    x = (torch.rand(4000, generator=torch.Generator().manual_seed(bits)) * 3 - 1.5) * (highest + 1) * step
    x = x.sort().values
    levels = grid_of(x, step, bits, signed)
    assert torch.equal(levels, levels.round())
    assert levels.min() == lowest
    assert levels.max() == highest
    assert (levels.diff() >= 0).all()
    inside = (x > lowest * step) & (x < highest * step)
    assert ((levels * step - x).abs()[inside] <= step / 2 * 1.0001).all()
    assert (levels[x <= lowest * step] == lowest).all()
    assert (levels[x >= highest * step] == highest).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point", [0.0, 1.0])
def test_quantizing_twice_changes_nothing_more(bits: int, zero_point: float) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(7))
    for step in (0.0123, 0.31, 1.7):
        once = grid_of(x, step, bits, True, zero_point)
        assert torch.equal(grid_of(once * step, step, bits, True, zero_point), once)


def test_levels_equal_those_of_the_torch_operators() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(3)) * 2
    for bits in BITS:
        lowest, highest = hand_range(bits, True)
        torch_values = torch.fake_quantize_per_tensor_affine(x, 0.25, 1, lowest, highest)
        assert torch.equal(grid_of(x, 0.25, bits, True, 1.0) * 0.25, torch_values)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("with_zero_point", [False, True])
def test_gradients_equal_those_of_a_naive_composition(shared: bool, with_zero_point: bool) -> None:
    g = torch.Generator().manual_seed(11)
    n, rows = 5, 1 if shared else 5
    column = {"generator": g, "dtype": torch.float64}
    x = torch.randn(n, 3, 4, 6, **column)
    bits = [3] if shared else [2, 3, 4, 6, 8]
    ranges = torch.tensor([hand_range(b, True) for b in bits], dtype=torch.float64)
    lowest, highest = ranges[:, 0].view(-1, 1, 1, 1), ranges[:, 1].view(-1, 1, 1, 1)
    step = (torch.rand(rows, 1, 1, 1, **column) + 0.5) * 1.2 / highest
    zero = torch.randint(-1, 2, (rows, 1, 1, 1), generator=g).double() + 0.2 if with_zero_point else None
    upstream = torch.randn(x.shape, **column)

    def gradients(fake_quantize) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, step, zero) if t is not None]
        fake_quantize(*leaves).backward(upstream)
        return [leaf.grad for leaf in leaves]

    def ours(x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        return to_grid(x, step, lowest, highest, zero) * step

    def naive(x: Tensor, step: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        return naive_fake_quantize(x, step, lowest, highest, zero)

    outside = (x / step < lowest) | (x / step > highest)
    assert 0.05 < outside.double().mean() < 0.8  # both regions are exercised
    for got, expected in zip(gradients(ours), gradients(naive), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradient_of_x_is_the_slope_over_whole_steps_inside_and_zero_outside() -> None:
    step, x = 0.3, torch.tensor([-5.0, -1.13, -0.4, 0.2, 0.55, 0.8, 4.0], dtype=torch.float64, requires_grad=True)
    fake = grid_of(x, step, 4, True) * step
    slope = (grid_of(x + step, step, 4, True) - grid_of(x - step, step, 4, True)) * step / (2 * step)
    (gradient,) = torch.autograd.grad(fake.sum(), x)
    torch.testing.assert_close(gradient, slope.detach())
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1, 1, 1, 1, 1, 0], dtype=torch.float64))


@pytest.mark.parametrize("zero_point", [0.0, 2.0])
def test_gradient_of_the_step_equals_finite_differences_where_x_is_clipped(zero_point: float) -> None:
    x = torch.tensor([-9.0, -4.0, 3.0, 7.5], dtype=torch.float64)  # all clipped at 3 bits and step 0.4
    step = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def value(s: Tensor) -> Tensor:
        zero = torch.full_like(s, zero_point)
        levels = to_grid(x[None], s, torch.full_like(s, -4), torch.full_like(s, 3), zero)
        return (levels * s * upstream).sum()

    (gradient,) = torch.autograd.grad(value(step), step)
    h = 1e-6
    difference = (value(step.detach() + h) - value(step.detach() - h)) / (2 * h)
    torch.testing.assert_close(gradient.squeeze(), difference, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_step_is_the_rounding_error_in_steps_inside() -> None:
    x = torch.tensor([[0.33, -0.72, 1.11]], dtype=torch.float64)  # in steps of 0.5: 0.66, -1.44, 2.22
    step = row(0.5, torch.float64).requires_grad_()
    fake = to_grid(x, step, row(-8, torch.float64), row(7, torch.float64)) * step
    (gradient,) = torch.autograd.grad(fake.sum(), step)
    assert gradient.item() == pytest.approx((1 - 0.66) + (-1 + 1.44) + (2 - 2.22))


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_values_and_gradients_equal_torchs_learnable_fake_quantization(bits: int, signed: bool) -> None:
    lowest, highest = hand_range(bits, signed)
    step, g = 1.7 / highest, torch.Generator().manual_seed(bits)
    # torch lets the gradient through for half a step beyond the range, LSQ does not: leave those x out
    x = torch.randn(4000, generator=g)
    beyond = torch.maximum(x / step - highest, lowest - x / step)
    x = x[(beyond <= 0) | (beyond > 0.51)]
    assert ((x > lowest * step) & (x < highest * step)).sum() > 100
    upstream = torch.randn(x.shape, generator=g)
    factor = 1 / math.sqrt(x.numel() * highest)

    theirs = [x.clone().requires_grad_(), torch.tensor([step], requires_grad=True), torch.zeros(1)]
    expected = torch._fake_quantize_learnable_per_tensor_affine(*theirs, lowest, highest, factor)
    expected.backward(upstream)

    quantizer = with_steps(LsqWeights([bits]) if signed else LsqPlusActivations([bits], signed=False), [step])
    own = x.clone().requires_grad_()
    four = own.view(1, -1, 1, 1)
    levels, own_step = quantizer(four) if signed else quantizer(four, None)
    fake = levels.flatten() * own_step.flatten()
    fake.backward(upstream)

    torch.testing.assert_close(fake, expected)
    torch.testing.assert_close(own.grad, theirs[0].grad)
    # the step size is held as a logarithm, and its gradient is such that descent moves it as in LSQ: divided by `step`
    torch.testing.assert_close(
        quantizer.log_step.grad, theirs[1].grad.view_as(quantizer.log_step) / step, rtol=1e-4, atol=1e-5
    )


def test_zero_point_gradient_equals_torchs_learnable_fake_quantization() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3000, generator=g)
    x = x[((x / 0.2 + 2 - 7).abs() > 0.51) & ((x / 0.2 + 2 + 8).abs() > 0.51)]
    upstream = torch.randn(x.shape, generator=g)
    theirs = [x, torch.tensor([0.2]), torch.tensor([2.0], requires_grad=True)]
    torch._fake_quantize_learnable_per_tensor_affine(*theirs, -8, 7, 1.0).backward(upstream)
    zero = row(2).requires_grad_()
    (to_grid(x[None], row(0.2), row(-8), row(7), zero) * 0.2).backward(upstream[None])
    torch.testing.assert_close(zero.grad[0], theirs[2].grad, rtol=1e-4, atol=1e-4)


def test_plain_descent_moves_a_step_size_as_lsq_does() -> None:
    """A small step of SGD on the logarithm changes s by lr * g * dL/ds, to first order."""
    for step in (0.02, 0.5, 3.0):
        quantizer = with_steps(LsqWeights([4]), [step]).double()
        weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double() * step * 4
        naive = torch.tensor(step, dtype=torch.float64, requires_grad=True)
        naive_fake_quantize(weight, naive, torch.tensor(-8.0), torch.tensor(7.0), 0.0).sum().backward()
        levels, own = quantizer(weight)
        (levels * own.view(1, 1, 1, 1, 1)).sum().backward()
        lr = 1e-5 * step
        torch.optim.SGD(quantizer.parameters(), lr=lr).step()
        moved = quantizer.log_step.exp().item() - torch.tensor(step).log().double().exp().item()
        assert moved == pytest.approx(-lr * naive.grad.item() / math.sqrt(weight.numel() * 7), rel=1e-3)


def moved_by(optimizer: type, lr: float, numel: int) -> list[float]:
    """Change of log s at each of five steps, for a loss linear in s; `numel` decides LSQ's gradient scale."""
    quantizer = with_steps(LsqWeights([4]), [0.5])
    descent, moves = optimizer(quantizer.parameters(), lr=lr), []
    for _ in range(5):
        before = quantizer.log_step.item()
        descent.zero_grad()
        (3 * quantizer.grid(numel).step).sum().backward()
        descent.step()
        moves.append(quantizer.log_step.item() - before)
    return moves


def test_the_gradient_scale_of_lsq_slows_sgd_down() -> None:
    many, few = (moved_by(torch.optim.SGD, 1e-3, numel)[0] for numel in (10_000, 1))
    assert few == pytest.approx(100 * many, rel=1e-2)  # 1 / sqrt(numel * highest)


def test_under_adamw_a_step_size_moves_by_the_learning_rate_whatever_the_gradient_scale() -> None:
    for lr in (1e-3, 1e-2):  # as changed by step_size_lr_factor
        many, few = (moved_by(torch.optim.AdamW, lr, numel) for numel in (10_000, 1))
        assert few == pytest.approx(many, rel=1e-3)
        assert few == pytest.approx([-lr] * 5, rel=0.1)


@pytest.mark.parametrize("bits", BITS)
def test_step_gradient_of_a_weight_is_scaled_by_its_size_and_highest_level(bits: int) -> None:
    highest, step, numel = hand_range(bits, True)[1], 0.25, 24
    quantizer = with_steps(LsqWeights([bits]), [step])
    levels, own_step = quantizer(torch.full((2, 3, 2, 2), 1e3))  # every weight at the highest level
    (levels[0] * own_step[0]).sum().backward()
    # d/dstep = numel * highest, scaled by 1 / sqrt(numel * highest); per step, since the logarithm descends
    assert quantizer.log_step.grad.item() == pytest.approx(1 / step * math.sqrt(numel * highest), rel=1e-5)


def test_step_gradient_of_an_input_is_scaled_by_the_size_of_one_image_not_of_the_batch() -> None:
    images, numel, step, highest = 6, 20, 0.5, 15
    quantizer = with_steps(LsqPlusActivations([4, 4], signed=False), [step, step])
    choice = torch.tensor([0, 0, 0, 0, 1, 1])
    levels, steps = quantizer(torch.full((images, 5, 2, 2), 1e3), choice)
    (levels * steps[choice].view(-1, 1, 1, 1)).sum().backward()
    one_image = 1 / step * math.sqrt(numel * highest)
    assert quantizer.log_step.grad.tolist() == pytest.approx([4 * one_image, 2 * one_image], rel=1e-5)


def test_a_zero_gradient_leaves_zeros_and_no_nan() -> None:
    weights, inputs = LsqWeights([2, 32, 8]), LsqPlusActivations([3, 32, 8], signed=True)
    weight, x = torch.zeros(2, 3, 1, 1, requires_grad=True), torch.zeros(4, 3, 2, 2, requires_grad=True)
    weights.initialize(weight)
    inputs.initialize(x)
    levels, weight_step = weights(weight)
    grid, input_step = inputs(x, torch.tensor([0, 1, 2, 1]))
    total = levels.sum() + weight_step.sum() + grid.sum() + input_step.sum()
    (total * 0.0).backward()
    for leaf in (weight, x, weights.log_step, inputs.log_step, inputs.zero_point):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_choice_that_no_image_takes_gets_no_gradient() -> None:
    quantizer = with_steps(LsqPlusActivations([2, 4, 8], signed=True), [0.5, 0.2, 0.1], [0.0, 1.0, 0.0])
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    choice = torch.tensor([2, 0, 2])
    levels, step = quantizer(x, choice)
    (levels * step[choice].view(-1, 1, 1, 1)).square().sum().backward()
    assert quantizer.log_step.grad[1] == 0
    assert quantizer.zero_point.grad[1] == 0
    assert (quantizer.log_step.grad[[0, 2]] != 0).all()


# --- Nested weights ---------------------------------------------------------------------------------------------------

PAIRS = list(itertools.combinations(BITS, 2))


def nested(bits: tuple[int, ...], step: float | list[float]) -> NestedWeights:
    """With `step` of the widest integers, one or one per channel."""
    steps = step if isinstance(step, list) else [step]
    return with_steps(NestedWeights(bits, len(steps)), steps)


def near_multiples(step: float, last: int) -> Tensor:
    """All multiples of `step` up to `last`, and their neighbours among the normal float32 numbers, [n, 1, 1, 1]."""
    multiples = torch.arange(-last, last + 1).float() * step
    tiny = torch.finfo(torch.float32).tiny
    above, below = (multiples.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))
    above[last], below[last] = tiny, -tiny
    return torch.cat([multiples, above, below]).view(-1, 1, 1, 1)


def integers_of(levels: Tensor) -> Tensor:
    """q of levels 2q + 1."""
    assert (levels.remainder(2) == 1).all()
    return (levels.long() - 1) // 2


def naive_nested_integer(weight: float, step: float, bits: int, widest: int) -> int:
    """Top bits of floor(w / s) clipped to the widest grid, in exact arithmetic."""
    lowest, highest = hand_range(widest, True)
    return min(max(math.floor(Fraction(weight) / Fraction(step)), lowest), highest) >> (widest - bits)


@pytest.mark.parametrize(("narrow", "wide"), PAIRS)
def test_integers_of_fewer_bits_are_the_top_bits_of_more(narrow: int, wide: int) -> None:
    g = torch.Generator().manual_seed(narrow + 10 * wide)
    for step in (0.0371, 0.25, 1 / 3, 1e-7):
        on_edges = near_multiples(step, 2**wide)
        between = torch.randn(2000, 1, 1, 1, generator=g) * step * 2 ** (wide - 1)
        few, many = integers_of(nested((narrow, wide), step)(torch.cat([on_edges, between]))[0])
        assert torch.equal(few, many >> (wide - narrow))
        assert (few.min(), few.max()) == hand_range(narrow, True)
        assert (many.min(), many.max()) == hand_range(wide, True)


@pytest.mark.parametrize("bits", [BITS, (8, 2, 5), (3, 4)])
def test_nested_integers_equal_exact_arithmetic(bits: tuple[int, ...]) -> None:
    g, widest = torch.Generator().manual_seed(0), max(bits)
    step = 2.0**-5  # then division by it is exact, and so are the multiples
    weight = torch.randn(300, 1, 1, 1, generator=g) * step * 2 ** (widest - 1)
    weight = torch.cat([weight, near_multiples(step, 20), torch.zeros(1, 1, 1, 1)])
    quantizer = nested(bits, 1.0)
    with torch.no_grad():
        quantizer.log_step.fill_(math.log(step))
        assert quantizer.grid(1).step[bits.index(widest)] == step / 2  # its exponential is exact
    levels, _ = quantizer(weight)
    for k, own in enumerate(bits):
        expected = [naive_nested_integer(value, step, own, widest) for value in weight.flatten().tolist()]
        assert integers_of(levels[k]).flatten().tolist() == expected


@pytest.mark.parametrize("bits", [BITS, (4, 2, 32, 8)])
def test_nested_levels_stand_for_the_middle_of_what_falls_to_them(bits: tuple[int, ...]) -> None:
    step, widest = 0.0371, 8
    weight = (torch.linspace(-1.3, 1.3, 3001) * step * 2 ** (widest - 1)).view(-1, 1, 1, 1)
    levels, steps = nested(bits, step)(weight)
    for k, own in enumerate(bits):
        if own == 32:
            assert torch.equal(levels[k], weight)
            assert steps[k] == 1
            continue
        width = step * 2 ** (widest - own)  # of the interval of one level
        assert steps[k].item() == pytest.approx(width / 2, rel=1e-6)
        assert (levels[k].flatten().diff() >= 0).all()
        assert len(levels[k].unique()) == 2**own
        assert levels[k].unique().tolist() == list(range(1 - 2**own, 2**own, 2))
        inside = weight.abs() < width * 2 ** (own - 1)
        assert ((levels[k] * steps[k] - weight).abs()[inside] <= width / 2 * 1.0001).all()


def test_nested_weights_on_the_grid_of_a_choice_come_back_unchanged_there() -> None:
    quantizer = nested(BITS, 0.0371)
    for k, bits in enumerate(BITS):
        levels = torch.arange(1 - 2**bits, 2**bits, 2).float().view(-1, 1, 1, 1)
        weight = levels * quantizer.grid(1).step[k].detach()
        assert torch.equal(quantizer(weight)[0][k], levels)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("bits", [(2, 4, 8), (5, 3)])
def test_gradients_of_nested_weights_equal_those_of_a_naive_composition(bits: tuple[int, ...], channels: int) -> None:
    g, widest = torch.Generator().manual_seed(3), max(bits)
    weight = torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64)
    upstream = torch.randn(len(bits), *weight.shape, generator=g, dtype=torch.float64)
    steps = [(1.2 + 0.2 * channel) / 2 ** (widest - 1) for channel in range(channels)]

    own, step = weight.clone().requires_grad_(), torch.tensor(steps, dtype=torch.float64, requires_grad=True)
    total = 0
    for k, b in enumerate(bits):
        lowest, highest = 1 - 2**b, 2**b - 1
        half = step.view(-1, 1, 1, 1) * 2 ** (widest - b) / 2
        position = own / half
        passed = torch.where(position < lowest, lowest, torch.where(position > highest, highest, position))
        level = (2 * torch.floor(position.detach() / 2) + 1).clamp(lowest, highest)
        outside = position.detach().abs() > highest
        assert 0.02 < outside.double().mean() < 0.7  # both regions are exercised
        total = total + ((passed + (level - passed).detach()) * half * upstream[k]).sum()
    total.backward()

    quantizer = nested(bits, steps).double()
    with torch.no_grad():
        quantizer.log_step.copy_(torch.tensor(steps, dtype=torch.float64).log())
    ours = weight.clone().requires_grad_()
    levels, table = quantizer(ours)
    (levels * table.view(len(bits), -1, 1, 1, 1) * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, own.grad, rtol=1e-9, atol=1e-9)
    # LSQ's factor of the widest grid; per step, since the logarithm descends
    factor = 1 / math.sqrt(weight.numel() / channels * hand_range(widest, True)[1])
    expected = step.grad * factor / torch.tensor(steps, dtype=torch.float64)
    torch.testing.assert_close(quantizer.log_step.grad[0], expected, rtol=1e-6, atol=1e-9)


def test_nested_step_sizes_per_channel_equal_one_quantizer_for_each_channel() -> None:
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(4, 3, 3, 3, generator=g) * torch.tensor([0.1, 1, 5, 20]).view(4, 1, 1, 1)
    together = NestedWeights((2, 32, 4), channels=4)
    together.initialize(weight)
    levels, step = together(weight)
    assert step.shape == (3, 4)
    for channel in range(4):
        alone = NestedWeights((2, 32, 4))
        alone.initialize(weight[channel : channel + 1])
        own_levels, own_step = alone(weight[channel : channel + 1])
        assert torch.equal(own_levels[:, 0], levels[:, channel])
        torch.testing.assert_close(own_step[:, 0], step[:, channel])


def test_first_nested_step_sizes_suit_the_narrowest_grid() -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0]).view(4, 1, 1, 1)  # mean|x| = 1
    quantizer = NestedWeights([3, 8, 32, 5])
    quantizer.initialize(x)
    width = 2 / math.sqrt(3)  # of the interval of one level at 3 bits; levels are odd, in units of half of it
    expected = [width / 2, width / 2 / 2**5, 1.0, width / 2 / 2**2]
    assert quantizer.grid(4).step.squeeze(1).tolist() == pytest.approx(expected, rel=1e-6)
    quantizer = NestedWeights([3, 8], channels=4)
    quantizer.initialize(x)
    assert quantizer.grid(4).step[0].tolist() == pytest.approx([width / 2, width / 2, width, 5e-9 * 2**5], rel=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_nested_step_sizes_stay_positive_and_nested(optimizer: type) -> None:
    quantizer = nested((2, 4), [0.01, 2.0])
    descent = optimizer(quantizer.parameters(), lr=1.0)
    for _ in range(30):
        descent.zero_grad()
        (100 * quantizer.grid(9).step).sum().backward()  # plain descent: 0.01 - 100 after one step
        descent.step()
    steps = quantizer.grid(9).step
    assert (steps > 0).all()
    assert torch.equal(steps[0], 4 * steps[1])
    assert (steps[1] < torch.tensor([0.01, 2.0]) / 2).all()


def test_an_uncalibrated_nested_quantizer_gives_nan_and_not_numbers() -> None:
    levels, step = NestedWeights([4, 8])(torch.rand(2, 3, 1, 1))
    assert (levels * step.view(-1, 1, 1, 1, 1)).isnan().all()


def test_nested_choices_without_quantization_have_no_parameters() -> None:
    weight = torch.randn(4, 3, 1, 1)
    quantizer = weight_quantizer("lsq", [32, 32], nested=True)
    levels, step = quantizer(weight)
    assert torch.equal(levels, torch.stack([weight, weight]))
    assert step is None
    assert not [*quantizer.parameters()]


# --- 32 bits, calibration, positivity ---------------------------------------------------------------------------------


def test_32_bits_quantize_nothing_and_have_no_parameters() -> None:
    weight, x = torch.randn(4, 3, 1, 1), torch.randn(2, 3, 4, 4)
    weights, inputs = LsqWeights([32]), LsqPlusActivations([32], signed=True)
    levels, weight_step = weights(weight)
    grid, input_step = inputs(x, None)
    assert torch.equal(levels[0], weight)
    assert torch.equal(grid, x)
    assert weight_step is None
    assert input_step is None
    assert not [*weights.parameters(), *inputs.parameters()]


def test_32_bits_among_other_choices_pass_values_and_gradients_through() -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 3, 1, 1, generator=g, requires_grad=True)
    weights = LsqWeights([2, 32, 8])
    weights.initialize(weight)
    levels, step = weights(weight)
    assert torch.equal(levels[1], weight)
    assert step[1] == 1
    (levels[1] * step[1]).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(weights.log_step.grad, torch.zeros(3, 1))

    x = torch.randn(3, 3, 4, 4, generator=g, requires_grad=True)
    inputs = LsqPlusActivations([2, 32, 8], signed=True)
    inputs.initialize(x)
    grid, steps = inputs(x, torch.tensor([1, 0, 1]))
    steps = steps[[1, 0, 1]]
    assert torch.equal(grid[[0, 2]], x[[0, 2]])
    assert not torch.equal(grid[1], x[1])
    assert steps[[0, 2]].tolist() == [1, 1]
    (grid * steps.view(-1, 1, 1, 1))[[0, 2]].sum().backward()
    assert torch.equal(x.grad[[0, 2]], torch.ones(2, 3, 4, 4))
    assert torch.equal(inputs.log_step.grad, torch.zeros(3))


@pytest.mark.parametrize("signed", [True, False])
def test_an_uncalibrated_quantizer_gives_nan_and_not_numbers(signed: bool) -> None:
    levels, step = LsqPlusActivations([4, 8], signed=signed)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    assert levels.isnan().all()
    levels, step = LsqWeights([4])(torch.rand(2, 3, 1, 1))
    assert (levels * step.view(-1, 1, 1, 1, 1)).isnan().all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_step_sizes_stay_positive_under_gradients_that_would_carry_a_plain_number_below_zero(optimizer: type) -> None:
    quantizer = with_steps(LsqWeights([2, 4]), [0.01, 2.0])
    descent = optimizer(quantizer.parameters(), lr=1.0)
    for _ in range(30):
        descent.zero_grad()
        (100 * quantizer.grid(9).step).sum().backward()  # plain descent: 0.01 - 100 after one step
        descent.step()
    steps = quantizer.grid(9).step.squeeze(1)
    assert (steps > 0).all()
    assert steps.isfinite().all()
    assert (steps < torch.tensor([0.01, 2.0])).all()


def test_first_step_sizes_are_twice_the_mean_over_the_root_of_the_highest_level() -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 0.0]).view(4, 1, 1, 1)  # mean|x| = 1
    weights = LsqWeights([2, 3, 8, 32])
    weights.initialize(x)
    expected = [2.0, 2 / math.sqrt(3), 2 / math.sqrt(127), 1.0]
    assert weights.grid(4).step.squeeze(1).tolist() == pytest.approx(expected, rel=1e-6)
    inputs = LsqPlusActivations([2, 3, 8, 32], signed=False)
    inputs.initialize(x)
    expected = [2 / math.sqrt(3), 2 / math.sqrt(7), 2 / math.sqrt(255), 1.0]
    assert inputs.grid(4).step.squeeze(1).tolist() == pytest.approx(expected, rel=1e-6)


def test_first_step_sizes_of_signed_inputs_span_minimum_to_maximum() -> None:
    inputs = LsqPlusActivations([2, 4, 8], signed=True)
    inputs.initialize(torch.tensor([-1.0, 0.3, 3.0]).view(1, 1, 1, 3))
    assert inputs.grid(3).step.squeeze(1).tolist() == pytest.approx([4 / 3, 4 / 15, 4 / 255], rel=1e-6)
    # lowest level + 1 / step, rounded: -2 + 0.75, -8 + 3.75, -128 + 63.75
    assert inputs.zero_point.tolist() == [-1, -4, -64]


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (-3.0, 0.5), (0.2, 5.0)])
def test_after_calibration_on_its_range_a_signed_input_is_at_most_one_step_off(low: float, high: float) -> None:
    x = torch.linspace(low, high, 500).view(1, 1, 1, -1)
    inputs = LsqPlusActivations([2, 3, 4, 8], signed=True)
    inputs.initialize(x)
    for k in range(4):
        levels, step = inputs(x, torch.tensor([k]))
        assert ((levels * step[k] - x).abs() <= step[k] * 1.001).all()


def test_data_of_zeros_calibrate_to_a_positive_step() -> None:
    for quantizer in (LsqWeights([4]), LsqPlusActivations([4], signed=True)):
        quantizer.initialize(torch.zeros(2, 2, 1, 1))
        assert quantizer.grid(4).step.item() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_levels_and_gradients_of_the_cpu() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        quantizer = with_steps(LsqPlusActivations([2, 4, 8], signed=True), [0.5, 0.2, 0.03], [0, 1, 0]).to(device)
        own = x.detach().to(device).requires_grad_()
        choice = torch.tensor([2, 0, 1], device=device)
        levels, step = quantizer(own, choice)
        (levels * step[choice].view(-1, 1, 1, 1)).square().sum().backward()
        gradients = (own.grad, quantizer.log_step.grad, quantizer.zero_point.grad)
        results.append([t.detach().cpu() for t in (levels, *gradients)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-4)
