"""How the train split is shared between detector and policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instaqnas import distributed
from instaqnas.data.loader import DetectionLoader
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError
from instaqnas.experiment.checks import check_batches
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import PRETRAIN_FP32, SEARCH

IMAGES = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("share") / "shapes"
    generate_shapes(root, {"train": IMAGES}, image_size=64)
    return root


@pytest.fixture
def build(root: Path, make_command, tmp_path: Path):
    def build(*options: str) -> Experiment:
        return Experiment(make_command("search", tmp_path, f"--data.roots=[{root}]", *options).config)

    return build


def ids(loader: DetectionLoader, epoch: int = 0) -> set[str]:
    loader.set_epoch(epoch)
    found = [image_id for batch in loader for image_id in batch.image_ids]
    assert len(set(found)) == len(found)
    return set(found)


ALL = {f"train_{index:06d}" for index in range(IMAGES)}


def test_without_a_share_both_have_the_whole_split(build) -> None:
    experiment = build()
    assert ids(experiment.train_loader(4, "search")) == ids(experiment.policy_loader(4, "policy")) == ALL
    assert ids(experiment.policy_images()) == ALL
    assert set(experiment.calibration_batch().image_ids) == ALL


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_detector_and_policy_have_no_image_in_common(build, cache: str) -> None:
    experiment = build("--data.policy_share=0.4", f"--data.cache={cache}")
    of_detector, of_policy = ids(experiment.train_loader(4, "search")), ids(experiment.policy_loader(4, "policy"))
    assert len(of_policy) == 8
    assert of_detector == ALL - of_policy
    assert ids(experiment.policy_images()) == of_policy
    assert set(experiment.calibration_batch().image_ids) == of_detector
    for stage in ("pretrain_fp32", "pretrain_quant", "finetune"):
        assert ids(experiment.train_loader(4, stage), epoch=3) == of_detector


def test_cached_images_are_those_of_their_annotations(build) -> None:
    plain, cached = (build("--data.policy_share=0.4", f"--data.cache={cache}") for cache in ("none", "ram"))
    for batch, other in zip(plain.policy_images(), cached.policy_images(), strict=True):
        assert batch.image_ids == other.image_ids
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.boxes_xyxy, other.boxes_xyxy)


def test_the_share_is_drawn_once_from_the_seed(build) -> None:
    drawn = [ids(build("--data.policy_share=0.4", f"--seed={seed}").policy_images()) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_processes_share_the_policys_images(build, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build("--data.policy_share=0.4")
    whole, parts = ids(experiment.policy_images()), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(ids(experiment.policy_images()))
        assert len(ids(experiment.policy_loader(4, "policy"))) == 4  # of its two batches of four
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--data.policy_share=0.1",),
            "0.1 leaves the policy 2 training images, fewer than search.policy_batch_size = 4",
        ),
        (
            ("--data.policy_share=0.01",),
            "0.01 leaves the policy 0 training images, fewer than search.policy_batch_size = 4",
        ),
        (
            ("--data.policy_share=0.85",),
            "0.85 leaves the detector 3 training images, fewer than pretrain_fp32.batch_size = 4",
        ),
    ],
)
def test_a_part_smaller_than_its_batch_is_refused_in_every_stage(build, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        check_batches(build(*options), [PRETRAIN_FP32])
    assert str(error.value) == f"data.policy_share: {message}"


def test_parts_as_large_as_their_batches_are_enough(build) -> None:
    experiment = build("--data.policy_share=0.2", "--search.batch_size=16")
    check_batches(experiment, [SEARCH])


def test_a_gpu_that_the_machine_does_not_have_is_refused(build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="^device: cuda:1 is not available on this machine; known: auto, cpu$"):
        build("--device=cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="^device: cuda:1 is not available; this machine has 1 GPUs$"):
        build("--device=cuda:1")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match="^device: cuda:1 is for one process"):
        build("--device=cuda:1")
