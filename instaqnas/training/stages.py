"""The four stages: the one place that reads the whole config and builds the parts.

pretrain -> pretrain_fp32, pretrain_quant; search; finetune: all are `fit` around one detector loop, under three ways
to choose bits: uniformly random, sampled by the policy, greedy by the policy.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from instaqnas.config import Command, Config, TrainConfig, completed, differences, to_plain
from instaqnas.data.loader import Batch, DetectionDataset, DetectionLoader, collate, make_loader
from instaqnas.data.transforms import SampleTransform, eval_transform, flip_transform, train_transform
from instaqnas.data.voc import read_class_names, read_split
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, copy_weights, detector_costs, position_count
from instaqnas.errors import InputError
from instaqnas.policy import reward as rewards
from instaqnas.policy.bit_config import ChooseBits, fixed, greedy_by, sampled_by, uniformly_random
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.fused import compile_passes
from instaqnas.quant.switchable import calibrate
from instaqnas.seeds import derived_seed, generator
from instaqnas.training.checkpoint import load_checkpoint
from instaqnas.training.detector_epoch import DetectorEpoch, train_detector_epoch
from instaqnas.training.evaluate import EvalReport, detect, evaluate, quality_of
from instaqnas.training.fit import EpochResult, TrainState, fit
from instaqnas.training.optimizers import build_optimizer, build_scheduler
from instaqnas.training.pictures import draw_detections, draw_objects
from instaqnas.training.policy_epoch import Judge, Outcome, train_policy_epoch
from instaqnas.training.report import ReportRow, choice_name, format_table, write_report
from instaqnas.training.run_dir import RunDir, best_checkpoint
from instaqnas.training.runtime import keep_freed_memory

log = logging.getLogger(__name__)
CALIBRATION_IMAGES = 64
PICTURES = 4
PICTURE_SCORE = 0.3
FULL_PRECISION_STAGES = ("pretrain_fp32",)
POLICY_STAGES = ("search", "finetune")
QUANTIZED_STAGES = ("pretrain_quant", *POLICY_STAGES)
LOG_EVERY = 10  # steps between TensorBoard scalars of the training loss


class Experiment:
    """Builds the parts that a config describes.

    Args:
        config: the whole config.
        class_names: without background; None reads them from the data.

    Raises: InputError if the data or the device is not there.
    """

    def __init__(self, config: Config, class_names: Sequence[str] | None = None) -> None:
        self.config, self.plain = config, to_plain(config)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device: cuda is not available on this machine; known: auto, cpu")
        name = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self.class_names = read_class_names(config.data.roots) if class_names is None else tuple(class_names)

    def detector(self, bits: DetectorBits) -> SwitchableSSD:
        """A detector on the device; first weights from the seed."""
        settings = self.config.detector
        # Quantized layers are batched products over [channels, pixels], which want the ordinary layout.
        channels_last = self.config.runtime.channels_last and bits.quantize_nothing
        torch.manual_seed(derived_seed(self.config.seed, "detector"))
        return SwitchableSSD(
            len(self.class_names) + 1,
            bits,
            image_size=settings.image_size,
            width=settings.width,
            extras_batch_norm=settings.extras_batch_norm,
            box_sizes=settings.box_sizes,
            amp=self.config.runtime.amp,
        ).to(self.device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def quantized_detector(self) -> SwitchableSSD:
        """The detector at the bits of the config."""
        bits = self.config.bits
        return self.detector(DetectorBits(**{item.name: getattr(bits, item.name) for item in fields(bits)}))

    def policy(self) -> PolicyNet:
        """The policy network on the device; first weights from the seed."""
        settings = self.config.policy
        torch.manual_seed(derived_seed(self.config.seed, "policy"))
        policy = PolicyNet(
            position_count(self.config.bits.positions),
            len(self.config.bits.choices),
            pool=settings.pool,
            width=settings.width,
            bits=settings.bits,
        )
        return policy.to(self.device)

    def train_loader(self, batch_size: int, stage: str) -> DetectionLoader:
        """Augmented training images; order and augmentation differ by stage."""
        data = self.config.data
        build = train_transform if data.augmentation == "ssd" else flip_transform
        transform = build(self.config.detector.image_size, vertical_flip=data.vertical_flip)
        return self._loader(data.roots, data.train_split, transform, batch_size, stage, training=True)

    def plain_train_loader(self, batch_size: int, stage: str) -> DetectionLoader:
        """Training images as evaluation sees images, in random order: what the policy learns from."""
        data = self.config.data
        return self._loader(data.roots, data.train_split, self._eval_transform, batch_size, stage, training=True)

    def eval_loader(self, split: str, roots: list[str]) -> DetectionLoader:
        """All images of a split in order."""
        return self._loader(roots, split, self._eval_transform, self.config.eval.batch_size, "eval", training=False)

    def val_loader(self) -> DetectionLoader | None:
        """The val split, None where the config has none."""
        data = self.config.data
        return self.eval_loader(data.val_split, data.roots) if data.val_split else None

    def test_loader(self) -> DetectionLoader:
        """The test split."""
        data = self.config.data
        return self.eval_loader(data.test_split, data.test_roots or data.roots)

    def calibration_images(self) -> Tensor:
        """Random training images [n, 3, S, S] for the first step sizes."""
        dataset = self._dataset(
            self.config.data.roots, self.config.data.train_split, self._eval_transform, "calibration"
        )
        order = torch.randperm(len(dataset), generator=generator(self.config.seed, "calibration"))
        return _batch(dataset, order[:CALIBRATION_IMAGES].tolist()).images.to(self.device)

    def picture_batch(self) -> Batch:
        """A few images to look at: the first of the val split, or of the train split where there is none."""
        data = self.config.data
        dataset = self._dataset(data.roots, data.val_split or data.train_split, self._eval_transform, "pictures")
        return _batch(dataset, range(min(PICTURES, len(dataset)))).to(self.device)

    def choose_random(self, *purpose: int | str) -> ChooseBits:
        """Uniformly random configurations from a stream of their own."""
        random = generator(self.config.seed, *purpose)
        positions = position_count(self.config.bits.positions)
        return uniformly_random(positions, len(self.config.bits.choices), random)

    def choose_fixed(self, detector: SwitchableSSD, choice: int = 0) -> ChooseBits:
        """The same choice at every position of `detector`."""
        return fixed([choice] * len(detector.positions))

    def evaluate(
        self, detector: SwitchableSSD, loader: DetectionLoader, choose_bits: ChooseBits, policy_cost: float = 0.0
    ) -> EvalReport:
        """Figures of a detector on a split."""
        return evaluate(
            detector,
            tqdm(loader, desc="evaluate", leave=False),
            choose_bits,
            costs=detector_costs(detector),
            policy_gbitops=policy_cost,
            class_names=self.class_names,
            settings=self.config.eval,
            quality=self.config.reward.quality,
            quality_threshold=self.config.reward.score_threshold,
            device=self.device,
        )

    @property
    def _eval_transform(self) -> SampleTransform:
        return eval_transform(self.config.detector.image_size)

    def _dataset(self, roots: list[str], split: str, transform: SampleTransform, stage: str) -> DetectionDataset:
        annotations = read_split(roots, split, self.class_names)
        cached_side = 2 * self.config.detector.image_size if self.config.data.cache == "ram" else None
        seed = derived_seed(self.config.seed, stage, "pixels")
        return DetectionDataset(annotations, transform, seed=seed, cached_side=cached_side)

    def _loader(
        self, roots: list[str], split: str, transform: SampleTransform, batch_size: int, stage: str, *, training: bool
    ) -> DetectionLoader:
        return make_loader(
            self._dataset(roots, split, transform, stage),
            batch_size,
            shuffle=training,
            seed=derived_seed(self.config.seed, stage, "order"),
            workers=self.config.data.workers,
            drop_last=training,
        )


@dataclass(frozen=True)
class DetectorTraining:
    """One detector being trained in one stage."""

    experiment: Experiment
    run_dir: RunDir
    detector: SwitchableSSD
    settings: TrainConfig
    loader: DetectionLoader
    state: TrainState

    @staticmethod
    def begin(
        experiment: Experiment, run_dir: RunDir, detector: SwitchableSSD, settings: TrainConfig
    ) -> DetectorTraining:
        """Builds optimizer, schedule and training data."""
        loader = experiment.train_loader(settings.batch_size, run_dir.stage)
        optimizer = build_optimizer(detector, settings)
        scheduler = build_scheduler(optimizer, settings, len(loader))
        state = TrainState({"detector": detector}, {"detector": optimizer}, scheduler)
        return DetectorTraining(experiment, run_dir, detector, settings, loader, state)

    def epoch(self, epoch: int, choose_bits: ChooseBits) -> DetectorEpoch:
        """One pass over the training split."""
        self.loader.set_epoch(epoch)
        bar = tqdm(self.loader, desc=f"{self.run_dir.stage} {epoch + 1}/{self.settings.epochs}", leave=False)
        first_step = epoch * len(self.loader)
        writer = self.run_dir.open_tensorboard(first_step)

        def show(scalars: dict[str, float]) -> None:
            bar.set_postfix(loss=f"{scalars['loss']:.3f}")
            step = first_step + bar.n
            if step % LOG_EVERY == 0:
                for name, value in scalars.items():
                    writer.add_scalar(f"train/{name}", value, step)

        return train_detector_epoch(
            self.detector,
            bar,
            choose_bits,
            self.state.optimizers["detector"],
            self.state.scheduler,
            clip_grad_norm=self.settings.clip_grad_norm,
            device=self.experiment.device,
            on_step=show,
        )

    def fit(
        self,
        train_epoch: Callable[[int], EpochResult],
        choose_bits: ChooseBits,
        *,
        policy_cost: float = 0.0,
        keep_best: bool = True,
    ) -> None:
        """Trains to the end; validates and draws under `choose_bits`."""
        val_loader = self.experiment.val_loader()
        shown = self.experiment.picture_batch()

        def validate() -> EvalReport:
            return self.experiment.evaluate(self.detector, val_loader, choose_bits, policy_cost)

        def add_pictures(step: int) -> None:
            _add_pictures(self.experiment, self.run_dir, self.detector, shown, choose_bits, step)

        fit(
            self.run_dir,
            self.state,
            epochs=self.settings.epochs,
            steps_per_epoch=len(self.loader),
            train_epoch=train_epoch,
            validate=None if val_loader is None else validate,
            keep_best=keep_best,
            add_pictures=add_pictures,
            eval_every=self.settings.eval_every,
            save_every=self.settings.save_every,
        )


def run_pretrain(command: Command) -> None:
    """Full precision, then quantized under uniformly random bit configurations."""
    experiment = _start(command)
    source = command.init
    if source is None:
        _pretrain_fp32(experiment, command)
        source = finished_checkpoint(command.run, "pretrain_fp32", command.config.pretrain_fp32, "pretrain.py")
    _pretrain_quant(experiment, command, source)


def _pretrain_fp32(experiment: Experiment, command: Command) -> None:
    run_dir = RunDir(command.run, "pretrain_fp32", experiment.plain, experiment.class_names, restart=command.restart)
    detector = experiment.detector(DetectorBits.full_precision())
    training = DetectorTraining.begin(experiment, run_dir, detector, command.config.pretrain_fp32)
    choose = experiment.choose_fixed(detector)

    def train_epoch(epoch: int) -> EpochResult:
        result = training.epoch(epoch, choose)
        return EpochResult(_prefixed("train", result.losses), result.choices)

    training.fit(train_epoch, choose)


def _pretrain_quant(experiment: Experiment, command: Command, source: Path) -> None:
    run_dir = RunDir(command.run, "pretrain_quant", experiment.plain, experiment.class_names, restart=command.restart)
    detector = experiment.quantized_detector()
    if not run_dir.last.exists():
        full = experiment.detector(DetectorBits.full_precision())
        load_network(experiment, full, "detector", source, stages=FULL_PRECISION_STAGES)
        copy_weights(full, detector)
        images = experiment.calibration_images()
        choices = experiment.choose_random("calibration")(images)
        calibrate(detector, lambda: detector(images, choices))
    training = DetectorTraining.begin(experiment, run_dir, detector, command.config.pretrain_quant)

    def train_epoch(epoch: int) -> EpochResult:
        result = training.epoch(epoch, experiment.choose_random("pretrain_quant", epoch))
        return EpochResult(_prefixed("train", result.losses), result.choices)

    training.fit(train_epoch, experiment.choose_random("validate"))


def run_search(command: Command) -> None:
    """Every epoch trains the policy, then the detector under configurations sampled from it."""
    experiment, config = _start(command), command.config
    settings = config.search
    run_dir = RunDir(command.run, "search", experiment.plain, experiment.class_names, restart=command.restart)
    detector, policy = experiment.quantized_detector(), experiment.policy()
    if not run_dir.last.exists():
        source = command.init or finished_checkpoint(
            command.run, "pretrain_quant", config.pretrain_quant, "pretrain.py"
        )
        load_network(experiment, detector, "detector", source, stages=QUANTIZED_STAGES)
        images = experiment.calibration_images()
        calibrate(policy, lambda: policy(images))
    training = DetectorTraining.begin(experiment, run_dir, detector, settings)
    state = training.state
    state.networks["policy"] = policy
    state.optimizers["policy"] = torch.optim.Adam(policy.parameters(), lr=settings.policy_lr)
    policy_loader = experiment.plain_train_loader(settings.policy_batch_size, "search policy")
    costs, policy_cost = detector_costs(detector), policy_gbitops(policy, detector.image_size)

    def train_epoch(epoch: int) -> EpochResult:
        progress = epoch / max(1, settings.epochs - 1)
        epsilon = settings.epsilon_start + (settings.epsilon_end - settings.epsilon_start) * progress
        detector.eval()
        policy_loader.set_epoch(epoch)
        bar = tqdm(policy_loader, desc=f"search {epoch + 1}/{settings.epochs} policy", leave=False)

        def after_step(scalars: dict[str, float]) -> None:
            bar.set_postfix(loss=f"{scalars['policy/loss']:.3f}", reward=f"{scalars['reward/sampled']:.3f}")
            if config.reward.name == "budget":
                state.multiplier = rewards.updated_multiplier(
                    state.multiplier,
                    scalars["cost/gbitops_greedy"],  # what is used in the end; samples explore
                    config.reward.target_gbitops,
                    config.reward.multiplier_lr,
                )

        policy_epoch = train_policy_epoch(
            policy,
            bar,
            _judge(experiment, detector, costs, policy_cost, state, progress),
            state.optimizers["policy"],
            epsilon=epsilon,
            entropy_beta=settings.entropy_beta,
            normalize_advantage=settings.normalize_advantage,
            device=experiment.device,
            generator=generator(config.seed, "policy samples", epoch),
            on_step=after_step,
        )
        policy.eval()
        choose = sampled_by(policy, epsilon, generator(config.seed, "search", epoch))
        detector_epoch = training.epoch(epoch, choose)
        extra = {"policy/epsilon": epsilon, "policy/multiplier": state.multiplier}
        scalars = {**policy_epoch.scalars, **extra, **_prefixed("train", detector_epoch.losses)}
        return EpochResult(scalars, detector_epoch.choices)

    policy.eval()
    # The highest mAP would be that of an early, expensive policy: what counts is where the search ends.
    training.fit(train_epoch, greedy_by(policy), policy_cost=policy_cost, keep_best=False)


def run_finetune(command: Command) -> None:
    """The detector under the frozen, greedy policy."""
    experiment, config = _start(command), command.config
    run_dir = RunDir(command.run, "finetune", experiment.plain, experiment.class_names, restart=command.restart)
    detector, policy = experiment.quantized_detector(), experiment.policy()
    if not run_dir.last.exists():
        source = command.init or finished_checkpoint(command.run, "search", config.search, "search.py")
        load_network(experiment, detector, "detector", source, stages=POLICY_STAGES)
        load_network(experiment, policy, "policy", source, stages=POLICY_STAGES)
    policy.eval().requires_grad_(False)  # noqa: FBT003
    training = DetectorTraining.begin(experiment, run_dir, detector, config.finetune)
    training.state.networks["policy"] = policy
    choose = greedy_by(policy)

    def train_epoch(epoch: int) -> EpochResult:
        result = training.epoch(epoch, choose)
        return EpochResult(_prefixed("train", result.losses), result.choices)

    training.fit(train_epoch, choose, policy_cost=policy_gbitops(policy, detector.image_size))


def run_eval(command: Command) -> None:
    """Measures one way to choose bits, or compares all, on the test split."""
    experiment = _start(command)
    names = [command.bits]
    if command.bits == "all":
        if command.init is not None:
            raise InputError("--init names one checkpoint, but --bits all compares several; name one --bits")
        uniform = [f"uniform:{choice_name(choice)}" for choice in command.config.bits.choices]
        names = ["fp32", *uniform, "random", "policy"]
    loader = experiment.test_loader()
    rows = [_evaluate_row(experiment, command, name, loader) for name in names]
    folder = command.run / "eval"
    if command.bits != "all":
        folder = folder / command.bits.replace(":", "_")
    write_report(folder, rows, experiment.plain)
    log.info("%s", format_table([row.plain() for row in rows]))
    log.info("report and plot: %s", folder)
    log.info("TensorBoard: tensorboard --logdir %s", command.run)


def _evaluate_row(experiment: Experiment, command: Command, name: str, loader: DetectionLoader) -> ReportRow:
    """One row of the comparison; baselines run on the detector that was trained for random configurations."""
    config = command.config
    if name == "fp32":
        source = command.init or finished_checkpoint(command.run, "pretrain_fp32", config.pretrain_fp32, "pretrain.py")
        detector = experiment.detector(DetectorBits.full_precision())
        load_network(experiment, detector, "detector", source, stages=FULL_PRECISION_STAGES)
        report = experiment.evaluate(detector, loader, experiment.choose_fixed(detector))
        return ReportRow(name, source, detector.choices, report)
    detector = experiment.quantized_detector()
    if name == "policy":
        source = command.init or finished_checkpoint(command.run, "finetune", config.finetune, "finetune.py")
        policy = experiment.policy()
        load_network(experiment, policy, "policy", source, stages=POLICY_STAGES)
        policy.eval()
        choose, policy_cost = greedy_by(policy), policy_gbitops(policy, detector.image_size)
    else:
        source = command.init or finished_checkpoint(
            command.run, "pretrain_quant", config.pretrain_quant, "pretrain.py"
        )
        choose, policy_cost = experiment.choose_random("eval"), 0.0
        if name != "random":
            choice = [choice_name(c) for c in config.bits.choices].index(name.removeprefix("uniform:"))
            choose = experiment.choose_fixed(detector, choice)
    load_network(experiment, detector, "detector", source, stages=QUANTIZED_STAGES)
    return ReportRow(name, source, detector.choices, experiment.evaluate(detector, loader, choose, policy_cost))


def _start(command: Command) -> Experiment:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.captureWarnings(capture=True)
    keep_freed_memory()
    if command.config.runtime.threads:
        torch.set_num_threads(command.config.runtime.threads)
    compile_passes(command.config.runtime.compile)
    return Experiment(command.config)


def finished_checkpoint(run: Path, stage: str, settings: TrainConfig, script: str) -> Path:
    """The checkpoint of a stage that has run to its end.

    Raises: InputError if it has not begun or not ended.
    """
    path = best_checkpoint(run, stage)
    if not path.exists():
        raise InputError(f"{run / stage}: no checkpoint; run {script} first, or name a checkpoint with --init")
    epoch = load_checkpoint(run / stage / "last.pt")["epoch"]
    if epoch < settings.epochs:
        raise InputError(f"{run / stage}: at epoch {epoch} of {settings.epochs}; repeat {script} to finish it")
    return path


def load_network(
    experiment: Experiment,
    network: nn.Module,
    name: str,
    path: Path,
    *,
    stages: Sequence[str],
) -> None:
    """Loads one network of a checkpoint.

    Raises: InputError if the checkpoint is not of one of `stages`, or was trained with other settings or classes.
    """
    state = load_checkpoint(path)
    if state["stage"] not in stages:
        raise InputError(f"{path}: a checkpoint of stage {state['stage']}; needed here: {' or '.join(stages)}")
    sections = ("detector",) if state["stage"] == "pretrain_fp32" else ("detector", "bits", "policy")
    old, new = (
        {section: config[section] for section in sections} for config in (completed(state["config"]), experiment.plain)
    )
    changed = differences({**old, "classes": state["classes"]}, {**new, "classes": list(experiment.class_names)})
    if changed:
        raise InputError(f"{path}: trained with other settings: {'; '.join(changed)}")
    network.load_state_dict(state["networks"][name])


def _judge(
    experiment: Experiment,
    detector: SwitchableSSD,
    costs: CostTable,
    policy_cost: float,
    state: TrainState,
    progress: float,
) -> Judge:
    """What the policy is rewarded for at `progress` (0 to 1) through the search."""
    config = experiment.config
    settings = config.reward

    def judge(batch: Batch, choices: Tensor) -> Outcome:
        detections = detect(detector, batch.images, choices, config.eval)
        quality = quality_of(detections, batch, settings.quality, settings.score_threshold)
        gbitops = costs.gbitops(choices).to(quality) + policy_cost
        return Outcome(quality, gbitops, reward(quality, gbitops))

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
                return rewards.budget(quality, gbitops, target=settings.target_gbitops, multiplier=state.multiplier)
        raise AssertionError(settings.name)

    return judge


@torch.no_grad()
def _add_pictures(
    experiment: Experiment,
    run_dir: RunDir,
    detector: SwitchableSSD,
    batch: Batch,
    choose_bits: ChooseBits,
    step: int,
) -> None:
    """A few images with true and predicted boxes, to TensorBoard."""
    was_training = detector.training
    detector.eval()
    found = detect(detector, batch.images, choose_bits(batch.images), experiment.config.eval)
    detector.train(was_training)
    writer = run_dir.open_tensorboard(step)
    for index in range(len(batch.images)):
        shown = found.scores[index] >= PICTURE_SCORE
        objects = batch.labels[index] > 0
        picture = draw_detections(
            draw_objects(batch.images[index].cpu(), batch.boxes_xyxy[index, objects].cpu()),
            found.boxes_xyxy[index, shown].cpu(),
            found.scores[index, shown].cpu(),
            found.labels[index, shown].cpu(),
            experiment.class_names,
        )
        writer.add_image(f"detections/{index}", picture, step)


def _batch(dataset: DetectionDataset, indices: Iterable[int]) -> Batch:
    return collate([dataset[0, index] for index in indices])


def _prefixed(prefix: str, scalars: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in scalars.items()}
