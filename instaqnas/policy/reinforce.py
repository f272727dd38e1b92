"""REINFORCE (Williams, 1992) with a self-critical (Rennie et al., CVPR 2017) or a leave-one-out baseline (RLOO)."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas import distributed

EQUAL_WITHIN = 4  # machine epsilons: rewards of an image whose relative difference is smaller count as equal


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor, entropy: Tensor, entropy_beta: float) -> Tensor:
    """Mean over samples and images of -log p(a) * advantage - beta * entropy: a scalar to be minimised.

    Args:
        log_prob: [n, B], of n sampled bit configurations per image, each summed over positions.
        advantage: [n, B], reward minus baseline; no gradient flows through it.
        entropy: [B], of the policy, summed over positions.
        entropy_beta: weight of the entropy bonus.
    """
    return (-log_prob * advantage.detach() - entropy_beta * entropy).mean()


def expected_reward_loss(probabilities: Tensor, advantage: Tensor, entropy: Tensor, entropy_beta: float) -> Tensor:
    """Mean over images of -sum_k p_k * advantage_k - beta * entropy: a scalar to be minimised.

    Its gradient is the expectation of the one of `policy_gradient_loss`, without the variance of sampling.

    Args:
        probabilities: [B, K], of the K choices of an image.
        advantage: [K, B], of every choice; no gradient flows through it.
        entropy: [B], of the policy.
        entropy_beta: weight of the entropy bonus.
    """
    return (-(probabilities * advantage.detach().T).sum(1) - entropy_beta * entropy).mean()


def above_expectation(probabilities: Tensor, rewards: Tensor) -> Tensor:
    """Advantages [K, B]: `rewards` [K, B] minus their expectation under `probabilities` [B, K], without gradient."""
    return rewards - (probabilities.detach().T * rewards).sum(0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages [n, B] of `rewards` [n, B], n >= 2: R_i minus the mean reward of the image's other n - 1 samples.

    The baseline of a sample does not depend on the sample, so the gradient is unbiased.

    If the rewards of an image are equal up to rounding, max R - min R <= 4 eps max |R|, its advantages are exactly 0.
    Otherwise the rounding error of their mean would pass for an advantage, and `normalized` could scale it to 1.

    Source: Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", ICLR workshop, 2019.
    """
    samples = len(rewards)
    advantage = (rewards - rewards.mean(0)) * samples / (samples - 1)
    rounding = EQUAL_WITHIN * torch.finfo(rewards.dtype).eps * rewards.abs().amax(0)
    equal = rewards.amax(0) - rewards.amin(0) <= rounding
    return torch.where(equal, 0.0, advantage)


def normalized(advantage: Tensor) -> Tensor:
    """Advantages [n, B] divided by their root mean square over the batch of all processes; zeros stay zeros.

    Their mean is not subtracted. The baseline has already done that, and if samples are worse than the greedy
    configuration, all of them shall have a negative advantage.
    """
    # Every process has an equal share of the batch, so the mean over processes is the mean over the batch.
    mean_square = distributed.total(advantage.square().mean()) / distributed.world_size()
    return advantage / mean_square.sqrt().clamp(min=torch.finfo(advantage.dtype).tiny)
