"""REINFORCE: gradients in closed form, and bandits that only a correct gradient solves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from instaqnas.policy.bit_config import entropy, log_prob, mix_uniform, sample
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.reinforce import leave_one_out, normalized, policy_gradient_loss
from instaqnas.policy.reward import budget


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_loss_by_hand() -> None:
    loss = policy_gradient_loss(vector(-1.0, -2.0), vector(3.0, -0.5), vector(0.7, 0.9), 0.1)
    # image 1: 1 * 3 - 0.07, image 2: 2 * -0.5 - 0.09
    assert loss.item() == pytest.approx((2.93 - 1.09) / 2)


def test_no_gradient_flows_through_the_advantage() -> None:
    advantage = vector(1.0, 2.0).requires_grad_()
    logits = vector(-1.0, -2.0).requires_grad_()
    policy_gradient_loss(logits, advantage, vector(0.0, 0.0), 0.0).backward()
    assert advantage.grad is None
    torch.testing.assert_close(logits.grad, vector(-0.5, -1.0))


def test_normalized_advantages_keep_sign_and_ratio_and_have_a_root_mean_square_of_one() -> None:
    assert normalized(vector(3.0, -4.0, 0.0, 0.0)).tolist() == pytest.approx([1.2, -1.6, 0, 0])  # rms is 2.5
    assert normalized(vector(0.0, 0.0)).tolist() == [0, 0]
    assert normalized(vector(1e-3)).tolist() == pytest.approx([1])


# --- Several samples per image----------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0], [2.0, 5.0], [6.0, 1.0]])  # 3 samples of 2 images
    expected = torch.tensor([[1 - 4, 0 - 3], [2 - 3.5, 5 - 0.5], [6 - 1.5, 1 - 2.5]])
    torch.testing.assert_close(leave_one_out(rewards), expected)


def test_leaving_one_of_two_out_compares_them_with_each_other() -> None:
    assert leave_one_out(torch.tensor([[3.0], [1.0]])).tolist() == [[2.0], [-2.0]]


@pytest.mark.parametrize("samples", [2, 3, 5, 6, 7, 8])
def test_equal_rewards_of_an_image_have_advantages_of_exactly_zero(samples: int) -> None:
    rewards = torch.rand(1000, generator=torch.Generator().manual_seed(0)).sub(0.5).expand(samples, -1)
    if samples in (3, 5, 6, 7):
        assert (rewards - rewards.mean(0)).any(), "the mean of equal rewards is exact, so this tests nothing"
    assert not leave_one_out(rewards).any()
    assert not normalized(leave_one_out(rewards)).any()


@pytest.mark.parametrize("reward", [0.7, -3.1, 1e-3, 900.0])
def test_rewards_that_differ_by_rounding_have_advantages_of_exactly_zero(reward: float) -> None:
    rewards = torch.full((3, 2), reward)
    rewards[1, 0] = torch.nextafter(rewards[1, 0], torch.tensor(torch.inf))
    assert rewards[1, 0] != rewards[0, 0]
    assert not normalized(leave_one_out(rewards)).any()


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 6, 7])
def test_ordinary_rewards_have_the_advantages_of_the_plain_formula_in_every_bit(samples: int) -> None:
    rewards = torch.rand(samples, 1000, generator=torch.Generator().manual_seed(1))
    rewards[0, 500:] = rewards[1:, 500:].mean(0)  # the advantage of one sample may be tiny, if the others are not equal
    plain = (rewards - rewards.mean(0)) * samples / (samples - 1)
    different = slice(0, 500) if samples == 2 else slice(0, 1000)
    assert torch.equal(leave_one_out(rewards)[:, different], plain[:, different])


def test_a_reward_that_is_not_a_number_stays_one() -> None:
    rewards = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [1.0, 2.0]])
    assert leave_one_out(rewards).isnan().tolist() == [[True, False]] * 3


def test_loss_of_several_samples_is_the_mean_over_all_of_them() -> None:
    log_prob, advantage = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    loss = policy_gradient_loss(log_prob, advantage, vector(0.7, 0.9), 0.1)
    assert loss.item() == pytest.approx((1 + 4 - 3 + 2) / 4 - 0.1 * 0.8)


@pytest.mark.parametrize("samples", [2, 4])
def test_the_expected_gradient_under_leave_one_out_is_the_gradient_of_the_expected_reward(samples: int) -> None:
    """Over all draws of several actions, each by its probability."""
    logits = vector(0.2, -0.5, 1.0).requires_grad_()
    reward = vector(1.0, 3.0, -2.0)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p = logits.softmax(0)
    draws = torch.cartesian_prod(*[torch.arange(3)] * samples).T  # [n, 3^n]: an image for each draw
    weight = p.detach()[draws].prod(0)
    advantage = leave_one_out(reward[draws]) * weight * draws.shape[1]  # the mean over images becomes the expectation
    loss = policy_gradient_loss(p[draws].log(), advantage, torch.zeros(draws.shape[1]).double(), 0.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, -exact)


@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_gradient_is_the_analytic_one_of_a_categorical(beta: float) -> None:
    """With softmax p: d(-A log p_a) / dlogit_k = A (p_k - [k = a]), dH / dlogit_k = -p_k (log p_k + H)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 3, generator=g).double().requires_grad_()
    choices = torch.randint(3, (4, 2), generator=g)
    advantage = vector(1.5, -0.3, 0.0, 2.0)
    p = logits.softmax(-1)
    policy_gradient_loss(log_prob(p, choices), advantage, entropy(p).sum(-1), beta).backward()

    for image in range(4):
        for position in range(2):
            weights = [math.exp(v) for v in logits[image, position].tolist()]
            row = [w / sum(weights) for w in weights]
            h = -sum(v * math.log(v) for v in row)
            chosen = choices[image, position].item()
            expected = [
                (advantage[image].item() * (v - (k == chosen)) + beta * v * (math.log(v) + h)) / 4
                for k, v in enumerate(row)
            ]
            assert logits.grad[image, position].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_expected_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """Summed over all actions by their probability, with any baseline."""
    logits = vector(0.2, -0.5, 1.0).requires_grad_()
    reward = vector(1.0, 3.0, -2.0)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p = logits.softmax(0)[None, None].expand(3, 1, 3)
    actions = torch.arange(3)[:, None]
    for baseline in (0.0, 5.0):
        weighted = (reward - baseline) * p[0, 0].detach() * 3  # the mean over three images becomes the expectation
        loss = policy_gradient_loss(log_prob(p, actions), weighted, torch.zeros(3).double(), 0.0)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, -exact)


