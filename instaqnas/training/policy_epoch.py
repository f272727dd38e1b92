"""One epoch of the policy by REINFORCE; the detector is frozen and only judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from instaqnas.data.loader import Batch
from instaqnas.policy.bit_config import entropy, log_prob, mix_uniform, sample
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.reinforce import normalized, policy_gradient_loss
from instaqnas.training.detector_epoch import check_finite


@dataclass(frozen=True)
class Outcome:
    """What bit configurations brought: quality, GBitOps (policy included) and reward, each [B]."""

    quality: Tensor
    gbitops: Tensor
    reward: Tensor


Judge = Callable[[Batch, Tensor], Outcome]


@dataclass(frozen=True)
class PolicyEpoch:
    """Means of an epoch: rewards, qualities and costs of sampled and greedy configurations, and the entropy."""

    scalars: dict[str, float]


def train_policy_epoch(
    policy: PolicyNet,
    batches: Iterable[Batch],
    judge: Judge,
    optimizer: Optimizer,
    *,
    epsilon: float,
    entropy_beta: float,
    normalize_advantage: bool,
    device: torch.device,
    generator: torch.Generator,
    on_step: Callable[[dict[str, float]], None],
) -> PolicyEpoch:
    """Trains on every batch once.

    Args:
        batches: images as the detector will see them in use, on the CPU.
        judge: runs the frozen detector on a batch under bit configurations [B, L].
        epsilon: share of uniform exploration in what is sampled.
        entropy_beta: weight of the entropy bonus.
        normalize_advantage: scale the advantages of a batch to a root mean square of 1.
        generator: CPU generator of the samples.
        on_step: called after every step with its scalars.
    """
    policy.train()
    sums: dict[str, float] = {}
    images_seen = 0
    for step, batch in enumerate(batches):
        batch = batch.to(device)
        logits = policy(batch.images)
        behaviour = mix_uniform(logits, epsilon)
        choices = sample(behaviour, generator)
        sampled, greedy = judge(batch, choices), judge(batch, logits.argmax(-1))
        advantage = (sampled.reward - greedy.reward).to(logits)
        if normalize_advantage:
            advantage = normalized(advantage)
        policy_entropy = entropy(logits.softmax(-1))
        loss = policy_gradient_loss(log_prob(behaviour, choices), advantage, policy_entropy.sum(-1), entropy_beta)
        check_finite(loss, step, batch.image_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        scalars = {
            "reward/sampled": sampled.reward.mean().item(),
            "reward/greedy": greedy.reward.mean().item(),
            "quality/sampled": sampled.quality.mean().item(),
            "quality/greedy": greedy.quality.mean().item(),
            "cost/gbitops_sampled": sampled.gbitops.mean().item(),
            "cost/gbitops_greedy": greedy.gbitops.mean().item(),
            "policy/entropy": policy_entropy.mean().item(),
            "policy/loss": loss.item(),
        }
        on_step(scalars)
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0.0) + value * len(batch.image_ids)
        images_seen += len(batch.image_ids)
    return PolicyEpoch({name: value / images_seen for name, value in sums.items()})
