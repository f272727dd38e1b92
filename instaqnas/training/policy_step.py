"""One training step of the policy by REINFORCE; the detector is frozen and serves as the judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from instaqnas import distributed
from instaqnas.bits import Baseline
from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import Draw, entropy, log_prob, mix_uniform, sample
from instaqnas.policy.reinforce import leave_one_out, normalized, policy_gradient_loss
from instaqnas.quant.affine import Affine

Quality = Callable[[Batch, Tensor, Affine | None], Tensor]  # of choices [B, L] on a batch, and its frozen stem or None


@dataclass(frozen=True)
class Outcome:
    """Quality, GBitOps (policy included) and reward of bit configurations, each [B]."""

    quality: Tensor
    gbitops: Tensor
    reward: Tensor


@dataclass(frozen=True)
class Judge:
    """Judges bit configurations [B, L] of the images of a batch.

    Args:
        quality: runs the frozen detector; takes batch, choices and the output of a frozen stem or None; returns [B].
        gbitops: cost of configurations with the policy, looked up in a table; returns [B].
        reward: of quality and GBitOps; returns [B].
    """

    quality: Quality
    gbitops: Callable[[Tensor], Tensor]
    reward: Callable[[Tensor, Tensor], Tensor]

    def outcome(self, batch: Batch, choices: Tensor, stem: Affine | None) -> Outcome:
        """Outcome of configurations, by one run of the detector."""
        quality = self.quality(batch, choices, stem)
        gbitops = self.gbitops(choices).to(quality)
        return Outcome(quality, gbitops, self.reward(quality, gbitops))


def policy_step(
    network: nn.Module,
    batch: Batch,
    detector: SwitchableSSD,
    judge: Judge,
    optimizer: Optimizer,
    *,
    epsilon: float,
    entropy_beta: float,
    baseline: Baseline,
    normalize_advantage: bool,
    draws: Sequence[Draw],
    step: int,
) -> dict[str, float]:
    """Trains on one batch; returns means over its images by their TensorBoard names, of all processes.

    The n sampled configurations of an image are judged one after the other, so that memory holds one at a time. The
    greedy configuration is judged too under the baseline `greedy`; under `rloo` only its GBitOps are looked up.

    Args:
        network: a `PolicyNet` in training mode, as `distributed.parallel` returns it.
        batch: this process's share, on the device, without augmentation.
        detector: computes the input of the policy.
        judge: of configurations.
        optimizer: of the policy.
        epsilon: share of uniform exploration in the samples.
        entropy_beta: weight of the entropy bonus.
        baseline: `greedy` compares a sample with the reward of the greedy configuration of the same image, `rloo` with
            the mean reward of its other samples (n >= 2).
        normalize_advantage: scale the advantages of the batch to a root mean square of 1.
        draws: the random numbers of each of the n samples.
        step: number in the stage, for messages.

    Raises: TrainingError at a loss or gradient that is not finite, before it reaches the weights.
    """
    observation = detector.observe(batch.images)
    logits = network(observation.input)
    behaviour = mix_uniform(logits, epsilon)
    samples = [sample(behaviour, draw(batch.keys)) for draw in draws]
    outcomes = [judge.outcome(batch, choices, observation.stem) for choices in samples]
    rewards = torch.stack([outcome.reward for outcome in outcomes]).to(logits)  # [n, B]
    greedy_choices = logits.argmax(-1)
    of_greedy: dict[str, Tensor] = {}
    if baseline == "greedy":
        greedy = judge.outcome(batch, greedy_choices, observation.stem)
        advantage = rewards - greedy.reward.to(logits)
        of_greedy = {"reward/greedy": greedy.reward, "quality/greedy": greedy.quality}
    else:
        advantage = leave_one_out(rewards)
    if normalize_advantage:
        advantage = normalized(advantage)
    log_probs = torch.stack([log_prob(behaviour, choices) for choices in samples])
    policy_entropy = entropy(logits.softmax(-1))
    loss = policy_gradient_loss(log_probs, advantage, policy_entropy.sum(-1), entropy_beta)

    measured = {
        "reward/sampled": rewards,
        "quality/sampled": torch.stack([outcome.quality for outcome in outcomes]),
        "cost/gbitops_sampled": torch.stack([outcome.gbitops for outcome in outcomes]),
        "cost/gbitops_greedy": judge.gbitops(greedy_choices).to(rewards.device),
        **of_greedy,
        "policy/entropy": policy_entropy,
        "policy/loss": loss,
    }
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])

    own = torch.stack([value.detach().double().mean() for value in measured.values()])
    # The processes have equal shares of the batch, and gradients of all processes already.
    means = distributed.total(own) / distributed.world_size()
    *values, of_norm = torch.cat([means, norm.to(means)[None]]).tolist()
    scalars = dict(zip(measured, values, strict=True))
    for name, value in (("loss", scalars["policy/loss"]), ("norm of the gradients", of_norm)):
        if not math.isfinite(value):
            raise TrainingError(
                f"policy step {step}: the {name} is {value}; a lower search.policy_lr may help; images of the batch: "
                f"{', '.join(batch.image_ids)}"
            )
    optimizer.step()
    return scalars