def test_self_critical_reinforce_finds_the_best_arm_of_every_context() -> None:
    g = torch.Generator().manual_seed(0)
    contexts, positions, arms = 5, 2, 4
    rewards = torch.rand(contexts, positions, arms, generator=g)  # of a configuration: the sum over positions
    table = torch.zeros(contexts, positions, arms, requires_grad=True)
    descent = torch.optim.Adam([table], lr=0.1)

    def reward_of(context: Tensor, choices: Tensor) -> Tensor:
        return rewards[context].gather(-1, choices[..., None]).squeeze(-1).sum(-1)

    for step in range(250):
        context = torch.randint(contexts, (64,), generator=g)
        logits = table[context]
        behaviour = mix_uniform(logits, 0.5 * (1 - step / 250))
        choices = sample(behaviour, torch.rand(behaviour.shape[:2], generator=g, dtype=torch.float64))
        advantage = reward_of(context, choices) - reward_of(context, logits.argmax(-1))
        spread = entropy(logits.softmax(-1)).sum(-1)
        loss = policy_gradient_loss(log_prob(behaviour, choices), advantage, spread, 0.001)
        descent.zero_grad()
        loss.backward()
        descent.step()
    assert torch.equal(table.argmax(-1), rewards.argmax(-1))


def test_a_large_entropy_bonus_makes_the_policy_uniform() -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.5]]], requires_grad=True)
    descent = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        p = logits.softmax(-1)
        loss = policy_gradient_loss(log_prob(p, torch.zeros(1, 1).long()), torch.zeros(1), entropy(p).sum(-1), 1.0)
        descent.zero_grad()
        loss.backward()
        descent.step()
    torch.testing.assert_close(logits.softmax(-1), torch.full((1, 1, 3), 1 / 3), rtol=0, atol=0.01)


def test_reinforce_with_dual_ascent_settles_at_the_target_cost_and_spends_it_where_it_pays() -> None:
    g = torch.Generator().manual_seed(0)
    contexts, target = 20, 1.3
    gain = torch.arange(contexts) / contexts  # quality that cost 2 brings over cost 1
    table = torch.zeros(contexts, 1, 2, requires_grad=True)
    descent = torch.optim.Adam([table], lr=0.05)
    multiplier, costs = Multiplier(), []
    for _ in range(600):
        context = torch.randint(contexts, (64,), generator=g)
        logits = table[context]
        behaviour = mix_uniform(logits, 0.1)
        choices = sample(behaviour, torch.rand(behaviour.shape[:2], generator=g, dtype=torch.float64))

        def reward_of(choice: Tensor, context: Tensor = context, price: float = multiplier.value(1.0)) -> Tensor:
            return budget(gain[context] * choice, 1.0 + choice, target=target, multiplier=price)

        greedy = logits.argmax(-1)
        advantage = reward_of(choices[:, 0]) - reward_of(greedy[:, 0])
        loss = policy_gradient_loss(log_prob(behaviour, choices), advantage, entropy(behaviour).sum(-1), 0.01)
        descent.zero_grad()
        loss.backward()
        descent.step()
        costs.append(1 + greedy.double().mean().item())
        multiplier = multiplier.updated(costs[-1], target, lr=0.02)
    assert sum(costs[-200:]) / 200 == pytest.approx(target, abs=0.1)
    greedy = table.argmax(-1)[:, 0]
    assert greedy[-3:].all()
    assert not greedy[:10].any()
