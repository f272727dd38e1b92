"""REINFORCE with a self-critical baseline (Williams, 1992; Rennie et al., CVPR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from instaqnas import ranks


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor, entropy: Tensor, entropy_beta: float) -> Tensor:
    """Mean over images of -log p(a) * (R(sample) - R(greedy)) - beta * entropy: a scalar to be minimised.

    Args:
        log_prob: [B], of the sampled bit configuration, summed over positions.
        advantage: [B], no gradient flows through it.
        entropy: [B], of the policy, summed over positions.
        entropy_beta: weight of the entropy bonus.
    """
    return (-log_prob * advantage.detach() - entropy_beta * entropy).mean()


def normalized(advantage: Tensor) -> Tensor:
    """Advantages [B] divided by their root mean square over the batch, that of all processes; all zeros stay zeros.

    Their mean is not subtracted: the baseline has done that, and sampling no better than greedily must not look good.
    """
    squares = ranks.total(advantage.square().mean()) / ranks.world_size()  # their shares of the batch are equal
    return advantage / squares.sqrt().clamp(min=torch.finfo(advantage.dtype).tiny)
