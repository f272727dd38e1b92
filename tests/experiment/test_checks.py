"""What stops a stage before it trains: broken data, a disk that is too small."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import instaqnas.experiment.checks as checks
from instaqnas import distributed
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError
from instaqnas.experiment.checks import (
    check_batches,
    check_disk,
    checkpoint_bytes,
    disk_needed,
    quick_preflight,
    splits_of,
)
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import (
    EVAL,
    FINETUNE,
    PRETRAIN_FP32,
    PRETRAIN_QUANT,
    SEARCH,
    TRAINING_STAGES,
    Stage,
    stage_named,
)


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A data set that a test may harm."""
    generate_shapes(tmp_path / "shapes", {"train": 3, "val": 2, "test": 2}, image_size=64, seed=3)
    return tmp_path / "shapes"


def experiment(make_command, run: Path, *options: str) -> Experiment:
    return Experiment(make_command("search", run, *options).config)


def test_a_checkpoint_is_as_large_as_foretold(finished_run: Path, make_command) -> None:
    parts = experiment(make_command, finished_run)
    for stage in TRAINING_STAGES:
        real = (finished_run / stage.name / "last.pt").stat().st_size
        foretold = checkpoint_bytes(parts, stage)
        assert 0.6 * real < foretold < real, stage  # networks so small have more names than numbers


def test_averages_and_optimizers_count(finished_run: Path, make_command) -> None:
    def size(stage: Stage, *options: str) -> int:
        return checkpoint_bytes(experiment(make_command, finished_run, *options), stage)

    detector = size(FINETUNE, "--finetune.optimizer=sgd", "--finetune.ema_decay=0.5")
    # two networks and one momentum are as much as one network and two moments, but for the statistics of BatchNorm
    assert detector - size(FINETUNE) == pytest.approx(0, abs=0.05 * detector)
    assert size(FINETUNE, "--finetune.optimizer=sgd") < size(FINETUNE) < size(SEARCH)


def test_disk_needed_grows_with_the_files_and_shrinks_with_those_that_are_there(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    parts = experiment(make_command, tmp_path)
    one = checkpoint_bytes(parts, FINETUNE)
    assert disk_needed(parts, tmp_path, [FINETUNE]) == 3 * one  # the last, the best, and the one being written
    assert disk_needed(parts, tmp_path, [FINETUNE, EVAL]) == 3 * one
    kept = experiment(make_command, tmp_path, "--finetune.keep_checkpoints=4")
    assert disk_needed(kept, tmp_path, [FINETUNE]) == 7 * one
    without_val = experiment(make_command, tmp_path, "--data.val_split=")
    assert disk_needed(without_val, tmp_path, [FINETUNE]) == 2 * one
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "last.pt").write_bytes(bytes(one))
    assert disk_needed(parts, tmp_path, [FINETUNE]) == 2 * one
    assert disk_needed(parts, tmp_path, [FINETUNE], restart=True) == 3 * one  # what is there will be kept
    assert disk_needed(parts, tmp_path, TRAINING_STAGES) > disk_needed(parts, tmp_path, [FINETUNE]) + one


def test_a_disk_that_is_too_small_is_refused(make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "tiny"
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match=r"tiny: 0\.\d\d GB of disk are needed for checkpoints, 0\.00 GB are free$"):
        check_disk(experiment(make_command, run), run, TRAINING_STAGES)


def test_training_reads_train_and_val_and_evaluation_the_test_split(make_command, tmp_path: Path) -> None:
    config = make_command("search", tmp_path, "--data.test_roots=[other]").config
    roots = config.data.roots
    assert splits_of(config, [SEARCH]) == [(roots, "train"), (roots, "val")]
    assert splits_of(config, [EVAL]) == [(["other"], "test")]
    config = make_command("search", tmp_path, "--data.val_split=", "--data.test_split=train").config
    assert splits_of(config, [FINETUNE, EVAL]) == [(roots, "train")]


