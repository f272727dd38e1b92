"""The policy's side of the search: reward, training, diagnosis, and the last shift that meets the budget."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from instaqnas import distributed
from instaqnas.config.settings import Config
from instaqnas.data.loader import Batch, DetectionLoader
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.evaluation.inference import detections_of, negative_loss, quality_of
from instaqnas.evaluation.sensitivity import first_images
from instaqnas.evaluation.survey import Survey, diagnose, survey
from instaqnas.experiment.parts import Experiment
from instaqnas.policy import reward as rewards
from instaqnas.policy.budget import budget_offset, greedy_gbitops
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.affine import Affine
from instaqnas.quant.bitops import CostTable
from instaqnas.training.detector_training import DetectorTraining
from instaqnas.training.interruption import finishing_steps
from instaqnas.training.policy_step import Judge, Quality, Sampling, policy_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyTraining:
    """A policy in training; build it with `begin`.

    Args:
        training: of the detector in the same search; its result judges, and computes the input of the policy.
        policy: is trained.
        network: the policy as `distributed.parallel` returns it.
        loader: training images of the policy.
        costs: GBitOps of the detector's configurations.
        own_gbitops: cost of one decision of the policy.
    """

    training: DetectorTraining
    policy: PolicyNet
    network: nn.Module
    loader: DetectionLoader
    costs: CostTable
    own_gbitops: float

    @staticmethod
    def begin(training: DetectorTraining, policy: PolicyNet) -> PolicyTraining:
        """Builds optimizer and data; the policy becomes part of the state of `training`."""
        experiment, state = training.experiment, training.state
        settings = experiment.config.search
        state.networks["policy"] = policy
        state.optimizers["policy"] = torch.optim.Adam(policy.parameters(), lr=settings.policy_lr)
        return PolicyTraining(
            training=training,
            policy=policy,
            network=distributed.parallel(policy),
            loader=experiment.policy_loader(settings.policy_batch_size, "search policy"),
            costs=detector_costs(training.detector),
            own_gbitops=policy_gbitops(policy, training.detector.image_size),
        )

    @property
    def config(self) -> Config:
        """The whole config."""
        return self.training.experiment.config

    @property
    def target_gbitops(self) -> float | None:
        """Mean GBitOps that the reward aims at; None if it has no target."""
        settings = self.config.reward
        return settings.target_gbitops if settings.name == "budget" else None

    def progress(self, epoch: int) -> float:
        """Progress of the search: 0 in the first epoch, 1 in the last."""
        return epoch / max(1, self.config.search.epochs - 1)

    def epsilon(self, epoch: int) -> float:
        """Share of uniform exploration in an epoch."""
        settings = self.config.search
        return _between(settings.epsilon_start, settings.epsilon_end, self.progress(epoch))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the policy's images, or the rest of it after an interruption; returns its scalars."""
        experiment, state, settings = self.training.experiment, self.training.state, self.config.search
        detector, target = self.training.result, self.target_gbitops
        progress, epsilon = self.progress(epoch), self.epsilon(epoch)
        entropy_beta = _between(settings.entropy_start, settings.entropy_end, progress)
        judge = self.judge(progress)
        sums = state.sums("policy")
        self.loader.set_epoch(epoch, first_batch=sums.steps)
        bar = distributed.progress_bar(self.loader, f"search {epoch + 1}/{settings.epochs} policy", sums.steps)
        detector.eval()
        self.network.train()
        with finishing_steps() as interruption:
            for batch in bar:
                scalars = policy_step(
                    self.network,
                    batch.to(experiment.device),
                    detector,
                    judge,
                    state.optimizers["policy"],
                    sampling=self._sampling(epsilon),
                    entropy_beta=entropy_beta,
                    normalize_advantage=settings.normalize_advantage,
                    step=epoch * len(self.loader) + sums.steps,
                )
                sums.add(scalars, distributed.world_size() * len(batch.image_ids))
                if target is not None:
                    cost = scalars["cost/gbitops_greedy"]  # greedy configurations are used in the end; samples explore
                    state.multiplier = state.multiplier.updated(cost, target, self.config.reward.multiplier_lr)
                reward = f"{scalars['reward/sampled']:.3f}"
                bar.set_postfix(loss=f"{scalars['policy/loss']:.3f}", reward=reward, refresh=False)
                self.training.save_if_due(interruption)
        self.policy.eval()
        means = {**sums.means(), "policy/epsilon": epsilon}
        if target is not None:
            means["policy/multiplier"] = state.multiplier.value(self.config.reward.multiplier_gain)
            means["cost/greedy_to_target"] = means["cost/gbitops_greedy"] / target
        return means

    def meet_budget(self) -> None:
        """Shifts the logits once so that the policy's training images cost the target on average, if there is one.

        Dual ascent comes close to the target, but its last swing remains, and the policy in evaluation mode differs a
        little from the policy in training mode. See `budget_offset`.
        """
        target = self.target_gbitops
        if target is None:
            return
        logits, table = self.survey().logits, self.costs.gbitops_table()
        fixed = self.costs.fixed / 1e9 + self.own_gbitops
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

    def survey(self) -> Survey:
        """Runs the policy on its training images."""
        experiment = self.training.experiment
        return survey(self.policy, self.training.result, experiment.policy_images(), experiment.device)

    def diagnose(self) -> dict[str, float]:
        """Figures of the policy at the end of an epoch; those of single positions go to TensorBoard at once."""
        found = diagnose(self.survey(), self.costs, self.own_gbitops, self.target_gbitops)
        found.log_collapse("the policy's training images")
        step = self.training.state.epoch * len(self.training.loader)
        self.training.run_dir.log_step(step, found.position_scalars())
        scalars = {f"diagnostics/{name}": value for name, value in found.scalars().items()}
        settings = self.config.search
        if settings.baseline == "greedy" and settings.samples != "all":  # every step judges the greedy configurations
            return scalars
        return scalars | self.greedy_outcome()

    @torch.no_grad()
    def greedy_outcome(self) -> dict[str, float]:
        """Mean reward and quality of the greedy configurations on the first training images of the policy."""
        experiment, detector = self.training.experiment, self.training.result
        judge = self.judge(self.progress(self.training.state.epoch - 1))
        detector.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=experiment.device)
        for batch in first_images(experiment.policy_images(), experiment.device):
            observation = detector.observe(batch.images)
            found = judge.outcome(batch, self.policy(observation.input).argmax(-1), observation.stem)
            sums += torch.stack([found.reward, found.quality, torch.ones_like(found.quality)], 1).to(sums).sum(0)
        reward, quality, images = distributed.total(sums).tolist()
        return {"reward/greedy": reward / images, "quality/greedy": quality / images}

    def _sampling(self, epsilon: float) -> Sampling | None:
        """How configurations are sampled with a share `epsilon` of exploration; None where all are judged."""
        settings = self.config.search
        if settings.samples == "all":
            return None
        draws = [self.training.experiment.draw("policy samples", number) for number in range(settings.samples)]
        return Sampling(draws, epsilon, settings.baseline)

    def judge(self, progress: float) -> Judge:
        """The judge at some progress of the search, from 0 to 1; the detector must be in eval mode when it judges."""
        experiment = self.training.experiment
        quality = _quality(experiment, self.training.result)
        return Judge(
            quality,
            gbitops=lambda choices: self.costs.gbitops(choices) + self.own_gbitops,
            reward=lambda quality, gbitops: self._reward(quality, gbitops, progress),
        )

    def _reward(self, quality: Tensor, gbitops: Tensor, progress: float) -> Tensor:
        """Reward [B] from quality and GBitOps, each [B]."""
        settings = self.config.reward
        threshold, positive, negative = settings.quality_threshold, settings.positive, settings.negative
        window = rewards.scheduled_window(
            settings.window_lower, settings.window_upper_start, settings.window_upper_end, progress
        )
        match settings.name:
            case "quality":
                return quality
            case "ratio":
                return rewards.ratio(quality, gbitops, reference=self.costs.highest(), exponent=settings.exponent)
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
                multiplier = self.training.state.multiplier.value(settings.multiplier_gain)
                return rewards.budget(quality, gbitops, target=settings.target_gbitops, multiplier=multiplier)
        raise AssertionError(settings.name)


def _quality(experiment: Experiment, detector: SwitchableSSD) -> Quality:
    """Runs the detector under configurations; returns the quality [B] that the reward asks for."""
    config = experiment.config
    settings = config.reward
    # Detections below the threshold of the reward do not count, and cannot suppress others above it.
    threshold = max(config.eval.score_threshold, settings.score_threshold)
    suppression = replace(config.eval, score_threshold=threshold)

    @torch.no_grad()
    def quality(batch: Batch, choices: Tensor, stem: Affine | None) -> Tensor:
        output = detector(batch.images, choices, stem)
        if settings.quality == "loss":
            return negative_loss(detector, output, batch)
        detections = detections_of(detector, output, suppression)
        return quality_of(detections, batch, settings.quality, settings.score_threshold)

    return quality


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress
