"""Builds the parts that a config describes: networks, loaders, and ways to choose bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch

from instaqnas import distributed
from instaqnas.config.reading import to_plain
from instaqnas.config.settings import Config
from instaqnas.cpus import available_cpus
from instaqnas.data.loader import Batch, DetectionDataset, DetectionLoader, collate, load_images, make_loader
from instaqnas.data.transforms import SampleTransform, eval_transform, flip_transform, train_transform
from instaqnas.data.voc import Annotation, read_class_names, read_split
from instaqnas.detector.mobilenet import stem_channels
from instaqnas.detector.ssd import LAYERS, DetectorBits, SwitchableSSD, position_count
from instaqnas.errors import InputError
from instaqnas.policy.bit_config import ChooseBits, Draw, fixed, sandwich, uniformly_random
from instaqnas.policy.network import PolicyNet, effort_of
from instaqnas.seeds import SampleKey, derived_seed, generator, uniform_numbers

TrainPart = Literal["detector", "policy"]  # who learns from a part of the train split
CALIBRATION_IMAGES = 64
CACHED_SIDE = 2  # shorter side of a cached image, as a multiple of the network's input
PICTURES = 4
MOST_WORKERS = 8  # per process; more do not speed up one GPU


class Experiment:
    """Builds the parts that a config describes.

    Args:
        config: the whole config.
        class_names: without background; None reads them from the data.

    Raises: InputError if the data or the device is missing.
    """

    def __init__(self, config: Config, class_names: Sequence[str] | None = None) -> None:
        self.config, self.plain = config, to_plain(config)
        self.device = _device_named(config.device)
        self.class_names = read_class_names(config.data.roots) if class_names is None else tuple(class_names)
        self._annotations: dict[tuple[str, ...], list[Annotation]] = {}
        self._images: list[np.ndarray] | None = None  # of the whole train split

    def detector(self, bits: DetectorBits) -> SwitchableSSD:
        """A new detector on the device, its weights drawn from the seed."""
        settings = self.config.detector
        # Quantized layers choose their own layout.
        channels_last = self.config.runtime.channels_last and bits.quantize_nothing
        torch.manual_seed(derived_seed(self.config.seed, "detector"))
        detector = SwitchableSSD(
            len(self.class_names) + 1,
            bits,
            image_size=settings.image_size,
            width=settings.width,
            extras_batch_norm=settings.extras_batch_norm,
            box_sizes=settings.box_sizes,
            min_negatives=settings.min_negatives,
            amp=self.config.runtime.amp,
        ).to(self.device)
        return detector.to(memory_format=torch.channels_last) if channels_last else detector

    def quantized_detector(self) -> SwitchableSSD:
        """A new detector with the bit choices of the config."""
        return self.detector(detector_bits(self.config))

    def adaptive_detector(self) -> SwitchableSSD:
        """A new quantized detector under a policy; its stem is frozen if the policy reads the features of the stem."""
        detector = self.quantized_detector()
        if self.config.policy.input == "stem":
            detector.freeze_stem()
        return detector

    def policy(self) -> PolicyNet:
        """A new policy network on the device, its weights drawn from the seed."""
        settings = self.config.policy
        torch.manual_seed(derived_seed(self.config.seed, "policy"))
        policy = PolicyNet(
            position_count(self.config.bits.positions),
            len(self.config.bits.names),
            pool=settings.pool,
            width=settings.width,
            bits=settings.bits,
            stem_channels=stem_channels(self.config.detector.width) if settings.input == "stem" else None,
            effort=effort_of(detector_bits(self.config).bit_products) if settings.effort else None,
        )
        return policy.to(self.device)

    def train_loader(self, batch_size: int, stage: str) -> DetectionLoader:
        """Augmented training images of the detector, shuffled; order and augmentation differ by stage."""
        data = self.config.data
        build = train_transform if data.augmentation == "ssd" else flip_transform
        transform = build(self.config.detector.image_size, vertical_flip=data.vertical_flip)
        return self._loader(self._train_dataset("detector", transform, stage), batch_size, stage, training=True)

    def policy_loader(self, batch_size: int, stage: str) -> DetectionLoader:
        """Training images of the policy, without augmentation, shuffled."""
        dataset = self._train_dataset("policy", self._eval_transform, stage)
        return self._loader(dataset, batch_size, stage, training=True)

    def policy_images(self) -> DetectionLoader:
        """Training images of the policy, without augmentation, in order."""
        dataset = self._train_dataset("policy", self._eval_transform, "survey")
        return self._loader(dataset, self.config.eval.batch_size, "survey", training=False)

    def eval_loader(self, split: str, roots: list[str]) -> DetectionLoader:
        """All images of a split, in order."""
        dataset = self._dataset(roots, split, self._eval_transform, "eval")
        return self._loader(dataset, self.config.eval.batch_size, "eval", training=False)

    def val_loader(self) -> DetectionLoader | None:
        """The val split; None if the config has none."""
        data = self.config.data
        return self.eval_loader(data.val_split, data.roots) if data.val_split else None

    def test_loader(self) -> DetectionLoader:
        """The test split."""
        data = self.config.data
        return self.eval_loader(data.test_split, data.test_roots or data.roots)

    def loader_of(self, split: str) -> DetectionLoader:
        """A split by its name: the test split from `data.test_roots`, any other from `data.roots`."""
        if split == self.config.data.test_split:
            return self.test_loader()
        return self.eval_loader(split, self.config.data.roots)

    @property
    def tuning_split(self) -> str:
        """Name of the split on which fixed bit configurations are chosen: the val split, or else the train split."""
        return self.config.data.val_split or self.config.data.train_split

    def tuning_loader(self) -> DetectionLoader:
        """All images of `tuning_split`, in order."""
        return self.eval_loader(self.tuning_split, self.config.data.roots)

    def calibration_batch(self) -> Batch:
        """Random training images of the detector, for the first step sizes."""
        dataset = self._train_dataset("detector", self._eval_transform, "calibration")
        order = torch.randperm(len(dataset), generator=generator(self.config.seed, "calibration"))
        return _batch(dataset, order[:CALIBRATION_IMAGES].tolist()).to(self.device)

    def picture_batch(self) -> Batch:
        """The first images of the val split, or else of the train split, for pictures."""
        data = self.config.data
        dataset = self._dataset(data.roots, data.val_split or data.train_split, self._eval_transform, "pictures")
        return _batch(dataset, range(min(PICTURES, len(dataset)))).to(self.device)

    def draw(self, *purpose: int | str) -> Draw:
        """Uniform random numbers [B, L] for the images of a batch; each purpose has its own."""
        positions = position_count(self.config.bits.positions)
        return lambda keys: uniform_numbers(keys, positions, self.config.seed, *purpose)

    def choose_random(self, *purpose: int | str) -> ChooseBits:
        """Uniformly random configurations; each purpose has its own."""
        return uniformly_random(len(self.config.bits.names), self.draw(*purpose))

    def choose_sandwich(self, *purpose: int | str) -> ChooseBits:
        """The cheapest, the most expensive and random configurations by turns; each purpose has its own."""
        return sandwich(detector_bits(self.config).bit_products, self.draw(*purpose))

    def choose_fixed(self, detector: SwitchableSSD, choice: int = 0) -> ChooseBits:
        """One choice at every position of `detector`, for every image."""
        return fixed([choice] * len(detector.positions))

    def annotations(self, roots: Sequence[str], split: str) -> list[Annotation]:
        """Annotations of a split of `roots`, read once."""
        key = (*roots, split)
        if key not in self._annotations:
            self._annotations[key] = read_split(roots, split, self.class_names, self.config.data.orientation)
        return self._annotations[key]

    def tuning_annotations(self) -> list[Annotation]:
        """Annotations of `tuning_split`."""
        return self.annotations(self.config.data.roots, self.tuning_split)

    def train_images(self) -> dict[str, Any]:
        """Number of the annotated training images, and `images_digest` of their annotations, as plain values."""
        data = self.config.data
        annotations = self.annotations(data.roots, data.train_split)
        return {"count": len(annotations), "annotations": self.images_digest(annotations)}

    @staticmethod
    def images_digest(annotations: Sequence[Annotation]) -> str:
        """SHA-256 of ids, sizes and objects: equal for the same images in another folder. Pixels are not read."""
        digest = hashlib.sha256()
        for a in annotations:
            objects = [a.boxes_xyxy.tolist(), a.labels.tolist(), a.difficult.tolist()]
            digest.update(repr((a.image_id, a.width, a.height, objects)).encode())
        return digest.hexdigest()

    def train_indices(self, part: TrainPart) -> list[int]:
        """Indices of the images of the train split that the detector is trained on, or that the policy learns from.

        Both get all images, or, where `data.policy_share` is not 0, the policy gets that share, drawn from the seed,
        and the detector the others.
        """
        data = self.config.data
        images = len(self.annotations(data.roots, data.train_split))
        if not data.policy_share:
            return list(range(images))
        order = torch.randperm(images, generator=generator(self.config.seed, "policy share")).tolist()
        held_out = round(data.policy_share * images)
        return sorted(order[:held_out] if part == "policy" else order[held_out:])

    @property
    def _eval_transform(self) -> SampleTransform:
        return eval_transform(self.config.detector.image_size)

    def _train_dataset(self, part: TrainPart, transform: SampleTransform, stage: str) -> DetectionDataset:
        data, indices = self.config.data, self.train_indices(part)
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
        processes = distributed.world_size()  # 1 under `distributed.alone`
        return make_loader(
            dataset,
            batch_size,
            shuffle=training,
            seed=derived_seed(self.config.seed, stage, "order"),
            workers=_workers_per_process() if workers < 0 else workers,
            drop_last=training,
            share=(distributed.rank() if processes > 1 else 0, processes),
        )


def detector_bits(config: Config) -> DetectorBits:
    """The section `bits` as the argument of `SwitchableSSD`.

    Raises: InputError if its levels are of a detector with more or fewer layers.
    """
    if config.bits.levels is not None and len(config.bits.levels[0]) != LAYERS:
        raise InputError(f"bits.levels: expected {LAYERS} layers, got {len(config.bits.levels[0])}")
    return DetectorBits(**{item.name: getattr(config.bits, item.name) for item in fields(config.bits)})


def _device_named(name: str) -> torch.device:
    """The device of a config's `device`, which becomes CUDA's current one if it names a GPU by number.

    Raises: InputError if this machine does not have it, or several processes would share it.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: {name} is not available on this machine; known: auto, cpu")
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.index is not None:
        if distributed.world_size() > 1:
            raise InputError(f"device: {name} is for one process; several processes take a GPU each, with device: cuda")
        if device.index >= torch.cuda.device_count():
            raise InputError(f"device: {name} is not available; this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return device


def _workers_per_process() -> int:
    return max(1, min(MOST_WORKERS, available_cpus() // distributed.processes_of_machine()))


def _batch(dataset: DetectionDataset, indices: Iterable[int]) -> Batch:
    return collate([dataset[SampleKey(0, index)] for index in indices])
