"""Batches of images and padded targets, the same for any number of worker processes.

The augmentation of a sample is seeded by (seed, epoch, index). The batch sampler sends epoch and index to the workers,
so workers have no random state of their own, and a resumed run gets the same pixels as an uninterrupted one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from instaqnas.data.transforms import Sample, SampleTransform
from instaqnas.data.voc import Annotation, read_pixels
from instaqnas.errors import InputError, warn_once
from instaqnas.seeds import SampleKey, derived_seed


@dataclass(frozen=True, eq=False)
class Batch:
    """B images and their objects, padded to the largest number N of any image.

    Args:
        images: uint8 [B, 3, S, S], RGB.
        boxes_xyxy: float32 [B, N, 4], pixels of the resized image.
        labels: int64 [B, N], 0 is padding.
        difficult: bool [B, N].
        image_ids: B ids.
        keys: B keys, which random bit configurations are drawn from.
    """

    images: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    difficult: Tensor
    image_ids: list[str]
    keys: list[SampleKey]

    @property
    def objects(self) -> Tensor:
        """Number of objects of each image, int64 [B]."""
        return (self.labels > 0).sum(1)

    @property
    def smallest_side(self) -> Tensor:
        """Shortest box side in each image, float32 [B], in pixels of the resized image; NaN without objects."""
        sides = (self.boxes_xyxy[..., 2:] - self.boxes_xyxy[..., :2]).amin(-1).masked_fill(self.labels == 0, torch.inf)
        smallest = F.pad(sides, (0, 1), value=torch.inf).amin(1)  # one more column, as amin fails for N = 0
        return smallest.masked_fill(smallest.isinf(), torch.nan)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def first(self, count: int) -> Batch:
        """The first `count` images, at most B."""
        return self._rows(slice(count))

    def split(self, parts: int) -> list[Batch]:
        """`parts` consecutive equal parts of the batch."""
        size = len(self.image_ids) // parts
        return [self._rows(slice(start, start + size)) for start in range(0, len(self.image_ids), size)]

    def _rows(self, rows: slice) -> Batch:
        return Batch(
            self.images[rows],
            self.boxes_xyxy[rows],
            self.labels[rows],
            self.difficult[rows],
            self.image_ids[rows],
            self.keys[rows],
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=function(self.images),
            boxes_xyxy=function(self.boxes_xyxy),
            labels=function(self.labels),
            difficult=function(self.difficult),
        )


class DetectionDataset(Dataset[Sample]):
    """Samples of annotated images, addressed by `SampleKey`.

    Args:
        annotations: from `read_split`.
        transform: `train_transform`, `flip_transform` or `eval_transform`.
        seed: of the transform's random numbers.
        images: the pixels of all annotations, from `load_images`; None to decode an image whenever it is needed.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        transform: SampleTransform,
        *,
        seed: int = 0,
        images: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.images = images

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The transformed sample, with `image_id` and `key`.

        Raises:
            InputError: the image cannot be read, or the annotation gives another size.
        """
        annotation = self.annotations[key.index]
        pixels = read_pixels(annotation) if self.images is None else self.images[key.index]
        sample = _sample(annotation, pixels)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed CUDA's generator, which fork_rng does not restore here.
            torch.default_generator.manual_seed(derived_seed(self.seed, key.epoch, key.index))
            sample = self.transform(sample)
        return {**sample, "image_id": annotation.image_id, "key": key}


def load_images(annotations: Sequence[Annotation], side: int) -> list[np.ndarray]:
    """The pixels of all images, uint8 [h, w, 3], shrunk so that the shorter side has at most `side` pixels.

    Load them before worker processes are started, which then share the memory.

    Raises:
        InputError: as `DetectionDataset.__getitem__`.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda annotation: _shrunk(read_pixels(annotation), side), annotations))


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Batches of `SampleKey`s. The order of an epoch depends only on `seed` and the epoch.

    Args:
        n: samples in the dataset.
        batch_size: samples per batch.
        seed: of the order.
        shuffle: False keeps the order of the dataset.
        drop_last: drop an incomplete last batch, unless it is the only one.
        share: (rank, number of processes); a process gets the samples rank, rank + processes, ... of each batch.
    """

    def __init__(
        self, n: int, batch_size: int, *, seed: int, shuffle: bool, drop_last: bool, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.share = share
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Sets the epoch of the next iteration, and its first batch."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        full, rest = divmod(self.n, self.batch_size)
        return full + (rest > 0 and not (self.drop_last and full > 0))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self._order()
        rank, processes = self.share
        for batch in range(self.first_batch, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            keys = [SampleKey(self.epoch, index, place) for place, index in enumerate(indices)]
            own = keys[rank::processes]
            if own:
                yield own

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.n))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        return torch.randperm(self.n, generator=generator).tolist()


class DetectionLoader(DataLoader[Sample]):
    """A DataLoader of `Batch`es whose epoch can be set.

    An `InputError` of a worker is one line, and a warning of several workers comes once, from this process.
    """

    dataset: DetectionDataset
    batch_sampler: EpochBatchSampler

    @property
    def annotations(self) -> Sequence[Annotation]:
        """Annotations of the dataset, in its order."""
        return self.dataset.annotations

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Sets the epoch of the next iteration, which determines its order and its augmentation.

        The iteration starts at batch `first_batch`, without reading the batches before it. `len` remains the number of
        batches of a whole epoch.
        """
        self.batch_sampler.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, so that errors pass through it
        try:
            for item in super().__iter__():
                for text in item.warnings:
                    warn_once(text)
                yield item.batch
        except InputError as error:
            # The message of an error in a worker is a traceback, whose last line has the original message.
            last_line = str(error).strip().splitlines()[-1]
            prefix = f"{InputError.__module__}.{InputError.__qualname__}: "
            raise InputError(last_line.removeprefix(prefix)) from None


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples of a `DetectionDataset`."""
    return Batch(
        # A decoded image is channels-last in memory, an augmented one is not; the network gets one layout.
        torch.stack([s["image"] for s in samples]).contiguous(),
        pad_sequence([s["boxes"] for s in samples], batch_first=True),
        pad_sequence([s["labels"] for s in samples], batch_first=True),
        pad_sequence([s["difficult"] for s in samples], batch_first=True),
        [s["image_id"] for s in samples],
        [s["key"] for s in samples],
    )


class _Item(NamedTuple):
    """A batch, and the warnings that came up in its worker meanwhile."""

    batch: Batch
    warnings: list[str]


_worker_warnings: list[str] = []  # of this worker, since its last batch; without workers, warnings come at once


def _collate_with_warnings(samples: Sequence[Sample]) -> _Item:
    texts = list(_worker_warnings)
    _worker_warnings.clear()
    return _Item(collate(samples), texts)


def make_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    workers: int,
    drop_last: bool = False,
    share: tuple[int, int] = (0, 1),
) -> DetectionLoader:
    """A loader of `Batch`es; call its `set_epoch` before each epoch.

    Args:
        dataset: the samples.
        batch_size: images per batch of all processes together.
        shuffle: draw a new order in each epoch.
        seed: of the order.
        workers: processes that decode and augment; 0 to do it in this process.
        drop_last: drop an incomplete last batch, unless it is the only one. Needed in training, because BatchNorm
            cannot train on a single image with a 1 x 1 map.
        share: (rank, number of processes); the loader reads the share of this rank of every batch.
    """
    sampler = EpochBatchSampler(len(dataset), batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last, share=share)
    return DetectionLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate_with_warnings,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_worker,
        persistent_workers=workers > 0,
        # Unused, but without it the loader would draw from the default generator, how often depending on `workers`.
        generator=torch.Generator(),
    )


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    factor = side / min(pixels.shape[:2])
    return pixels if factor >= 1 else cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def _sample(annotation: Annotation, pixels: np.ndarray) -> Sample:
    height, width = pixels.shape[:2]
    scale = np.array([width / annotation.width, height / annotation.height] * 2, np.float32)
    return {
        "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(annotation.boxes_xyxy * scale), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.tensor(annotation.labels),
        "difficult": torch.tensor(annotation.difficult),
    }


def _prepare_worker(_worker: int) -> None:
    # PyTorch limits only its own threads in workers, and OpenCV's thread pool would not survive the fork.
    cv2.setNumThreads(0)
    warnings.showwarning = lambda message, *_, **__: _worker_warnings.append(str(message))
