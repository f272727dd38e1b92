"""An epoch of the policy under a judge without a detector: what is sampled and judged, and that a budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from instaqnas.bits import Baseline
from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import Observation
from instaqnas.errors import TrainingError
from instaqnas.policy.bit_config import Draw
from instaqnas.policy.budget import Multiplier, budget_offset, greedy_gbitops
from instaqnas.policy.network import PolicyNet
from instaqnas.policy.reward import budget
from instaqnas.quant.affine import Affine
from instaqnas.quant.switchable import calibrate
from instaqnas.seeds import SampleKey, generator, uniform_numbers
from instaqnas.training.policy_step import Judge, Sampling, policy_step
from instaqnas.training.state import EpochSums

POSITIONS, CHOICES = 6, 3


class Table(nn.Module):
    """A policy whose logits do not depend on the image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, observed: Tensor) -> Tensor:
        return self.logits.expand(len(observed), -1, -1)


def batch_of(images: Tensor, indices: Sequence[int], epoch: int = 0) -> Batch:
    """Images without objects, of which only pixels and keys are used."""
    nothing = torch.zeros(len(indices), 0)
    keys = [SampleKey(epoch, index) for index in indices]
    ids = list(map(str, indices))
    return Batch(images[list(indices)], nothing[..., None].expand(-1, -1, 4), nothing.long(), nothing.bool(), ids, keys)


class Observer:
    """Stands in for a detector: a policy takes `observe(images)`."""

    def __init__(self, observe: Callable[[Tensor], Tensor]) -> None:
        self.function = observe

    def observe(self, images: Tensor) -> Observation:
        return Observation(self.function(images), None)


def draws(samples: int) -> list[Draw]:
    return [lambda keys, n=n: uniform_numbers(keys, POSITIONS, 0, "samples", n) for n in range(samples)]


def train(
    network: nn.Module,
    batches: Sequence[Batch],
    judge: Judge,
    optimizer: torch.optim.Optimizer,
    *,
    baseline: Baseline = "greedy",
    samples: int = 1,
    epsilon: float = 0.0,
    entropy_beta: float = 0.0,
    normalize_advantage: bool = True,
    observe: Callable[[Tensor], Tensor] = lambda images: images,
    on_step: Callable[[dict[str, float]], None] = lambda scalars: None,
) -> EpochSums:
    sums = EpochSums()
    network.train()
    for number, batch in enumerate(batches):
        scalars = policy_step(
            network,
            batch,
            Observer(observe),
            judge,
            optimizer,
            sampling=Sampling(draws(samples), epsilon, baseline) if samples else None,
            entropy_beta=entropy_beta,
            normalize_advantage=normalize_advantage,
            step=number,
        )
        sums.add(scalars, len(batch.image_ids))
        on_step(scalars)
    return sums


# --- What is sampled, and judged --------------------------------------------------------------------------------------


class Watch:
    """A judge that likes high choices, at a cost of their sum, and remembers what it was asked."""

    def __init__(self) -> None:
        self.judged: list[Tensor] = []

    def judge(self) -> Judge:
        def quality(_: Batch, choices: Tensor, _stem: object) -> Tensor:
            self.judged.append(choices)
            return choices.float().mean(1)

        return Judge(quality, lambda choices: choices.sum(1).double(), lambda quality, gbitops: quality - gbitops / 10)


IMAGES = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
UNIFORM = torch.zeros(POSITIONS, CHOICES)


def judged(batches: Sequence[Batch], baseline: Baseline, samples: int, logits: Tensor = UNIFORM) -> list[Tensor]:
    """All that is judged in an epoch at learning rate 0."""
    watch, network = Watch(), Table(logits.clone())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    train(network, batches, watch.judge(), optimizer, baseline=baseline, samples=samples)
    return watch.judged


def test_a_frozen_stem_is_computed_once_and_handed_to_every_judgement() -> None:
    stem, judged_with = Affine(torch.zeros(1)), []

    class Frozen(Observer):
        def observe(self, images: Tensor) -> Observation:
            return Observation(images, stem)

    def quality(_: Batch, choices: Tensor, given: Affine | None) -> Tensor:
        judged_with.append(given)
        return choices.float().mean(1)

    network = Table(UNIFORM.clone())
    policy_step(
        network, batch_of(IMAGES, range(4)), Frozen(lambda images: images),
        Judge(quality, lambda choices: choices.sum(1).double(), lambda quality, _: quality),
        torch.optim.SGD(network.parameters(), lr=0.0), sampling=Sampling(draws(2), 0.0, "greedy"), entropy_beta=0.0,
        normalize_advantage=True, step=0,
    )  # fmt: skip
    assert judged_with == [stem] * 3


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_are_judged_in_turn_and_the_greedy_configuration_once(samples: int) -> None:
    logits = UNIFORM.clone()
    logits[:, 1] = 0.1
    found = judged([batch_of(IMAGES, range(4))], "greedy", samples, logits)
    assert [len(choices) for choices in found] == [4] * (samples + 1)
    assert found[-1].tolist() == [[1] * POSITIONS] * 4
    assert all(len(choices.unique()) == CHOICES for choices in found[:-1])


