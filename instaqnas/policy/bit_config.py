"""Bit configurations [B, L]: the ways to choose them, and their log-probability and entropy under a policy.

`ChooseBits` is the one interface between a detector loop and what chooses: what a policy looks at and the B keys of the
images -> choices [B, L]. It looks at the images [B, 3, S, S], or at features of theirs [B, C, H, W]; other ways to
choose only take number and device from there. What is random comes from a `Draw`: keys -> numbers in [0, 1), float64
[B, L], an image's own whatever batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from instaqnas.quant.switchable import BitChoice
from instaqnas.seeds import SampleKey

ChooseBits = Callable[[Tensor, Sequence[SampleKey]], Tensor]
Draw = Callable[[Sequence[SampleKey]], Tensor]


def uniformly_random(choices: int, draw: Draw) -> ChooseBits:
    """Every one of K choices equally likely at every position and image."""
    return lambda images, keys: (choices * draw(keys)).long().to(images.device)


def with_frequencies(frequencies: Tensor, draw: Draw) -> ChooseBits:
    """Every image and position independently, choice k at position l with probability `frequencies[l, k]`, [L, K]."""

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        return sample(frequencies.expand(len(images), -1, -1), draw(keys)).to(images.device)

    return choose


def handed_out(configurations: Tensor, draw: Draw) -> ChooseBits:
    """Every image gets one of the bit configurations [N, L], each equally likely."""

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        picked = (len(configurations) * draw(keys)[:, 0]).long()
        return configurations[picked.to(configurations.device)].to(images.device)

    return choose


def sandwich(choices: Sequence[BitChoice], draw: Draw) -> ChooseBits:
    """The sandwich rule (Yu and Huang, ICCV 2019) within the batch of a step, whose images come in random order.

    Of three images in a row the first has the cheapest choice at every position, the second the dearest, the third a
    uniformly random configuration. Cost is weight bits x activation bits.
    """
    costs = [weight_bits * activation_bits for weight_bits, activation_bits in choices]
    ends = torch.tensor([costs.index(min(costs)), costs.index(max(costs)), 0])
    random = uniformly_random(len(choices), draw)

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        role = torch.tensor([key.place % 3 for key in keys])[:, None]
        return torch.where(role < 2, ends[role], random(images, keys).cpu()).to(images.device)

    return choose


def fixed(config: Sequence[int]) -> ChooseBits:
    """The same configuration for every image."""
    return lambda images, _: torch.tensor(config, device=images.device).expand(len(images), -1)


def sampled_by(policy: nn.Module, epsilon: float, draw: Draw) -> ChooseBits:
    """Sampled from the policy's distribution mixed with `epsilon` parts of the uniform one."""

    @torch.no_grad()
    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        return sample(mix_uniform(policy(images), epsilon), draw(keys))

    return choose


def greedy_by(policy: nn.Module) -> ChooseBits:
    """The policy's most likely choice at every position."""

    @torch.no_grad()
    def choose(images: Tensor, _: Sequence[SampleKey]) -> Tensor:
        return policy(images).argmax(-1)

    return choose


def mix_uniform(logits: Tensor, epsilon: float) -> Tensor:
    """Probabilities (1 - epsilon) * softmax + epsilon / K, [B, L, K]."""
    return (1 - epsilon) * logits.softmax(-1) + epsilon / logits.shape[-1]


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One choice per image and position [B, L], by the inverse of the cumulative distribution.

    Args:
        probabilities: [B, L, K].
        uniform: random numbers in [0, 1), float64 [B, L], on the CPU: drawn there so that devices agree.
    """
    cumulative = probabilities.detach().cpu().double().cumsum(-1)
    # Scaled by their sum, which rounding leaves beside 1: a last choice of probability 0 stays out of reach.
    chosen = (uniform[..., None] * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1)
    return chosen.to(probabilities.device)


def log_prob(probabilities: Tensor, choices: Tensor) -> Tensor:
    """Log-probability [B] of bit configurations `choices` [B, L]: the sum over positions, each counted once."""
    return probabilities.gather(-1, choices[..., None]).squeeze(-1).log().sum(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy per image and position [B, L] in nats, of `probabilities` [B, L, K]."""
    logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()  # at 0, a gradient that is finite
    return -(probabilities * logs).sum(-1)
