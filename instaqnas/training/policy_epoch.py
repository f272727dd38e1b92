"""One epoch of the policy by REINFORCE; the detector is frozen and only judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from instaqnas import ranks
from instaqnas.data.loader import Batch
from instaqnas.policy.bit_config import Draw, entropy, log_prob, mix_uniform, sample
from instaqnas.policy.reinforce import normalized, policy_gradient_loss
from instaqnas.training.detector_epoch import check_finite
from instaqnas.training.epoch_sums import EpochSums


@dataclass(frozen=True)
class Outcome:
    """What bit configurations brought: quality, GBitOps (policy included) and reward, each [B]."""

    quality: Tensor
    gbitops: Tensor
    reward: Tensor


Judge = Callable[[Batch, Tensor], Outcome]


def train_policy_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    judge: Judge,
    optimizer: Optimizer,
    *,
    sums: EpochSums,
    epsilon: float,
    entropy_beta: float,
    normalize_advantage: bool,
    device: torch.device,
    draw: Draw,
    on_step: Callable[[dict[str, float]], None],
) -> None:
    """Trains on every batch once.

    Args:
        network: a `PolicyNet`, as `distributed.parallel` returns it.
        batches: images as the detector will see them in use, on the CPU: this process's shares of the batches.
        judge: runs the frozen detector on a batch under bit configurations [B, L].
        sums: rewards, qualities and costs of sampled and greedy configurations and the entropy are added here, step by
            step; its steps are the number of the first one.
        epsilon: share of uniform exploration in what is sampled.
        entropy_beta: weight of the entropy bonus.
        normalize_advantage: scale the advantages of a batch to a root mean square of 1.
        draw: the random numbers that the samples come from.
        on_step: called after every step with its scalars.
    """
    network.train()
    for batch in batches:
        batch = batch.to(device)
        logits = network(batch.images)
        behaviour = mix_uniform(logits, epsilon)
        choices = sample(behaviour, draw(batch.keys))
        sampled, greedy = judge(batch, choices), judge(batch, logits.argmax(-1))
        advantage = (sampled.reward - greedy.reward).to(logits)
        if normalize_advantage:
            advantage = normalized(advantage)
        policy_entropy = entropy(logits.softmax(-1))
        loss = policy_gradient_loss(log_prob(behaviour, choices), advantage, policy_entropy.sum(-1), entropy_beta)
        check_finite(loss, sums.steps, batch.image_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        means = {
            "reward/sampled": sampled.reward.mean(),
            "reward/greedy": greedy.reward.mean(),
            "quality/sampled": sampled.quality.mean(),
            "quality/greedy": greedy.quality.mean(),
            "cost/gbitops_sampled": sampled.gbitops.mean(),
            "cost/gbitops_greedy": greedy.gbitops.mean(),
            "policy/entropy": policy_entropy.mean(),
            "policy/loss": loss,
        }
        # The shares of the processes are equal.
        values = ranks.total(torch.stack([value.detach().double() for value in means.values()])) / ranks.world_size()
        scalars = dict(zip(means, values.tolist(), strict=True))
        sums.add(scalars, ranks.world_size() * len(batch.image_ids))
        on_step(scalars)
