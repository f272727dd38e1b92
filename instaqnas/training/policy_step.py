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
from instaqnas.policy.reinforce import (
    above_expectation,
    expected_reward_loss,
    leave_one_out,
    normalized,
    policy_gradient_loss,
)
from instaqnas.quant.affine import Affine
from instaqnas.seeds import SampleKey

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


@dataclass(frozen=True)
class Sampling:
    """How the configurations of an image are sampled and compared.

    Args:
        draws: the random numbers of each of the n samples.
        epsilon: share of uniform exploration in the samples.
        baseline: `greedy` compares a sample with the reward of the greedy configuration of the same image, `rloo` with
            the mean reward of its other samples (n >= 2).
    """

    draws: Sequence[Draw]
    epsilon: float
    baseline: Baseline


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, a scalar, and measurements by their TensorBoard names, whose means are logged."""

    loss: Tensor
    measured: dict[str, Tensor]


def policy_step(
    network: nn.Module,
    batch: Batch,
    detector: SwitchableSSD,
    judge: Judge,
    optimizer: Optimizer,
    *,
    sampling: Sampling | None,
    entropy_beta: float,
    normalize_advantage: bool,
    step: int,
) -> dict[str, float]:
    """Trains on one batch; returns means over its images by their TensorBoard names, of all processes.

    Configurations of an image are judged one after the other, so that memory holds one at a time.

    Args:
        network: a `PolicyNet` in training mode, as `distributed.parallel` returns it.
        batch: this process's share, on the device, without augmentation.
        detector: computes the input of the policy.
        judge: of configurations.
        optimizer: of the policy.
        sampling: REINFORCE on sampled configurations; None for the exact expectation over the K choices of a policy
            with one position.
        entropy_beta: weight of the entropy bonus.
        normalize_advantage: scale the advantages of the batch to a root mean square of 1.
        step: number in the stage, for messages.

    Raises: TrainingError at a loss or gradient that is not finite, before it reaches the weights.
    """
    observation = detector.observe(batch.images)
    logits = network(observation.input)

    def outcome(choices: Tensor) -> Outcome:
        return judge.outcome(batch, choices, observation.stem)

    scale = normalized if normalize_advantage else _unchanged
    if sampling is None:
        objective = _expected(logits, outcome, scale, entropy_beta)
    else:
        objective = _sampled(logits, outcome, scale, entropy_beta, sampling, batch.keys)
    measured = {
        **objective.measured,
        "cost/gbitops_greedy": judge.gbitops(logits.argmax(-1)),
        "policy/entropy": entropy(logits.softmax(-1)),
        "policy/loss": objective.loss,
    }
    optimizer.zero_grad(set_to_none=True)
    objective.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])

    own = torch.stack([value.detach().double().mean().to(logits.device) for value in measured.values()])
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


def _sampled(
    logits: Tensor,
    outcome: Callable[[Tensor], Outcome],
    scale: Callable[[Tensor], Tensor],
    entropy_beta: float,
    sampling: Sampling,
    keys: Sequence[SampleKey],
) -> Objective:
    """REINFORCE on n sampled configurations of each image.

    The greedy configuration is judged too under the baseline `greedy`; under `rloo` only its GBitOps are looked up.
    """
    behaviour = mix_uniform(logits, sampling.epsilon)
    samples = [sample(behaviour, draw(keys)) for draw in sampling.draws]
    outcomes = [outcome(choices) for choices in samples]
    rewards = torch.stack([found.reward for found in outcomes]).to(logits)  # [n, B]
    measured = {
        "reward/sampled": rewards,
        "quality/sampled": torch.stack([found.quality for found in outcomes]),
        "cost/gbitops_sampled": torch.stack([found.gbitops for found in outcomes]),
    }
    if sampling.baseline == "greedy":
        greedy = outcome(logits.argmax(-1))
        advantage = rewards - greedy.reward.to(logits)
        measured |= {"reward/greedy": greedy.reward, "quality/greedy": greedy.quality}
    else:
        advantage = leave_one_out(rewards)
    log_probs = torch.stack([log_prob(behaviour, choices) for choices in samples])
    policy_entropy = entropy(logits.softmax(-1)).sum(-1)
    return Objective(policy_gradient_loss(log_probs, scale(advantage), policy_entropy, entropy_beta), measured)


def _expected(
    logits: Tensor,
    outcome: Callable[[Tensor], Outcome],
    scale: Callable[[Tensor], Tensor],
    entropy_beta: float,
) -> Objective:
    """The exact gradient of the expected reward over the K choices of a policy with one position, logits [B, 1, K]."""
    probabilities = logits[:, 0].softmax(-1)  # [B, K]
    choices = [torch.full_like(logits[..., 0], k, dtype=torch.int64) for k in range(logits.shape[-1])]
    outcomes = [outcome(choice) for choice in choices]
    rewards = torch.stack([found.reward for found in outcomes]).to(logits)  # [K, B]

    def expectation(values: list[Tensor]) -> Tensor:
        return (probabilities.detach().T * torch.stack(values).to(logits)).sum(0)

    measured = {
        "reward/sampled": expectation([found.reward for found in outcomes]),
        "quality/sampled": expectation([found.quality for found in outcomes]),
        "cost/gbitops_sampled": expectation([found.gbitops for found in outcomes]),
    }
    advantage = scale(above_expectation(probabilities, rewards))
    return Objective(expected_reward_loss(probabilities, advantage, entropy(probabilities), entropy_beta), measured)


def _unchanged(advantage: Tensor) -> Tensor:
    return advantage
