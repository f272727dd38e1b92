"""BatchNorm per choice equals torch's over the images of each choice; so do its running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.quant.batch_norm import PerChoiceBatchNorm, reestimate_batch_norm, use_batch_renorm
from instaqnas.quant.switchable import SwitchableConv2d, calibrate
from tests.quant.switchable_reference import CASES, MIXED, Chain, build, convolve_alone, inputs


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
