"""Bit configurations [B, L]: ways to choose them, and their log-probability and entropy under a policy.

Loops over batches get configurations from a `ChooseBits` function: (input of the policy, keys of the B images) ->
choices [B, L]. Only a policy reads its input, images [B, 3, S, S] or features [B, C, H, W]; the other functions take
just the number of images and the device from it. Random choices come from a `Draw` function: keys -> numbers in [0, 1),
float64 [B, L]. The numbers of an image depend on its key alone, not on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from instaqnas.seeds import SampleKey

ChooseBits = Callable[[Tensor, Sequence[SampleKey]], Tensor]
Draw = Callable[[Sequence[SampleKey]], Tensor]


def uniformly_random(choices: int, draw: Draw) -> ChooseBits:
    """Samples one of K choices uniformly and independently per image and position."""
    return lambda images, keys: (choices * draw(keys)).long().to(images.device)


def with_frequencies(frequencies: Tensor, draw: Draw) -> ChooseBits:
    """Samples independently per image and position: choice k at position l has probability `frequencies[l, k]`."""

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        return sample(frequencies.expand(len(images), -1, -1), draw(keys)).to(images.device)

    return choose


def handed_out(configurations: Tensor, draw: Draw) -> ChooseBits:
    """Samples one of the bit configurations [N, L] uniformly per image."""

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        picked = (len(configurations) * draw(keys)[:, 0]).long()
        return configurations[picked.to(configurations.device)].to(images.device)

    return choose


def sandwich(bit_products: Sequence[float], draw: Draw) -> ChooseBits:
    """The sandwich rule (Yu and Huang, ICCV 2019) within each batch, whose images come in random order.

    Of three consecutive images, the first runs at the cheapest choice at every position, the second at the most
    expensive one, the third at a uniformly random configuration. `bit_products` are weight bits x activation bits of
    the K choices.
    """
    cheapest, most_expensive = bit_products.index(min(bit_products)), bit_products.index(max(bit_products))
    choice_of_role = torch.tensor([cheapest, most_expensive, 0])  # the third role takes random choices instead
    random = uniformly_random(len(bit_products), draw)

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        role = torch.tensor([key.place % 3 for key in keys])[:, None]
        return torch.where(role < 2, choice_of_role[role], random(images, keys).cpu()).to(images.device)

    return choose


def fixed(config: Sequence[int]) -> ChooseBits:
    """The same configuration for every image."""
    return lambda images, _: torch.tensor(config, device=images.device).expand(len(images), -1)


def sampled_by(policy: nn.Module, epsilon: float, draw: Draw) -> ChooseBits:
    """Samples from (1 - epsilon) * policy + epsilon * uniform."""

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


def shifted_greedy_by(policy: nn.Module, offset: Tensor) -> ChooseBits:
    """The policy's most likely choices after `offset` [L, K] is added to its logits."""

    @torch.no_grad()
    def choose(images: Tensor, _: Sequence[SampleKey]) -> Tensor:
        logits = policy(images)
        return (logits + offset.to(logits)).argmax(-1)

    return choose


def greedy_at_random_shifts(policy: nn.Module, offset_of: Callable[[float], Tensor], draw: Draw) -> ChooseBits:
    """The policy's most likely choices after a shift of its logits that each batch draws anew.

    Args:
        policy: the policy.
        offset_of: the shift [L, K] for a number in [0, 1).
        draw: random numbers; the one of a batch is the first number of its first image.
    """

    def choose(images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        return shifted_greedy_by(policy, offset_of(draw(keys)[0, 0].item()))(images, keys)

    return choose


def mix_uniform(logits: Tensor, epsilon: float) -> Tensor:
    """Probabilities (1 - epsilon) * softmax + epsilon / K, [B, L, K]."""
    return (1 - epsilon) * logits.softmax(-1) + epsilon / logits.shape[-1]


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One choice per image and position [B, L], by the inverse of the cumulative distribution.

    Args:
        probabilities: [B, L, K].
        uniform: random numbers in [0, 1), float64 [B, L], from the CPU, so that all devices draw the same choices.
    """
    cumulative = probabilities.detach().cpu().double().cumsum(-1)
    # Rounding can leave the sum just below or above 1. Scaled by it, a last choice of probability 0 is never drawn.
    chosen = (uniform[..., None] * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1)
    return chosen.to(probabilities.device)


def log_prob(probabilities: Tensor, choices: Tensor) -> Tensor:
    """Log-probability [B] of bit configurations `choices` [B, L] under `probabilities` [B, L, K]: a sum over L."""
    return probabilities.gather(-1, choices[..., None]).squeeze(-1).log().sum(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy per image and position [B, L] in nats, of `probabilities` [B, L, K]."""
    logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()  # keeps the gradient finite at 0
    return -(probabilities * logs).sum(-1)
