from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from instaqnas.data.loader import Batch, DetectionDataset, EpochBatchSampler, collate, load_images, make_loader
from instaqnas.data.transforms import eval_transform, train_transform
from instaqnas.data.voc import Annotation
from instaqnas.errors import InputError
from instaqnas.seeds import SampleKey


def make_annotations(folder: Path, count: int) -> list[Annotation]:
    """Images of noise; image i has i % 3 objects."""
    rng = np.random.default_rng(0)
    annotations = []
    for i in range(count):
        path = folder / f"{i}.jpg"
        cv2.imwrite(str(path), rng.integers(0, 256, (60, 80, 3), np.uint8))
        n = i % 3
        boxes = np.tile(np.float32([10, 10, 60, 50]), (n, 1))
        annotations.append(Annotation(f"id{i}", path, boxes, np.full(n, 2), np.zeros(n, bool), 80, 60))
    return annotations


@pytest.fixture
def annotations(tmp_path) -> list[Annotation]:
    return make_annotations(tmp_path, 7)


@pytest.fixture
def dataset(annotations) -> DetectionDataset:
    return DetectionDataset(annotations, train_transform(32, vertical_flip=True), seed=3)


def read_epoch(loader, epoch: int) -> list[Batch]:
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert (batch.image_ids, batch.keys) == (other.image_ids, other.keys)
        for name in ("images", "boxes_xyxy", "labels", "difficult"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


def test_batches_do_not_depend_on_the_number_of_workers(dataset):
    alone = make_loader(dataset, 3, shuffle=True, seed=5, workers=0)
    helped = make_loader(dataset, 3, shuffle=True, seed=5, workers=2)
    for epoch in (0, 1):
        assert_same(read_epoch(alone, epoch), read_epoch(helped, epoch))


def test_cached_images_give_the_batches_of_images_read_each_time(annotations, dataset):
    cached = DetectionDataset(
        annotations, train_transform(32, vertical_flip=True), seed=3, images=load_images(annotations, 64)
    )
    for annotation in annotations:  # they have been read
        annotation.image_path.unlink()
    loader = make_loader(cached, 3, shuffle=True, seed=5, workers=2)
    first = [read_epoch(loader, epoch) for epoch in (0, 1)]
    again = [read_epoch(make_loader(cached, 3, shuffle=True, seed=5, workers=0), epoch) for epoch in (0, 1)]
    for batches, others in zip(first, again, strict=True):
        assert_same(batches, others)


def test_small_cached_images_equal_images_read_each_time(annotations, dataset):
    cached = DetectionDataset(
        annotations, train_transform(32, vertical_flip=True), seed=3, images=load_images(annotations, 60)
    )
    for index in range(len(annotations)):
        assert torch.equal(cached[SampleKey(1, index)]["image"], dataset[SampleKey(1, index)]["image"])
        assert torch.equal(cached[SampleKey(1, index)]["boxes"], dataset[SampleKey(1, index)]["boxes"])


def test_larger_cached_images_are_shrunk_and_their_boxes_with_them(annotations):
    def keep(sample: dict) -> dict:
        return sample

    cached = DetectionDataset(annotations, keep, images=load_images(annotations, 30))
    sample = cached[SampleKey(0, 2)]
    assert sample["image"].shape == (3, 30, 40)
    assert sample["boxes"].tolist() == [[5, 5, 30, 25]] * 2


def test_a_later_epoch_can_be_read_without_the_earlier_ones(dataset):
    loader = make_loader(dataset, 3, shuffle=True, seed=5, workers=0)
    read_epoch(loader, 0)
    fresh = make_loader(dataset, 3, shuffle=True, seed=5, workers=0)
    assert_same(read_epoch(loader, 1), read_epoch(fresh, 1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_can_begin_at_any_batch(dataset, workers, first):
    loader = make_loader(dataset, 3, shuffle=True, seed=5, workers=workers)
    whole = read_epoch(loader, 1)
    loader.set_epoch(1, first_batch=first)
    assert_same(list(loader), whole[first:])
    assert len(loader) == 3
    assert_same(read_epoch(loader, 1), whole)


def test_the_batches_before_the_first_are_not_read(annotations):
    read = []
    dataset = DetectionDataset(annotations, lambda sample: read.append(1) or eval_transform(32)(sample))
    loader = make_loader(dataset, 3, shuffle=True, seed=5, workers=0)
    loader.set_epoch(1, first_batch=2)
    assert len(list(loader)) == len(read) == 1


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_every_batch_and_read_each_image_once(dataset, processes):
    whole = read_epoch(make_loader(dataset, 3, shuffle=True, seed=5, workers=0), 1)
    shares = [
        read_epoch(make_loader(dataset, 3, shuffle=True, seed=5, workers=0, share=(rank, processes)), 1)
        for rank in range(processes)
    ]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares if number < len(share)]
        sizes = [len(part.keys) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        images = {key: image for part in parts for key, image in zip(part.keys, part.images, strict=True)}
        assert sum(sizes) == len(images)
        assert list(sorted(images, key=lambda key: key.place)) == batch.keys
        assert all(torch.equal(images[key], image) for key, image in zip(batch.keys, batch.images, strict=True))


def test_a_batch_splits_into_equal_parts_in_order(dataset):
    batch = collate([dataset[SampleKey(0, i, i)] for i in range(6)])
    parts = batch.split(3)
    assert [part.image_ids for part in parts] == [["id0", "id1"], ["id2", "id3"], ["id4", "id5"]]
    assert [part.keys[0].place for part in parts] == [0, 2, 4]
    for name in ("images", "boxes_xyxy", "labels", "difficult"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_pixels_differ_between_epochs_seeds_and_indices_of_the_same_image(annotations):
    transform = train_transform(32, vertical_flip=True)
    twice = [annotations[2], annotations[2]]
    dataset, other_seed = (DetectionDataset(twice, transform, seed=seed) for seed in (0, 1))
    images = [dataset[SampleKey(0, 0)], dataset[SampleKey(1, 0)], dataset[SampleKey(0, 1)], other_seed[SampleKey(0, 0)]]
    for i, first in enumerate(images):
        for second in images[i + 1 :]:
            assert not torch.equal(first["image"], second["image"])
    assert torch.equal(dataset[SampleKey(0, 0)]["image"], images[0]["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_of_the_process_alone(dataset, workers):
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    read_epoch(make_loader(dataset, 3, shuffle=True, seed=0, workers=workers), 0)
    assert torch.equal(torch.get_rng_state(), expected)


def test_loading_does_not_reseed_accelerators(dataset, monkeypatch):
    def refuse(seed: int) -> None:
        raise AssertionError(f"CUDA was seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    assert dataset[SampleKey(0, 2)]["image"].shape == (3, 32, 32)


def test_loading_does_not_depend_on_the_random_state_of_the_process(dataset):
    torch.manual_seed(1)
    first = dataset[SampleKey(0, 2)]["image"]
    torch.manual_seed(2)
    assert torch.equal(dataset[SampleKey(0, 2)]["image"], first)


def test_the_dataset_can_be_sent_to_another_process(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[SampleKey(0, 2)]["image"], dataset[SampleKey(0, 2)]["image"])


def test_evaluation_reads_all_images_in_order_with_all_objects(annotations):
    annotations[2].difficult[1] = True
    loader = make_loader(DetectionDataset(annotations, eval_transform(40)), 3, shuffle=False, seed=0, workers=0)
    batches = list(loader)
    assert len(loader) == 3
    assert [batch.keys for batch in batches] == [
        [SampleKey(0, 0, 0), SampleKey(0, 1, 1), SampleKey(0, 2, 2)],
        [SampleKey(0, 3, 0), SampleKey(0, 4, 1), SampleKey(0, 5, 2)],
        [SampleKey(0, 6, 0)],
    ]
    assert [b.image_ids for b in batches] == [["id0", "id1", "id2"], ["id3", "id4", "id5"], ["id6"]]
    assert batches[0].image_ids == ["id0", "id1", "id2"]
    assert batches[0].labels.tolist() == [[0, 0], [2, 0], [2, 2]]
    assert batches[0].difficult.tolist() == [[False, False], [False, False], [False, True]]
    scaled = [5, 10 * 40 / 60, 30, 50 * 40 / 60]
    expected = torch.tensor([[[0.0] * 4, [0.0] * 4], [scaled, [0.0] * 4], [scaled, scaled]])
    torch.testing.assert_close(batches[0].boxes_xyxy, expected)
    assert batches[2].boxes_xyxy.shape == (1, 0, 4)
    assert batches[2].labels.shape == batches[2].difficult.shape == (1, 0)


def test_training_leaves_difficult_objects_out(annotations):
    annotations[2].difficult[:] = True
    dataset = DetectionDataset(annotations, train_transform(32, vertical_flip=False))
    assert dataset[SampleKey(0, 2)]["labels"].shape == (0,)
    assert len(dataset[SampleKey(0, 5)]["labels"]) > 0


def test_collate_has_the_documented_types_and_layout(dataset):
    batch = collate([dataset[SampleKey(0, i)] for i in range(4)])
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 32, 32), torch.uint8)
    assert batch.images.is_contiguous()
    assert batch.boxes_xyxy.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.difficult.dtype == torch.bool


def test_a_batch_moves_all_its_tensors(dataset):
    moved = collate([dataset[SampleKey(0, 2)]]).to("meta")
    tensors = (moved.images, moved.boxes_xyxy, moved.labels, moved.difficult)
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.image_ids, moved.keys) == (["id2"], [SampleKey(0, 2)])


@pytest.mark.parametrize(
    ("n", "drop_last", "sizes"),
    [
        (7, False, [3, 3, 1]),
        (7, True, [3, 3]),
        (6, True, [3, 3]),
        (2, True, [2]),
        (2, False, [2]),
    ],
)
def test_the_last_batch_is_dropped_on_request_unless_it_is_the_only_one(n, drop_last, sizes):
    sampler = EpochBatchSampler(n, 3, seed=0, shuffle=True, drop_last=drop_last)
    assert [len(keys) for keys in sampler] == sizes
    assert len(sampler) == len(sizes)


def test_every_epoch_has_its_own_order_of_all_samples():
    sampler = EpochBatchSampler(20, 6, seed=0, shuffle=True, drop_last=False)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        assert {key.epoch for key in keys} == {epoch}
        assert sorted(key.index for key in keys) == list(range(20))
        orders.append(tuple(key.index for key in keys))
    assert len(set(orders)) == 3
    other_seed = EpochBatchSampler(20, 20, seed=1, shuffle=True, drop_last=False)
    assert tuple(key.index for key in next(iter(other_seed))) != orders[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_reported_in_one_line(annotations, workers):
    annotations[1].image_path.write_bytes(b"broken")
    dataset = DetectionDataset(annotations, eval_transform(32))
    loader = make_loader(dataset, 2, shuffle=False, seed=0, workers=workers)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert str(caught.value) == f"{annotations[1].image_path}: not a readable image"


def test_an_image_of_another_size_than_its_annotation_is_an_error(annotations):
    path = annotations[0].image_path
    cv2.imwrite(str(path), np.zeros((80, 60, 3), np.uint8))
    with pytest.raises(InputError) as caught:
        DetectionDataset(annotations, eval_transform(32))[SampleKey(0, 0)]
    assert str(caught.value) == f"{path}: 60 x 80 pixels, but its annotation says 80 x 60"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_warning_of_any_worker_comes_once_for_all_loaders(annotations, workers):
    for annotation in annotations[3:]:  # with two workers, batches of the second one, then of both
        image = np.full((60, 80), 4000, np.uint16)
        annotation.image_path.write_bytes(cv2.imencode(".png", image)[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own
        for _ in range(2):
            dataset = DetectionDataset(annotations, eval_transform(32))
            assert len(list(make_loader(dataset, 1, shuffle=False, seed=0, workers=workers))) == 7
            with warnings.catch_warnings():  # as libraries do; it makes Python forget
                pass
    (told,) = [str(warning.message) for warning in caught]
    assert told.endswith("values of 16-bit images need 12 bits only, and are scaled from 0 to 4095")


# --- Objects of a batch -----------------------------------------------------------------------------------------------


def make_batch(boxes: list, labels: list) -> Batch:
    labels = torch.tensor(labels)
    keys = [SampleKey(0, index) for index in range(len(labels))]
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    return Batch(images, torch.tensor(boxes).view(*labels.shape, 4), labels, labels > 5, ["x"] * len(labels), keys)


def test_objects_and_the_smallest_side_leave_padding_out():
    boxes = [[[0.0, 0, 30, 20], [5, 5, 12, 60]], [[1, 1, 41, 9], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    batch = make_batch(boxes, [[1, 2], [3, 0], [0, 0]])
    assert batch.objects.tolist() == [2, 1, 0]
    assert batch.smallest_side.tolist() == pytest.approx([7, 8, float("nan")], nan_ok=True)


def test_a_batch_without_any_object_has_no_smallest_side():
    batch = make_batch([[], []], [[], []])
    assert batch.objects.tolist() == [0, 0]
    assert batch.smallest_side.isnan().tolist() == [True, True]
