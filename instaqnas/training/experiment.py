"""The parts that a config describes, and the checkpoints that stages hand to each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config import Command, Config, QuantTrainConfig, TrainConfig, completed, differences, to_plain
from instaqnas.cpus import available_cpus
from instaqnas.data.loader import Batch, DetectionDataset, DetectionLoader, collate, load_images, make_loader
from instaqnas.data.transforms import SampleTransform, eval_transform, flip_transform, train_transform
from instaqnas.data.voc import Annotation, read_class_names, read_split
from instaqnas.detector.mobilenet import stem_channels
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs, position_count
from instaqnas.errors import InputError
from instaqnas.policy.bit_config import ChooseBits, Draw, fixed, sandwich, uniformly_random
from instaqnas.policy.network import PolicyNet, effort_of
from instaqnas.ranks import world_size
from instaqnas.seeds import SampleKey, derived_seed, generator, uniform_numbers
from instaqnas.training import distributed
from instaqnas.training.evaluate import EvalReport, Measured, RewardQuality, measure, report_of_all
from instaqnas.training.run_dir import best_checkpoint, kind_of

TrainPart = Literal["detector", "policy"]  # of the train split
CALIBRATION_IMAGES = 64
CACHED_SIDE = 2  # shorter side of a cached image, in sides of the network's input
PICTURES = 4
MOST_WORKERS = 8  # more do not pay for one GPU
FULL_PRECISION_STAGES = ("pretrain_fp32",)
POLICY_STAGES = ("search", "finetune")
QUANTIZED_STAGES = ("pretrain_quant", *POLICY_STAGES, "finetune_fixed")
# The sections of the config that a network of a stage's checkpoint depends on.
NETWORK_SECTIONS = {
    "pretrain_fp32": ("detector",),
    "pretrain_quant": ("detector", "bits"),
    "search": ("detector", "bits", "policy"),
    "finetune": ("detector", "bits", "policy"),
    "finetune_fixed": ("detector", "bits"),
}


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
        self._annotations: dict[tuple[str, ...], list[Annotation]] = {}
        self._images: list[np.ndarray] | None = None  # of the whole train split

    def detector(self, bits: DetectorBits) -> SwitchableSSD:
        """A detector on the device; first weights from the seed."""
        settings = self.config.detector
        # Quantized layers see to their own layout.
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
        return self.detector(detector_bits(self.config))

    def adaptive_detector(self) -> SwitchableSSD:
        """The quantized detector for a policy, which chooses its bits; its stem is frozen if the policy looks at it."""
        detector = self.quantized_detector()
        if self.config.policy.input == "stem":
            detector.freeze_stem()
        return detector

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
            stem_channels=stem_channels(self.config.detector.width) if settings.input == "stem" else None,
            effort=effort_of(self.config.bits.choices) if settings.effort else None,
        )
        return policy.to(self.device)

    def check_shares(self, key: str, batch_size: int, parts: int = 1, *, part: TrainPart = "detector") -> None:
        """Raises InputError, naming a setting, unless its batches give every process so many equal parts.

        `part` is that of the train split which the batches come from.
        """
        shares = parts * world_size()
        if batch_size % shares:
            raise InputError(f"{key}: expected a multiple of {shares} (processes x accumulate), got {batch_size}")
        images = len(self._train_indices(part))
        if self.config.data.policy_share:
            self._check_policy_share(key, batch_size, part)
            self._check_policy_share("search.policy_batch_size", self.config.search.policy_batch_size, "policy")
        if shares > 1 and batch_size > images:  # the only batch would not be full
            raise InputError(f"{key}: expected at most the {images} training images, got {batch_size}")

    def train_loader(self, batch_size: int, stage: str) -> DetectionLoader:
        """Augmented training images of the detector; order and augmentation differ by stage."""
        data = self.config.data
        build = train_transform if data.augmentation == "ssd" else flip_transform
        transform = build(self.config.detector.image_size, vertical_flip=data.vertical_flip)
        return self._loader(self._train_dataset("detector", transform, stage), batch_size, stage, training=True)

    def policy_loader(self, batch_size: int, stage: str) -> DetectionLoader:
        """The images that the policy learns from, as evaluation sees images, in random order."""
        dataset = self._train_dataset("policy", self._eval_transform, stage)
        return self._loader(dataset, batch_size, stage, training=True)

    def policy_images(self) -> DetectionLoader:
        """The images that the policy learns from, as evaluation sees images, each once, in order."""
        dataset = self._train_dataset("policy", self._eval_transform, "survey")
        return self._loader(dataset, self.config.eval.batch_size, "survey", training=False)

    def eval_loader(self, split: str, roots: list[str]) -> DetectionLoader:
        """All images of a split in order."""
        dataset = self._dataset(roots, split, self._eval_transform, "eval")
        return self._loader(dataset, self.config.eval.batch_size, "eval", training=False)

    def val_loader(self) -> DetectionLoader | None:
        """The val split, None where the config has none."""
        data = self.config.data
        return self.eval_loader(data.val_split, data.roots) if data.val_split else None

    def test_loader(self) -> DetectionLoader:
        """The test split."""
        data = self.config.data
        return self.eval_loader(data.test_split, data.test_roots or data.roots)

    def loader_of(self, split: str) -> DetectionLoader:
        """A split by its name: the test split from its own roots, any other from those of the train split."""
        if split == self.config.data.test_split:
            return self.test_loader()
        return self.eval_loader(split, self.config.data.roots)

    @property
    def tuning_split(self) -> str:
        """The val split, or the train split where there is none: what fixed bit configurations are chosen on."""
        return self.config.data.val_split or self.config.data.train_split

    def tuning_loader(self) -> DetectionLoader:
        """All images of `tuning_split` in order."""
        return self.eval_loader(self.tuning_split, self.config.data.roots)

    def calibration_batch(self) -> Batch:
        """Random training images of the detector for the first step sizes."""
        dataset = self._train_dataset("detector", self._eval_transform, "calibration")
        order = torch.randperm(len(dataset), generator=generator(self.config.seed, "calibration"))
        return _batch(dataset, order[:CALIBRATION_IMAGES].tolist()).to(self.device)

    def picture_batch(self) -> Batch:
        """A few images to look at: the first of the val split, or of the train split where there is none."""
        data = self.config.data
        dataset = self._dataset(data.roots, data.val_split or data.train_split, self._eval_transform, "pictures")
        return _batch(dataset, range(min(PICTURES, len(dataset)))).to(self.device)

    def draw(self, *purpose: int | str) -> Draw:
        """Random numbers for the positions of images, others for every purpose."""
        positions = position_count(self.config.bits.positions)
        return lambda keys: uniform_numbers(keys, positions, self.config.seed, *purpose)

    def choose_random(self, *purpose: int | str) -> ChooseBits:
        """Uniformly random configurations, others for every purpose."""
        return uniformly_random(len(self.config.bits.choices), self.draw(*purpose))

    def choose_sandwich(self, *purpose: int | str) -> ChooseBits:
        """The cheapest, the dearest and random configurations, others for every purpose."""
        return sandwich(self.config.bits.choices, self.draw(*purpose))

    def choose_fixed(self, detector: SwitchableSSD, choice: int = 0) -> ChooseBits:
        """The same choice at every position of `detector`."""
        return fixed([choice] * len(detector.positions))

    def measure(
        self, detector: SwitchableSSD, loader: DetectionLoader, choose_bits: ChooseBits, quality: RewardQuality
    ) -> list[Measured]:
        """What a detector makes of the images of a split, with their `quality`; this process's shares."""
        return measure(
            detector,
            distributed.progress_bar(loader, "evaluate"),
            choose_bits,
            costs=detector_costs(detector),
            settings=self.config.eval,
            quality=quality,
            quality_threshold=self.config.reward.score_threshold,
            difficulties=[annotation.difficulty for annotation in loader.dataset.annotations],
            device=self.device,
        )

    def evaluate(
        self, detector: SwitchableSSD, loader: DetectionLoader, choose_bits: ChooseBits, policy_cost: float = 0.0
    ) -> EvalReport:
        """Figures of a detector on a split."""
        measured = self.measure(detector, loader, choose_bits, self.config.reward.quality)
        return report_of_all(measured, policy_cost, self.class_names)

    def annotations(self, roots: Sequence[str], split: str) -> list[Annotation]:
        """What is annotated in a split of `roots`, read once."""
        key = (*roots, split)
        if key not in self._annotations:
            self._annotations[key] = read_split(roots, split, self.class_names)
        return self._annotations[key]

    def train_image_ids(self) -> list[str]:
        """Ids of the training images, in their order."""
        data = self.config.data
        return [annotation.image_id for annotation in self.annotations(data.roots, data.train_split)]

    @property
    def _eval_transform(self) -> SampleTransform:
        return eval_transform(self.config.detector.image_size)

    def _check_policy_share(self, key: str, batch_size: int, part: TrainPart) -> None:
        share, images = self.config.data.policy_share, len(self._train_indices(part))
        if batch_size > images:
            raise InputError(
                f"data.policy_share: {share:g} leaves the {part} {images} training images, fewer than "
                f"{key} = {batch_size}"
            )

    def _train_indices(self, part: TrainPart) -> list[int]:
        """Which images of the train split the detector is trained on, or the policy learns from.

        All of them for both, or, where `data.policy_share` is not 0, that share drawn from the seed for the policy and
        the others for the detector.
        """
        data = self.config.data
        images = len(self.annotations(data.roots, data.train_split))
        if not data.policy_share:
            return list(range(images))
        order = torch.randperm(images, generator=generator(self.config.seed, "policy share")).tolist()
        held_out = round(data.policy_share * images)
        return sorted(order[:held_out] if part == "policy" else order[held_out:])

    def _train_dataset(self, part: TrainPart, transform: SampleTransform, stage: str) -> DetectionDataset:
        data, indices = self.config.data, self._train_indices(part)
        annotations = self.annotations(data.roots, data.train_split)
        if data.cache == "ram" and self._images is None:
            self._images = load_images(annotations, CACHED_SIDE * self.config.detector.image_size)
        return DetectionDataset(
            [annotations[index] for index in indices],
            transform,
            seed=derived_seed(self.config.seed, stage, "pixels"),
            images=None if self._images is None else [self._images[index] for index in indices],
        )

    def _dataset(self, roots: list[str], split: str, transform: SampleTransform, stage: str) -> DetectionDataset:
        """A whole split, from its files."""
        seed = derived_seed(self.config.seed, stage, "pixels")
        return DetectionDataset(self.annotations(roots, split), transform, seed=seed)

    def _loader(self, dataset: DetectionDataset, batch_size: int, stage: str, *, training: bool) -> DetectionLoader:
        workers = self.config.data.workers
        return make_loader(
            dataset,
            batch_size,
            shuffle=training,
            seed=derived_seed(self.config.seed, stage, "order"),
            workers=_workers_per_process() if workers < 0 else workers,
            drop_last=training,
            share=(distributed.rank() if world_size() > 1 else 0, world_size()),  # all of it under `ranks.alone`
        )