def test_whole_data_pass_once_every_image_header_is_read(
    own_data: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    check = checks.check_image_header
    monkeypatch.setattr(
        checks, "check_image_header", lambda annotation: read.append(annotation.image_id) or check(annotation)
    )
    quick_preflight(
        experiment(make_command, tmp_path, f"--data.roots=[{own_data}]"), tmp_path, [*TRAINING_STAGES, EVAL]
    )
    splits = [(own_data / "ImageSets" / "Main" / f"{split}.txt").read_text() for split in ("train", "val", "test")]
    assert sorted(read) == sorted(" ".join(splits).split())


@pytest.mark.parametrize(("split", "stage"), [("train", "pretrain_fp32"), ("val", "search"), ("test", "eval")])
def test_a_broken_header_is_found_in_the_splits_that_the_stage_reads(
    own_data: Path, make_command, tmp_path: Path, split: str, stage: str
) -> None:
    (own_data / f"JPEGImages/{split}_000001.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\0")
    parts = experiment(make_command, tmp_path, f"--data.roots=[{own_data}]")
    with pytest.raises(InputError, match=rf"{split}_000001\.jpg: not a readable image$"):
        quick_preflight(parts, tmp_path, [stage_named(stage)])
    quick_preflight(parts, tmp_path, [SEARCH if split == "test" else EVAL])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--search.batch_size=3",), "search.batch_size"),
        (("--search.policy_batch_size=5",), "search.policy_batch_size"),
        (("--finetune.accumulate=4",), "finetune.batch_size"),
    ],
)
def test_a_later_stage_that_cannot_share_its_batches_is_refused_before_pretraining(
    make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], key: str
) -> None:
    parts = experiment(make_command, tmp_path, "--pretrain_fp32.batch_size=4", *options)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match=rf"^{key}: expected a multiple of \d"):
        quick_preflight(parts, tmp_path, [PRETRAIN_FP32, PRETRAIN_QUANT])
    quick_preflight(parts, tmp_path, [EVAL])


@pytest.mark.parametrize(
    "options",
    [
        ("--finetune.batch_size=1",),
        ("--finetune.batch_size=2", "--finetune.accumulate=2"),
        ("--data.train_split=single",),
    ],
    ids=["batch", "accumulate", "image"],
)
def test_batch_norm_of_a_single_value_is_refused_before_training(
    own_data: Path, make_command, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (own_data / "ImageSets/Main/single.txt").write_text("train_000000\n")
    options = (f"--data.roots=[{own_data}]", *options)
    message = r"batch_size: detector\.extras_batch_norm needs two images or more in each part of a batch, got 1 "
    with pytest.raises(InputError, match=message):
        check_batches(experiment(make_command, tmp_path, *options), [PRETRAIN_FP32])
    without = experiment(make_command, tmp_path, "--detector.extras_batch_norm=false", *options)
    check_batches(without, [FINETUNE])


def test_a_policy_batch_of_one_image_is_refused_before_training(make_command, tmp_path: Path) -> None:
    """The policy's last maps may have one pixel: BatchNorm would make the same logits of every image."""
    parts = experiment(make_command, tmp_path, "--search.policy_batch_size=1")
    with pytest.raises(InputError, match=r"^search\.policy_batch_size: BatchNorm of the policy needs two images"):
        check_batches(parts, [PRETRAIN_FP32])
    check_batches(parts, [FINETUNE])


def test_default_boxes_that_fit_few_objects_are_named_before_pretraining(
    make_command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sizes copied from an experiment at 224 pixels to one at 64 pixels."""
    sizes = "[[44,78],[78,112],[112,145],[145,179],[179,212],[212,246]]"
    parts = experiment(make_command, tmp_path, f"--detector.box_sizes={sizes}")
    quick_preflight(parts, tmp_path, [PRETRAIN_FP32])
    oversized, poor = [record.getMessage() for record in caplog.records]
    assert oversized.startswith("warning: detector.box_sizes: 78, 112, 145, 179, 212 exceed detector.image_size = 64; ")
    assert re.match(r"warning: default boxes: \d+% of the objects to train on \(mean over classes\) have one at", poor)
    caplog.clear()
    quick_preflight(parts, tmp_path, [SEARCH])  # which takes the pretrained ones
    assert caplog.records == []
    quick_preflight(experiment(make_command, tmp_path), tmp_path, [PRETRAIN_FP32])  # unset sizes follow the image
    assert "detector.box_sizes: " not in caplog.text
