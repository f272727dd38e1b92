"""Bit configurations [B, L]: the ways to choose them, and their log-probability and entropy under a policy.

`ChooseBits` is the one interface between a detector loop and what chooses: images [B, 3, S, S] -> choices [B, L].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from instaqnas.quant.switchable import BitChoice

ChooseBits = Callable[[Tensor], Tensor]


def uniformly_random(positions: int, choices: int, generator: torch.Generator) -> ChooseBits:
    """Every choice equally likely at every position and image; `generator` is on the CPU."""

    def choose(images: Tensor) -> Tensor:
        return torch.randint(choices, (len(images), positions), generator=generator).to(images.device)

    return choose


def sandwich(positions: int, choices: Sequence[BitChoice], generator: torch.Generator) -> ChooseBits:
    """The sandwich rule (Yu and Huang, ICCV 2019) within a batch, whose images come in random order.

    The first third of the images has the cheapest choice at every position, the second the dearest, the last has
    uniformly random configurations; where thirds are not whole, the earlier ones are larger. Cost is weight bits x
    activation bits; `generator` is on the CPU.
    """
    costs = [weight_bits * activation_bits for weight_bits, activation_bits in choices]
    cheapest, dearest = costs.index(min(costs)), costs.index(max(costs))
    random = uniformly_random(positions, len(choices), generator)

    def choose(images: Tensor) -> Tensor:
        drawn = random(images)
        first, second, _ = drawn.tensor_split(3)  # views
        first.fill_(cheapest)
        second.fill_(dearest)
        return drawn

    return choose


def fixed(config: Sequence[int]) -> ChooseBits:
    """The same configuration for every image."""
    return lambda images: torch.tensor(config, device=images.device).expand(len(images), -1)


def sampled_by(policy: nn.Module, epsilon: float, generator: torch.Generator) -> ChooseBits:
    """Sampled from the policy's distribution mixed with `epsilon` parts of the uniform one."""

    @torch.no_grad()
    def choose(images: Tensor) -> Tensor:
        return sample(mix_uniform(policy(images), epsilon), generator)

    return choose


def greedy_by(policy: nn.Module) -> ChooseBits:
    """The policy's most likely choice at every position."""

    @torch.no_grad()
    def choose(images: Tensor) -> Tensor:
        return policy(images).argmax(-1)

    return choose


def mix_uniform(logits: Tensor, epsilon: float) -> Tensor:
    """Probabilities (1 - epsilon) * softmax + epsilon / K, [B, L, K]."""
    return (1 - epsilon) * logits.softmax(-1) + epsilon / logits.shape[-1]


def sample(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One choice per image and position [B, L]; drawn on the CPU so that devices agree."""
    flat = probabilities.detach().flatten(0, 1).cpu()
    drawn = torch.multinomial(flat, 1, generator=generator)
    return drawn.view(probabilities.shape[:2]).to(probabilities.device)


def log_prob(probabilities: Tensor, choices: Tensor) -> Tensor:
    """Log-probability [B] of bit configurations `choices` [B, L]: the sum over positions, each counted once."""
    return probabilities.gather(-1, choices[..., None]).squeeze(-1).log().sum(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy per image and position [B, L] in nats, of `probabilities` [B, L, K]."""
    logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()  # at 0, a gradient that is finite
    return -(probabilities * logs).sum(-1)