def detector_bits(config: Config) -> DetectorBits:
    """The bits of the config as the detector takes them."""
    return DetectorBits(**{item.name: getattr(config.bits, item.name) for item in fields(config.bits)})


def finished_checkpoint(run: Path, stage: str, settings: TrainConfig, script: str) -> Path:
    """The checkpoint of a stage that has run to its end.

    Raises: InputError if it has not begun or not ended.
    """
    path = best_checkpoint(run, stage)
    if not path.exists():
        raise InputError(f"{run / stage}: no checkpoint; run {script} first, or name a checkpoint with --init")
    epoch = load_checkpoint(run / stage / "last.pt")["epoch"]
    if epoch < settings.epochs:
        raise InputError(
            f"{run / stage}: at epoch {epoch} of {settings.epochs}; repeat {script} to finish it, or give the options "
            f"here that it was trained with"
        )
    return path


def check_search(config: Config, source: Path) -> None:
    """Raises InputError if the search behind a checkpoint trained the detector and that of the config does not, or the
    other way round: rivals are trained as long as the adaptive detector.
    """
    searched = load_checkpoint(source).get("config", {}).get("search", {}).get("train_detector", True)
    if searched != config.search.train_detector:
        raise InputError(
            f"search.train_detector: {str(searched).lower()} in the search of {source}, here "
            f"{str(config.search.train_detector).lower()}; give it as it was"
        )


def teacher_checkpoint(command: Command, stage: str, settings: QuantTrainConfig) -> Path | None:
    """The checkpoint of the run's full-precision training where a stage distills from it, else None.

    Raises: InputError if it does and there is none, or as `finished_checkpoint`.
    """
    if not settings.distill_weight:
        return None
    path = best_checkpoint(command.run, "pretrain_fp32")
    if not path.exists():
        raise InputError(f"{stage}.distill_weight: needs the run's full-precision network, but {path} is missing")
    return finished_checkpoint(command.run, "pretrain_fp32", command.config.pretrain_fp32, "pretrain.py")


def pretrained_checkpoint(command: Command) -> Path:
    """The checkpoint of the quantized pretraining.

    Raises: InputError as `finished_checkpoint`.
    """
    return finished_checkpoint(command.run, "pretrain_quant", command.config.pretrain_quant, "pretrain.py")


def has_policy(run: Path) -> bool:
    """Whether a run has a checkpoint with a policy."""
    return any(best_checkpoint(run, stage).exists() for stage in POLICY_STAGES)


def latest_policy_checkpoint(command: Command) -> Path:
    """The checkpoint of the finetuning, of the search if that has not begun.

    Raises: InputError as `finished_checkpoint`.
    """
    config = command.config
    if best_checkpoint(command.run, "finetune").exists():
        return finished_checkpoint(command.run, "finetune", config.finetune, "finetune.py")
    return finished_checkpoint(command.run, "search", config.search, "search.py")


