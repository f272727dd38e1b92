"""A search that starts from sensitivities: what the policy begins with, and what it costs."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instaqnas.config.command import Command
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.evaluation.sensitivity import Sensitivity
from instaqnas.experiment.handover import Checkpoint, pretrained_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.policy.budget import Multiplier
from instaqnas.policy.diagnostics import rank_correlation
from instaqnas.policy.network import policy_gbitops
from instaqnas.quant.switchable import calibrate
from instaqnas.training import policy_start, stages
from instaqnas.training.policy_start import begin_by_effort, begin_by_loss

OPTIONS = (
    "--reward.name=budget", "--reward.quality=loss", "--policy.effort=true", "--search.start=sensitivity",
    "--search.policy_batch_size=8",
)  # fmt: skip


@pytest.fixture
def command(finished_run: Path, make_command, tmp_path: Path) -> Command:
    """Of a search that aims a third of the way up from the cheapest configuration."""
    run = tmp_path / "run"
    for stage in ("pretrain_fp32", "pretrain_quant"):
        shutil.copytree(finished_run / stage, run / stage)
    experiment = Experiment(make_command("search", run).config)
    costs = detector_costs(experiment.quantized_detector())
    target = costs.lowest() + policy_gbitops(experiment.policy(), 64) + (costs.highest() - costs.lowest()) / 3
    return make_command("search", run, *OPTIONS, f"--reward.target_gbitops={target}")


@torch.no_grad()
def losses(experiment: Experiment, detector: SwitchableSSD, configuration: list[int]) -> torch.Tensor:
    """Image by image."""
    found = []
    for batch in experiment.policy_images():
        for image in range(len(batch.images)):
            one = slice(image, image + 1)
            output = detector(batch.images[one], torch.tensor([configuration], device=experiment.device))
            targets = detector.targets(batch.boxes_xyxy[one], batch.labels[one])
            own = detector.loss(output, batch.boxes_xyxy[one], batch.labels[one])
            found.append(sum(own.values()) * max(1, int(targets.positives)))
    return torch.stack(found).cpu()


@pytest.mark.slow
def test_an_image_gets_what_is_best_at_the_price_the_more_the_more_loss_it_has_under_the_cheapest(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policy_start, "EPOCHS", 150)
    g = torch.Generator().manual_seed(0)  # so short a training makes no use of bits
    found = 10 - (torch.tensor([0.0, 1.0, 1.5]) * torch.rand(13, 1, generator=g)).double()
    monkeypatch.setattr(policy_start, "sensitivity_of", lambda *_: Sensitivity(found.tolist(), found.tolist()))
    experiment, source = Experiment(command.config), pretrained_checkpoint(command)
    detector, policy = experiment.adaptive_detector().eval(), experiment.policy()
    source.load(experiment, detector, "detector", ("pretrain_quant",))
    images = torch.cat([batch.images for batch in experiment.policy_images()])
    with torch.no_grad():
        calibrate(policy, lambda: policy(images))
    own = policy_gbitops(policy, 64)
    with caplog.at_level(logging.INFO):
        multiplier = begin_by_loss(experiment, source, detector, policy, own)
    with torch.no_grad():
        efforts = policy.efforts(images).cpu()
    correlation = rank_correlation(efforts.double(), losses(experiment, detector, [0] * 13).double())
    assert correlation > 0.8
    assert caplog.messages[-1].endswith(f"rank correlation of effort and loss {correlation:.2f}")
    assert -1.3 < efforts.min() < -0.5
    assert 0.5 < efforts.max() < 1.3

    costs, target = detector_costs(detector), command.config.reward.target_gbitops
    price, table = multiplier.integral / target, costs.table.double() / 1e9

    def mean_gbitops(price: float) -> float:
        total = (1 + efforts.double())[:, None, None] * found + price * table
        return costs.gbitops(total.argmin(-1)).mean().item() + own

    step = (costs.highest() - costs.lowest()) / len(images)  # more than one position of one image
    assert mean_gbitops(price * 1.01) - step <= target <= mean_gbitops(price / 1.01) + step
    policy.cpu()
    start = policy.head.bias.detach()[:-1].view(13, 3) + efforts[:, None, None] * policy.effort
    best = ((1 + efforts.double())[:, None, None] * found + price * table).argmin(-1)
    assert (start.argmax(-1) == best).double().mean() > 0.95  # the rest are ties at the limit


def test_a_search_begins_there(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = []

    def watched(*args: object) -> Multiplier:
        begun.append(begin_by_loss(*args))
        return begun[-1]

    monkeypatch.setattr(policy_start, "begin_by_loss", watched)
    multipliers = []
    train = stages.PolicyTraining.train_epoch

    def epoch(self: stages.PolicyTraining, *args: object) -> dict[str, float]:
        multipliers.append(self.training.state.multiplier)
        return train(self, *args)

    monkeypatch.setattr(stages.PolicyTraining, "train_epoch", epoch)
    stages.run_search(command)
    assert multipliers[0] == begun[0]
    assert len(begun) == 1
    stages.run_search(command)  # finished: nothing begins again
    assert len(begun) == 1


def test_a_target_without_room_begins_at_the_cheapest_configuration(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (10 - torch.arange(3) * torch.ones(13, 1)).tolist()  # more bits would bring more everywhere
    monkeypatch.setattr(policy_start, "sensitivity_of", lambda *_: Sensitivity(found, found))
    source = pretrained_checkpoint(command)
    detector = Experiment(command.config).adaptive_detector()
    own = policy_gbitops(Experiment(command.config).policy(), 64)
    lowest = detector_costs(detector).lowest() + own
    reward = replace(command.config.reward, target_gbitops=lowest * (1 + 1e-9))
    experiment = Experiment(replace(command.config, reward=reward))
    policy = experiment.policy()
    source.load(experiment, detector, "detector", ("pretrain_quant",))
    with torch.no_grad():
        calibrate(policy, lambda: policy(experiment.calibration_batch().images))
    assert begin_by_loss(experiment, source, detector.eval(), policy, own).integral > 0
    images = torch.cat([batch.images for batch in experiment.policy_images()])
    with torch.no_grad():
        assert not policy(images).argmax(-1).any()


def test_flips_are_one_in_two_each_way_and_change_nothing_else() -> None:
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    numbers = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    flipped = policy_start._flipped(images, numbers, vertical=True)
    assert torch.equal(flipped, torch.stack([images[0].flip(-1), images[1].flip(-2)]))
    flipped = policy_start._flipped(images, numbers, vertical=False)
    assert torch.equal(flipped, torch.stack([images[0].flip(-1), images[1]]))


@pytest.mark.slow
def test_the_fit_sees_other_flips_in_every_epoch_and_the_same_ones_again(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    flipped = policy_start._flipped

    def watched(images: torch.Tensor, numbers: torch.Tensor, *, vertical: bool) -> torch.Tensor:
        seen.append((numbers < 0.5).tolist())
        assert vertical  # as the config says
        return flipped(images, numbers, vertical=vertical)

    monkeypatch.setattr(policy_start, "_flipped", watched)
    experiment, source = Experiment(command.config), pretrained_checkpoint(command)
    detector = experiment.adaptive_detector().eval()
    source.load(experiment, detector, "detector", ("pretrain_quant",))
    for _ in range(2):
        policy = experiment.policy()
        with torch.no_grad():
            calibrate(policy, lambda network=policy: network(experiment.calibration_batch().images))
        begin_by_loss(experiment, source, detector, policy, policy_gbitops(policy, 64))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == policy_start.EPOCHS  # of one batch each
    assert first == second
    assert len({str(sorted(flips)) for flips in first}) > 1


def test_a_process_that_computes_alone_has_all_images(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(command.config)
    every = [key.index for batch in experiment.policy_images() for key in batch.keys]
    monkeypatch.setattr("instaqnas.distributed.rank", lambda: 1)  # of several, under `distributed.alone`
    assert [key.index for batch in experiment.policy_images() for key in batch.keys] == every == list(range(8))


# --- The first policy of a pretraining --------------------------------------------------------------------------------


def test_the_cost_of_an_image_grows_in_proportion_to_1_plus_effort(
    finished_run: Path, make_command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = (
        "--bits.positions=network", "--bits.choices=[[2, 2], [2, 3], [3, 3], [3, 4], [4, 4], [5, 5], [6, 6], [7, 7]]",
        "--reward.name=budget", "--reward.target_gbitops=0.03", "--policy.effort=true",
        "--pretrain_quant.configurations=policy", "--search.policy_batch_size=8",
    )  # fmt: skip
    experiment = Experiment(make_command("pretrain", tmp_path, *options).config)
    source = Checkpoint.read(finished_run / "pretrain_fp32" / "last.pt")
    detector, policy = experiment.quantized_detector(), experiment.policy()
    images = torch.cat([batch.images for batch in experiment.policy_images()])
    with torch.no_grad():
        calibrate(policy, lambda: policy(images))
    own, costs = policy_gbitops(policy, 64), detector_costs(detector)
    with caplog.at_level(logging.INFO):
        begin_by_effort(experiment, source, detector, policy, own)
    assert "a first policy at 0.03 GBitOps" in caplog.text
    with torch.no_grad():
        chosen, efforts = policy(images).argmax(-1), policy.efforts(images).double()
    table = costs.gbitops_table()[0]
    ratio = table[chosen[:, 0]] / (1 + efforts).clamp(min=1e-3)
    inside = (chosen[:, 0] > 0) & (chosen[:, 0] < 7)  # the cheapest and the most expensive are as far as it goes
    assert inside.sum() >= 2
    # Neighbouring levels are up to 1.5 apart, so the proportion holds up to the rounding to a level.
    assert ratio[inside].max() / ratio[inside].min() < 1.6
    step = (costs.highest() - costs.lowest()) / len(images)
    assert abs(costs.gbitops(chosen).mean().item() + own - 0.03) < step