def test_leave_one_out_judges_samples_alone() -> None:
    assert len(judged([batch_of(IMAGES, range(4))], "rloo", 3)) == 3


def test_every_sample_of_an_image_is_its_own_whatever_batch_it_is_in() -> None:
    whole = judged([batch_of(IMAGES, range(4))], "rloo", 3)
    assert len({tuple(row) for choices in whole for row in choices.tolist()}) == 12
    parts = judged([batch_of(IMAGES, [2, 0]), batch_of(IMAGES, [3, 1])], "rloo", 3)
    for sample in range(3):
        assert torch.equal(parts[sample], whole[sample][[2, 0]])
        assert torch.equal(parts[3 + sample], whole[sample][[3, 1]])
    later = judged([batch_of(IMAGES, range(4), epoch=1)], "rloo", 3)
    assert not any(torch.equal(a, b) for a, b in zip(whole, later, strict=True))


@pytest.mark.parametrize("baseline", ["greedy", "rloo"])
def test_logged_means_are_those_of_what_was_judged(baseline: Baseline) -> None:
    watch, logits = Watch(), UNIFORM.clone()
    logits[:, 2] = 0.1
    network = Table(logits)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    sums = train(network, [batch_of(IMAGES, range(4))], watch.judge(), optimizer, baseline=baseline, samples=2)
    sampled = torch.stack(watch.judged[:2]).double()
    means = sums.means()
    assert (sums.steps, sums.images) == (1, 4)
    assert means["quality/sampled"] == pytest.approx(sampled.mean().item())
    assert means["cost/gbitops_sampled"] == pytest.approx(sampled.sum(-1).mean().item())
    assert means["reward/sampled"] == pytest.approx((sampled.mean(-1) - sampled.sum(-1) / 10).mean().item())
    assert means["cost/gbitops_greedy"] == 2 * POSITIONS
    assert ("reward/greedy" in means) == ("quality/greedy" in means) == (baseline == "greedy")
    if baseline == "greedy":
        assert means["reward/greedy"] == pytest.approx(2 - 0.2 * POSITIONS)


@pytest.mark.parametrize("baseline", ["greedy", "rloo"])
def test_the_gradient_is_that_of_a_naive_sum(baseline: Baseline) -> None:
    logits = torch.randn(POSITIONS, CHOICES, generator=torch.Generator().manual_seed(1))
    watch, network = Watch(), Table(logits.clone())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    settings = {"baseline": baseline, "samples": 3, "normalize_advantage": False}
    train(network, [batch_of(IMAGES, range(4))], watch.judge(), optimizer, **settings)
    rewards = [[c.mean() - c.sum() / 10 for c in choices.double()] for choices in watch.judged]
    p, expected = logits.softmax(-1), torch.zeros(POSITIONS, CHOICES)
    for sample in range(3):
        for image in range(4):
            others = [rewards[s][image] for s in range(3) if s != sample]
            beyond = rewards[3][image] if baseline == "greedy" else sum(others) / 2
            for position, choice in enumerate(watch.judged[sample][image].tolist()):
                step = nn.functional.one_hot(torch.tensor(choice), CHOICES) - p[position]
                expected[position] += (rewards[sample][image] - beyond) * step / 12
    torch.testing.assert_close(network.logits.detach() - logits, expected)


def test_without_sampling_every_choice_is_judged_once_and_the_gradient_is_that_of_the_expected_reward() -> None:
    logits = torch.randn(1, CHOICES, generator=torch.Generator().manual_seed(2))
    watch, network = Watch(), Table(logits.clone())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    batches = [batch_of(IMAGES, range(4))]
    sums = train(network, batches, watch.judge(), optimizer, samples=0, normalize_advantage=False, entropy_beta=0.1)
    assert [choices.tolist() for choices in watch.judged] == [[[k]] * 4 for k in range(CHOICES)]
    reward = torch.arange(CHOICES) * 0.9  # of choice k: k - k / 10

    def objective(values: Tensor) -> Tensor:
        p = values.softmax(-1)
        return (p * reward).sum() - 0.1 * (p * p.log()).sum()

    expected = torch.autograd.functional.jacobian(objective, logits)
    torch.testing.assert_close(network.logits.detach() - logits, expected)
    p = logits.softmax(-1)[0]
    assert sums.means()["reward/sampled"] == pytest.approx((p * reward).sum().item(), rel=1e-6)
    assert sums.means()["cost/gbitops_sampled"] == pytest.approx((p * torch.arange(CHOICES)).sum().item(), rel=1e-6)


def test_the_policy_sees_what_it_is_shown() -> None:
    seen = []

    class Seeing(Table):
        def forward(self, seen_by: Tensor) -> Tensor:
            seen.append(seen_by)
            return super().forward(seen_by)

    network = Seeing(UNIFORM.clone())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    batches = [batch_of(IMAGES, range(4))]
    train(network, batches, Watch().judge(), optimizer, observe=lambda images: images[:, :1].float() + 5)
    assert seen[0].tolist() == torch.full((4, 1, 2, 2), 5.0).tolist()


