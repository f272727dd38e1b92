"""REINFORCE (Williams, 1992) with a self-critical (Rennie et al., CVPR 2017) or a leave-one-out baseline (RLOO)."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas import ranks


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor, entropy: Tensor, entropy_beta: float) -> Tensor:
    """Mean over samples and images of -log p(a) * advantage - beta * entropy: a scalar to be minimised.

    Args:
        log_prob: [n, B], of n sampled bit configurations an image, each summed over positions.
        advantage: [n, B], reward above the baseline; no gradient flows through it.
        entropy: [B], of the policy, summed over positions.
        entropy_beta: weight of the entropy bonus.
    """
    return (-log_prob * advantage.detach() - entropy_beta * entropy).mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """R_i - mean of the rewards of the other n - 1 samples of the same image: advantages [n, B] of `rewards` [n, B].

    The baseline of a sample does not depend on it, so the gradient is unbiased; n is at least 2.

    Source: Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", ICLR workshop, 2019.
    """
    samples = len(rewards)
    return (rewards - rewards.mean(0)) * samples / (samples - 1)


def normalized(advantage: Tensor) -> Tensor:
    """Advantages [n, B] divided by their root mean square over the batch, that of all processes; zeros stay zeros.

    Their mean is not subtracted: the baseline has done that, and sampling no better than greedily must not look good.
    """
    squares = ranks.total(advantage.square().mean()) / ranks.world_size()  # their shares of the batch are equal
    return advantage / squares.sqrt().clamp(min=torch.finfo(advantage.dtype).tiny)
