"""The policy's side of the search: what it is rewarded for, its training, how it is watched, how it meets a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from instaqnas import ranks
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.policy import reward as rewards
from instaqnas.policy.budget import budget_offset, greedy_gbitops
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.training import distributed
from instaqnas.training.evaluate import detections_of, negative_loss, quality_of
from instaqnas.training.experiment import Experiment
from instaqnas.training.fit import TrainState
from instaqnas.training.policy_epoch import Judge, train_policy_epoch
from instaqnas.training.run_dir import RunDir
from instaqnas.training.sensitivity import MOST_IMAGES
from instaqnas.training.survey import Survey, diagnose, survey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyTraining:
    """A policy being trained in the search, and the detector that judges it, which it may look through.

    detector: as it would be used: the average where there is one.
    network: the policy as `distributed.parallel` returns it.
    costs, own_gbitops: GBitOps of the detector's configurations, and of one decision.
    """

    experiment: Experiment
    run_dir: RunDir
    state: TrainState
    detector: SwitchableSSD
    policy: PolicyNet
    network: nn.Module
    loader: DetectionLoader
    costs: CostTable
    own_gbitops: float

    @staticmethod
    def begin(
        experiment: Experiment, run_dir: RunDir, state: TrainState, detector: SwitchableSSD, policy: PolicyNet
    ) -> PolicyTraining:
        """Builds optimizer and training data; what is trained becomes part of `state`."""
        settings = experiment.config.search
        experiment.check_shares("search.policy_batch_size", settings.policy_batch_size, part="policy")
        state.networks["policy"] = policy
        state.optimizers["policy"] = torch.optim.Adam(policy.parameters(), lr=settings.policy_lr)
        return PolicyTraining(
            experiment,
            run_dir,
            state,
            detector,
            policy,
            distributed.parallel(policy),
            experiment.policy_loader(settings.policy_batch_size, "search policy"),
            detector_costs(detector),
            policy_gbitops(policy, detector.image_size),
        )

    @property
    def target_gbitops(self) -> float | None:
        """Mean GBitOps that the reward aims at, None where it has no such target."""
        settings = self.experiment.config.reward
        return settings.target_gbitops if settings.name == "budget" else None

    def progress(self, epoch: int) -> float:
        """0 in the first epoch of the search, 1 in the last."""
        return epoch / max(1, self.experiment.config.search.epochs - 1)

    def epsilon(self, epoch: int) -> float:
        """Share of uniform exploration in an epoch."""
        settings = self.experiment.config.search
        return _between(settings.epsilon_start, settings.epsilon_end, self.progress(epoch))

    def epoch(self, epoch: int, after_step: Callable[[], None]) -> dict[str, float]:
        """One pass over the policy's images, or what is left of it after an interruption; returns what to log."""
        config, state = self.experiment.config, self.state
        settings, target = config.search, self.target_gbitops
        progress, epsilon = self.progress(epoch), self.epsilon(epoch)
        self.detector.eval()
        sums = state.sums("policy")
        self.loader.set_epoch(epoch, first_batch=sums.steps)
        bar = distributed.progress_bar(self.loader, f"search {epoch + 1}/{settings.epochs} policy", sums.steps)

        def on_step(scalars: dict[str, float]) -> None:
            reward = f"{scalars['reward/sampled']:.3f}"
            bar.set_postfix(loss=f"{scalars['policy/loss']:.3f}", reward=reward, refresh=False)
            if target is not None:
                cost = scalars["cost/gbitops_greedy"]  # what is used in the end; samples explore
                state.multiplier = state.multiplier.updated(cost, target, config.reward.multiplier_lr)
            after_step()

        train_policy_epoch(
            self.network,
            bar,
            build_judge(self.experiment, self.detector, self.costs, self.own_gbitops, state, progress),
            state.optimizers["policy"],
            sums=sums,
            epsilon=epsilon,
            entropy_beta=_between(settings.entropy_start, settings.entropy_end, progress),
            baseline=settings.baseline,
            normalize_advantage=settings.normalize_advantage,
            look=lambda images: self.detector.look(images).seen,
            device=self.experiment.device,
            draws=[self.experiment.draw("policy samples", number) for number in range(settings.samples)],
            on_step=on_step,
        )
        self.policy.eval()
        scalars = {**sums.means(), "policy/epsilon": epsilon}
        if target is not None:
            scalars["policy/multiplier"] = state.multiplier.value(config.reward.multiplier_gain)
            scalars["cost/greedy_to_target"] = scalars["cost/gbitops_greedy"] / target
        return scalars

    def survey(self) -> Survey:
        """What the policy does on the images that it learns from."""
        return survey(self.policy, self.detector, self.experiment.policy_images(), self.experiment.device)

    def diagnose(self, step: int) -> dict[str, float]:
        """Figures of a survey, to be logged at a step of the detector; those of single positions go to TensorBoard."""
        found = diagnose(self.survey(), self.costs, self.own_gbitops, self.target_gbitops)
        found.log_collapse("the policy's training images")
        self.run_dir.log_step(step, found.position_scalars())
        scalars = {f"diagnostics/{name}": value for name, value in found.scalars().items()}
        # The other baseline judges the greedy configurations in every step.
        return scalars | self.greedy_outcome() if self.experiment.config.search.baseline == "rloo" else scalars

    @torch.no_grad()
    def greedy_outcome(self) -> dict[str, float]:
        """Mean reward and quality of the greedy configurations of the first `MOST_IMAGES` images it learns from."""
        device, batch_size = self.experiment.device, self.experiment.config.eval.batch_size
        progress = self.progress(self.state.epoch - 1)
        judge = build_judge(self.experiment, self.detector, self.costs, self.own_gbitops, self.state, progress)
        self.detector.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in islice(self.experiment.policy_images(), -(-MOST_IMAGES // batch_size)):
            batch = batch.to(device)
            found = judge.outcome(batch, self.policy(self.detector.look(batch.images).seen).argmax(-1))
            sums += torch.stack([found.reward, found.quality, torch.ones_like(found.quality)], 1).to(sums).sum(0)
        reward, quality, images = ranks.total(sums).tolist()
        return {"reward/greedy": reward / images, "quality/greedy": quality / images}

    def meet_budget(self) -> None:
        """Shifts the logits once, if the reward has a target, so that the images the policy learns from cost that.

        Dual ascent comes near it, with an error that is as large as its last swing; and the network in evaluation is
        not quite the one in training. See `budget_offset`.
        """
        target = self.target_gbitops
        if target is None:
            return
        logits, table, fixed = self.survey().logits, self.costs.gbitops_table(), self.costs.fixed / 1e9
        fixed += self.own_gbitops
        offset = budget_offset(logits, table, fixed, target)
        before, after = (greedy_gbitops(values, table, fixed) for values in (logits, logits + offset.to(logits)))
        self.policy.add_to_logits(offset)
        log.info(
            "search: the policy's %d training images cost %.4g GBitOps, %+.1f %% off the target; with its logits "
            "shifted in proportion to the costs %.4g, %+.1f %%",
            len(logits),
            before,
            100 * (before / target - 1),
            after,
            100 * (after / target - 1),
        )


def build_judge(
    experiment: Experiment,
    detector: SwitchableSSD,
    costs: CostTable,
    own_gbitops: float,
    state: TrainState,
    progress: float,
) -> Judge:
    """What the policy is rewarded for at `progress` (0 to 1) through the search; `detector` is in eval mode."""
    config = experiment.config
    settings = config.reward
    # What is scored lower does not count, and cannot suppress what is scored higher.
    threshold = max(config.eval.score_threshold, settings.score_threshold)
    suppression = replace(config.eval, score_threshold=threshold)

    @torch.no_grad()
    def quality(batch: Batch, choices: Tensor) -> Tensor:
        output = detector(batch.images, choices)
        if settings.quality == "loss":
            return negative_loss(detector, output, batch)
        detections = detections_of(detector, output, suppression)
        return quality_of(detections, batch, settings.quality, settings.score_threshold)

    def reward(quality: Tensor, gbitops: Tensor) -> Tensor:
        window = rewards.scheduled_window(
            settings.window_lower, settings.window_upper_start, settings.window_upper_end, progress
        )
        threshold, positive, negative = settings.quality_threshold, settings.positive, settings.negative
        match settings.name:
            case "quality":
                return quality
            case "ratio":
                return rewards.ratio(quality, gbitops, reference=costs.highest(), exponent=settings.exponent)
            case "window_gate":
                return rewards.window_gate(
                    quality, gbitops, window=window, threshold=threshold, positive=positive, negative=negative
                )
            case "window_scaled":
                return rewards.window_scaled(quality, gbitops, window=window, threshold=threshold, positive=positive)
            case "window_signed":
                return rewards.window_signed(
                    quality, gbitops, window=window, threshold=threshold, positive=positive, negative=negative
                )
            case "budget":
                multiplier = state.multiplier.value(settings.multiplier_gain)
                return rewards.budget(quality, gbitops, target=settings.target_gbitops, multiplier=multiplier)
        raise AssertionError(settings.name)

    return Judge(quality, lambda choices: costs.gbitops(choices) + own_gbitops, reward)


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress
