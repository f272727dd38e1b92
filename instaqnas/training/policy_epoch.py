"""One epoch of the policy by REINFORCE; the detector is frozen and only judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from instaqnas import ranks
from instaqnas.data.loader import Batch
from instaqnas.policy.bit_config import Draw, entropy, log_prob, mix_uniform, sample
from instaqnas.policy.reinforce import leave_one_out, normalized, policy_gradient_loss
from instaqnas.training.detector_epoch import check_finite
from instaqnas.training.epoch_sums import EpochSums

Baseline = Literal["greedy", "rloo"]


@dataclass(frozen=True)
class Outcome:
    """What bit configurations brought: quality, GBitOps (policy included) and reward, each [B]."""

    quality: Tensor
    gbitops: Tensor
    reward: Tensor


@dataclass(frozen=True)
class Judge:
    """What bit configurations [B, L] of the images of a batch are worth.

    quality: runs the frozen detector on a batch under configurations; [B].
    gbitops: cost of configurations, policy included, from a table: nothing is run; [B].
    reward: of quality and GBitOps; [B].
    """

    quality: Callable[[Batch, Tensor], Tensor]
    gbitops: Callable[[Tensor], Tensor]
    reward: Callable[[Tensor, Tensor], Tensor]

    def outcome(self, batch: Batch, choices: Tensor) -> Outcome:
        """All of it, by one run of the detector."""
        quality = self.quality(batch, choices)
        gbitops = self.gbitops(choices).to(quality)
        return Outcome(quality, gbitops, self.reward(quality, gbitops))


def train_policy_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    judge: Judge,
    optimizer: Optimizer,
    *,
    sums: EpochSums,
    epsilon: float,
    entropy_beta: float,
    baseline: Baseline,
    normalize_advantage: bool,
    look: Callable[[Tensor], Tensor],
    device: torch.device,
    draws: Sequence[Draw],
    on_step: Callable[[dict[str, float]], None],
) -> None:
    """Trains on every batch once.

    The n sampled configurations of an image are judged one after the other, so that a batch takes the memory of one.
    The greedy one is judged too under the baseline `greedy`; under `rloo` only its GBitOps are looked up, for whoever
    watches the cost (`PolicyTraining.greedy_outcome` judges it now and then).

    Args:
        network: a `PolicyNet`, as `distributed.parallel` returns it.
        batches: images as the detector will see them in use, on the CPU: this process's shares of the batches.
        judge: what configurations are worth.
        sums: rewards, qualities and costs of sampled and greedy configurations and the entropy are added here, step by
            step; its steps are the number of the first one.
        epsilon: share of uniform exploration in what is sampled.
        entropy_beta: weight of the entropy bonus.
        baseline: what a sample's reward is compared with: the reward of the `greedy` configuration of the same image,
            or the mean of its other samples (`rloo`, n >= 2).
        normalize_advantage: scale the advantages of a batch to a root mean square of 1.
        look: what the policy sees of images [B, 3, S, S].
        draws: the random numbers that the n samples of an image come from, others for each.
        on_step: called after every step with its scalars.
    """
    network.train()
    for batch in batches:
        batch = batch.to(device)
        logits = network(look(batch.images))
        behaviour = mix_uniform(logits, epsilon)
        samples = [sample(behaviour, draw(batch.keys)) for draw in draws]
        outcomes = [judge.outcome(batch, choices) for choices in samples]
        rewards = torch.stack([outcome.reward for outcome in outcomes]).to(logits)  # [n, B]
        greedy_choices = logits.argmax(-1)
        if baseline == "greedy":
            greedy = judge.outcome(batch, greedy_choices)
            advantage = rewards - greedy.reward.to(logits)
            of_greedy = {"reward/greedy": greedy.reward, "quality/greedy": greedy.quality}
        else:
            advantage, of_greedy = leave_one_out(rewards), {}
        if normalize_advantage:
            advantage = normalized(advantage)
        log_probs = torch.stack([log_prob(behaviour, choices) for choices in samples])
        policy_entropy = entropy(logits.softmax(-1))
        loss = policy_gradient_loss(log_probs, advantage, policy_entropy.sum(-1), entropy_beta)
        check_finite(loss, sums.steps, batch.image_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        means = {
            "reward/sampled": rewards,
            "quality/sampled": torch.stack([outcome.quality for outcome in outcomes]),
            "cost/gbitops_sampled": torch.stack([outcome.gbitops for outcome in outcomes]),
            "cost/gbitops_greedy": judge.gbitops(greedy_choices).to(rewards.device),
            **of_greedy,
            "policy/entropy": policy_entropy,
            "policy/loss": loss,
        }
        # The shares of the processes are equal.
        own = torch.stack([value.detach().double().mean() for value in means.values()])
        scalars = dict(zip(means, (ranks.total(own) / ranks.world_size()).tolist(), strict=True))
        sums.add(scalars, ranks.world_size() * len(batch.image_ids))
        on_step(scalars)
