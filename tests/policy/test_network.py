"""The policy network: inputs, outputs and cost, and that images do not influence each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instaqnas.policy.network import PolicyNet, effort_of, policy_gbitops, policy_layers
from instaqnas.quant.switchable import SwitchableConv2d, calibrate


def build(*, pool: int = 2, width: int = 4, bits: tuple[int, int] = (8, 8), seed: int = 0) -> PolicyNet:
    torch.manual_seed(seed)
    policy = PolicyNet(13, 3, pool=pool, width=width, bits=bits)
    images = random_images(6)
    calibrate(policy, lambda: policy(images))
    return policy


def random_images(count: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("size", [64, 75, 112])
@pytest.mark.parametrize("pool", [1, 2, 8])
def test_logits_have_one_row_per_position(size: int, pool: int) -> None:
    assert build(pool=pool)(random_images(2, size)).shape == (2, 13, 3)


@pytest.mark.parametrize("bits", [(32, 32), (8, 8), (4, 4)])
def test_a_new_policy_is_almost_uniform(bits: tuple[int, int]) -> None:
    probabilities = build(width=16, bits=bits)(random_images(4)).softmax(-1)
    assert ((probabilities - 1 / 3).abs() < 0.1).all()


def test_in_evaluation_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    policy = build().eval()
    images = random_images(5, seed=3)
    with torch.no_grad():
        together = policy(images)
        for part in ([0], [4, 2]):
            torch.testing.assert_close(policy(images[part]), together[part], rtol=1e-4, atol=1e-5)


def test_uint8_and_float_images_agree() -> None:
    policy, images = build().eval(), random_images(3)
    assert torch.equal(policy(images), policy(images.float()))


def test_grey_of_127_is_the_zero_of_the_network() -> None:
    policy = build(bits=(32, 32)).eval()
    inputs = []
    policy.stem.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0]))
    policy(torch.full((1, 3, 64, 64), 127, dtype=torch.uint8))
    policy(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    assert torch.equal(inputs[0], torch.zeros(1, 3, 32, 32))
    assert torch.equal(inputs[1], torch.ones(1, 3, 32, 32))


def test_every_pooled_pixel_reaches_the_logits() -> None:
    policy = build(pool=2, bits=(32, 32)).eval()
    images = random_images(1, 70).float().requires_grad_()
    policy(images).square().sum().backward()
    assert (images.grad[0].abs().sum(0) > 0).float().mean() > 0.99
    assert images.grad[..., -1].abs().sum() > 0
    assert images.grad[..., -1, :].abs().sum() > 0


@pytest.mark.parametrize("bits", [(32, 32), (8, 8), (4, 4)])
def test_every_parameter_gets_a_finite_gradient(bits: tuple[int, int]) -> None:
    policy = build(bits=bits).train()
    policy(random_images(4)).square().sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_uncalibrated_policy_gives_nan_and_not_numbers() -> None:
    assert PolicyNet(13, 3, pool=2, width=4, bits=(8, 8))(random_images(2)).isnan().all()


def test_all_layers_run_at_the_bits_that_are_counted() -> None:
    policy = build(bits=(4, 6))
    layers = policy_layers(policy, 64)
    convolutions = [m for m in policy.modules() if isinstance(m, SwitchableConv2d)]
    assert len(layers) == len(convolutions) == 1 + 4 * 2 + 3 + 1
    *others, head = [m.choices for m in convolutions]
    assert set(others) == {((4, 6),)}
    assert head == ((8, 8),)
    bitops = sum(layer.macs for layer in layers[:-1]) * 24 + layers[-1].macs * 64
    assert policy_gbitops(policy, 64) == pytest.approx(bitops / 1e9, rel=1e-12)


def test_more_pooling_costs_less_and_needs_no_other_parameters() -> None:
    coarse, fine = build(pool=8), build(pool=2)
    assert policy_gbitops(coarse, 128) < policy_gbitops(fine, 128) / 8
    assert [p.shape for p in coarse.parameters()] == [p.shape for p in fine.parameters()]


# --- Effort -----------------------------------------------------------------------------------------------------------


def test_a_unit_of_effort_raises_the_logits_of_expensive_choices() -> None:
    # log2 of 4, 16 and 64 is 2, 4 and 6: mean 4, standard deviation sqrt(8 / 3)
    step = 2 / (8 / 3) ** 0.5
    assert effort_of([4, 64, 16]) == pytest.approx([-step, step, 0], abs=1e-12)
    assert effort_of([16, 16]) == [0, 0]
    assert effort_of([12]) == [0]


@torch.no_grad()
def test_effort_moves_all_positions_of_an_image_alike() -> None:
    torch.manual_seed(0)
    policy = PolicyNet(13, 3, pool=4, width=4, bits=(8, 8), effort=[-1.0, 0.0, 2.0])
    images = random_images(4)
    calibrate(policy, lambda: policy(images))
    policy.eval()
    before = policy(images)
    policy.head.bias[-1] += 0.5
    shift = torch.tensor([-0.5, 0.0, 1.0]).expand(4, 13, 3)
    torch.testing.assert_close(policy(images) - before, shift, rtol=0, atol=1e-5)
    policy.head.weight[-1] *= 0
    policy.head.bias[-1] = 0
    plain = build(pool=4)
    plain.load_state_dict(
        {
            name: value[:-1] if name in ("head.weight", "head.bias") else value
            for name, value in policy.state_dict().items()
            if name != "effort"
        }
    )
    torch.testing.assert_close(plain.eval()(images), policy(images))
    assert policy_gbitops(policy, 64) - policy_gbitops(plain, 64) == pytest.approx(32 * 64 / 1e9, rel=1e-9)


# --- On the features of the stem --------------------------------------------------------------------------------------


def random_features(count: int, channels: int = 8, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed)).relu()


def build_on_stem(*, pool: int = 4, bits: tuple[int, int] = (8, 8)) -> PolicyNet:
    torch.manual_seed(0)
    policy = PolicyNet(13, 3, pool=pool, width=4, bits=bits, stem_channels=8)
    features = random_features(6)
    calibrate(policy, lambda: policy(features))
    return policy


@pytest.mark.parametrize("side", [32, 38, 56])
@pytest.mark.parametrize("pool", [1, 4, 16])
def test_features_of_the_stem_give_logits_too(side: int, pool: int) -> None:
    assert build_on_stem(pool=pool)(random_features(2, side=side)).shape == (2, 13, 3)


def test_cost_of_a_policy_on_the_stem_by_hand() -> None:
    # (side of the output, channels in, channels out, side of the kernel); 75 pixels make 38 features a side, pooled 10
    layers = [
        (10, 8, 4, 3),
        *[(10, 4, 4, 3)] * 2,
        *[(5, 4, 8, 3), (5, 8, 8, 3), (5, 4, 8, 1)],
        *[(3, 8, 16, 3), (3, 16, 16, 3), (3, 8, 16, 1)],
        *[(2, 16, 32, 3), (2, 32, 32, 3), (2, 16, 32, 1)],
        (1, 32, 13 * 3, 1),
    ]
    macs = sum(side**2 * inputs * outputs * kernel**2 for side, inputs, outputs, kernel in layers)
    assert policy_gbitops(build_on_stem(), 75) == pytest.approx(macs * 64 / 1e9, rel=1e-12)


def test_every_feature_reaches_the_logits() -> None:
    policy = build_on_stem(pool=4, bits=(32, 32)).eval()
    features = random_features(1, side=30).requires_grad_()
    policy(features).square().sum().backward()
    assert (features.grad[0].abs().sum(0) > 0).float().mean() > 0.99
    assert features.grad[..., -1].abs().sum() > 0


def test_an_offset_is_added_to_the_logits_of_every_image() -> None:
    policy, images = build().eval(), random_images(3)
    offset = torch.randn(13, 3, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        before = policy(images)
        policy.add_to_logits(offset)
        torch.testing.assert_close(policy(images), before + offset.float())