# --- A budget ---------------------------------------------------------------------------------------------------------

COUNT, BATCH, EPOCHS = 192, 32, 20
FIXED = 1.0  # GBitOps


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 16, 16] of blocks, and how hard they are: 0 to 1, seen in how much the blocks differ."""
    g = torch.Generator().manual_seed(seed)
    hard = torch.rand(count, generator=g)
    blocks = torch.randn(count, 3, 4, 4, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (127 + 60 * hard[:, None, None, None] * blocks).clamp(0, 255).byte(), hard


def costs_and_losses() -> tuple[Tensor, Tensor]:
    """GBitOps of each choice at each position, from 0.3 to 1.2 in all, and what it costs a hard image in quality."""
    g = torch.Generator().manual_seed(0)
    macs, weight = (0.3 + torch.rand(2, POSITIONS, generator=g)).unbind()
    costs = (macs / macs.sum())[:, None] * torch.tensor([0.3, 0.675, 1.2])
    return costs.double(), (weight / weight.sum())[:, None] * torch.tensor([1.0, 0.25, 0.05])


@pytest.mark.parametrize(
    ("target", "baseline", "samples"),
    [
        pytest.param(1.5, "greedy", 1, marks=pytest.mark.slow),
        pytest.param(1.75, "rloo", 2, marks=pytest.mark.slow),
        pytest.param(2.0, "rloo", 2, marks=pytest.mark.slow),
    ],
)
def test_a_search_without_a_detector_ends_within_two_percent_of_its_budget(
    target: float, baseline: Baseline, samples: int
) -> None:
    """Dual ascent in the mean of five searches, because of the last swing of each; the last shift in every one."""
    ratios = [ratio_of_search(seed, target, baseline, samples) for seed in range(5)]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.02)


def ratio_of_search(seed: int, target: float, baseline: Baseline, samples: int) -> float:
    """Searches, checks the cost after the last shift; returns mean cost / target of the last quarter of the steps."""
    images, hard = patterns(COUNT, seed=0)
    costs, lost = costs_and_losses()
    torch.manual_seed(seed)
    policy = PolicyNet(POSITIONS, CHOICES, pool=2, width=4, bits=(8, 8))
    calibrate(policy, lambda: policy(images[:64]))
    optimizer = torch.optim.Adam(policy.parameters(), lr=4e-3)
    noise, steps, multiplier = torch.Generator().manual_seed(0), [], Multiplier()

    def quality(batch: Batch, choices: Tensor, _stem: object) -> Tensor:
        of_batch = hard[[key.index for key in batch.keys]]
        exact = 1 - 0.6 * of_batch * lost[torch.arange(POSITIONS), choices].sum(1)
        return (exact + 0.05 * torch.randn(len(exact), generator=noise)).clamp(0, 1)

    def gbitops(choices: Tensor) -> Tensor:
        return FIXED + costs[torch.arange(POSITIONS), choices].sum(1)

    def reward(quality: Tensor, gbitops: Tensor) -> Tensor:
        return budget(quality, gbitops, target=target, multiplier=multiplier.value(gain=20.0))

    def on_step(scalars: dict[str, float]) -> None:
        nonlocal multiplier
        steps.append(scalars["cost/gbitops_greedy"] / target)
        multiplier = multiplier.updated(scalars["cost/gbitops_greedy"], target, lr=0.3)

    for epoch in range(EPOCHS):
        order = torch.randperm(COUNT, generator=generator("order", epoch)).tolist()
        batches = [batch_of(images, order[start : start + BATCH], epoch) for start in range(0, COUNT, BATCH)]
        settings = {"epsilon": 0.5 * (1 - epoch / EPOCHS), "entropy_beta": 0.01 * (1 - epoch / EPOCHS)}
        judge = Judge(quality, gbitops, reward)
        train(policy, batches, judge, optimizer, baseline=baseline, samples=samples, on_step=on_step, **settings)

    policy.eval()
    with torch.no_grad():
        before = policy(images)
        policy.add_to_logits(budget_offset(before, costs, FIXED, target))
        after, fresh = policy(images), policy(patterns(512, seed=1)[0])
    assert greedy_gbitops(after, costs, FIXED) == pytest.approx(target, rel=0.002)
    assert greedy_gbitops(fresh, costs, FIXED) == pytest.approx(target, rel=0.02)
    last = steps[-len(steps) // 4 :]
    return sum(last) / len(last)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights() -> None:
    class Root(Table):
        """Finite logits with an infinite gradient."""

        def forward(self, seen: Tensor) -> Tensor:
            return super().forward(seen) + (self.logits - self.logits.detach()).sqrt()

    network = Root(UNIFORM.clone())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    message = r"^policy step 0: the norm of the gradients is (nan|inf); a lower search\.policy_lr .*batch: 0, 1, 2, 3$"
    with pytest.raises(TrainingError, match=message):
        train(network, [batch_of(IMAGES, range(4))], Watch().judge(), optimizer)
    assert network.logits.isfinite().all()