def check_held_out(experiment: Experiment, path: Path) -> None:
    """Raises InputError if the detector of a checkpoint was trained on images that are held out here for the policy."""
    if not experiment.config.data.policy_share:
        return
    state = load_checkpoint(path)
    try:
        old = completed(state["config"], ("seed", "data"))
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path}: of another version of this program ({error})") from error
    before, now = (
        {"seed": plain["seed"], "data": {key: plain["data"][key] for key in ("roots", "train_split", "policy_share")}}
        for plain in (old, experiment.plain)
    )
    if changed := differences(before, now):
        raise InputError(f"{path}: may have been trained on images that are held out here ({'; '.join(changed)})")


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
    kind = kind_of(state["stage"])
    if kind not in stages:
        raise InputError(f"{path}: a checkpoint of stage {state['stage']}; needed here: {' or '.join(stages)}")
    sections = NETWORK_SECTIONS[kind]
    try:
        changed = differences(
            {**completed(state["config"], sections), "classes": state["classes"]},
            {**{section: experiment.plain[section] for section in sections}, "classes": list(experiment.class_names)},
        )
        if changed:
            raise InputError(f"trained with other settings: {'; '.join(changed)}")
        network.load_state_dict(state["networks"][name])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{path}: of another version of this program ({first_line})") from error


def _workers_per_process() -> int:
    return max(1, min(MOST_WORKERS, available_cpus() // distributed.processes_of_machine()))


def _batch(dataset: DetectionDataset, indices: Iterable[int]) -> Batch:
    return collate([dataset[SampleKey(0, index)] for index in indices])
