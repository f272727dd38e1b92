"""Switchable layers for tests, and the reference they have to equal: every image alone, by torch's own operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas.quant.switchable import SwitchableConv2d

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


class Chain(nn.Module):
    """Two layers, the second of which applies the ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SwitchableConv2d(3, 4, 3, [(8, 8)], signed_input=True)
        self.second = SwitchableConv2d(4, 5, 1, MIXED)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        return self.second(self.first(x), choice).value()
