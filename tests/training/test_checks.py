"""What stops a stage before it trains: broken data, a disk that is too small."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import instaqnas.training.checks as checks
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError
from instaqnas.training.checks import check_disk, checkpoint_bytes, disk_needed, quick_preflight, splits_of
from instaqnas.training.experiment import Experiment

TRAINED = ("pretrain_fp32", "pretrain_quant", "search", "finetune")


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A data set that a test may harm."""
    generate_shapes(tmp_path / "shapes", {"train": 3, "val": 2, "test": 2}, image_size=64, seed=3)
    return tmp_path / "shapes"


def experiment(make_command, run: Path, *options: str) -> Experiment:
    return Experiment(make_command("search", run, *options).config)


def test_a_checkpoint_is_as_large_as_foretold(finished_run: Path, make_command) -> None:
    parts = experiment(make_command, finished_run)
    for stage in TRAINED:
        real = (finished_run / stage / "last.pt").stat().st_size
        foretold = checkpoint_bytes(parts, stage)
        assert 0.6 * real < foretold < real, stage  # networks so small have more names than numbers


def test_averages_and_optimizers_count(finished_run: Path, make_command) -> None:
    def size(stage: str, *options: str) -> int:
        return checkpoint_bytes(experiment(make_command, finished_run, *options), stage)

    detector = size("finetune", "--finetune.optimizer=sgd", "--finetune.ema_decay=0.5")
    # two networks and one momentum are as much as one network and two moments, but for the statistics of BatchNorm
    assert detector - size("finetune") == pytest.approx(0, abs=0.05 * detector)
    assert size("finetune", "--finetune.optimizer=sgd") < size("finetune") < size("search")


def test_disk_needed_grows_with_the_files_and_shrinks_with_those_that_are_there(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    parts = experiment(make_command, tmp_path)
    one = checkpoint_bytes(parts, "finetune")
    assert disk_needed(parts, tmp_path, ["finetune"]) == 3 * one  # the last, the best, and the one being written
    assert disk_needed(parts, tmp_path, ["finetune", "eval"]) == 3 * one
    kept = experiment(make_command, tmp_path, "--finetune.keep_checkpoints=4")
    assert disk_needed(kept, tmp_path, ["finetune"]) == 7 * one
    without_val = experiment(make_command, tmp_path, "--data.val_split=")
    assert disk_needed(without_val, tmp_path, ["finetune"]) == 2 * one
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "last.pt").write_bytes(bytes(one))
    assert disk_needed(parts, tmp_path, ["finetune"]) == 2 * one
    assert disk_needed(parts, tmp_path, ["finetune"], restart=True) == 3 * one  # what is there will be kept
    assert disk_needed(parts, tmp_path, TRAINED) > disk_needed(parts, tmp_path, ["finetune"]) + one


def test_a_disk_that_is_too_small_is_refused(make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "tiny"
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match=r"tiny: 0\.\d\d GB of disk are needed for checkpoints, 0\.00 GB are free$"):
        check_disk(experiment(make_command, run), run, TRAINED)


def test_training_reads_train_and_val_and_evaluation_the_test_split(make_command, tmp_path: Path) -> None:
    config = make_command("search", tmp_path, "--data.test_roots=[other]").config
    roots = config.data.roots
    assert splits_of(config, ["search"]) == [(roots, "train"), (roots, "val")]
    assert splits_of(config, ["eval"]) == [(["other"], "test")]
    config = make_command("search", tmp_path, "--data.val_split=", "--data.test_split=train").config
    assert splits_of(config, ["finetune", "eval"]) == [(roots, "train")]


def test_whole_data_pass_once_every_image_header_is_read(
    own_data: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    check = checks.check_image_header
    monkeypatch.setattr(
        checks, "check_image_header", lambda annotation: read.append(annotation.image_id) or check(annotation)
    )
    quick_preflight(experiment(make_command, tmp_path, f"--data.roots=[{own_data}]"), tmp_path, *TRAINED, "eval")
    splits = [(own_data / "ImageSets" / "Main" / f"{split}.txt").read_text() for split in ("train", "val", "test")]
    assert sorted(read) == sorted(" ".join(splits).split())


@pytest.mark.parametrize(("split", "stage"), [("train", "pretrain_fp32"), ("val", "search"), ("test", "eval")])
def test_a_broken_header_is_found_in_the_splits_that_the_stage_reads(
    own_data: Path, make_command, tmp_path: Path, split: str, stage: str
) -> None:
    (own_data / f"JPEGImages/{split}_000001.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\0")
    parts = experiment(make_command, tmp_path, f"--data.roots=[{own_data}]")
    with pytest.raises(InputError, match=rf"{split}_000001\.jpg: not a readable image$"):
        quick_preflight(parts, tmp_path, stage)
    quick_preflight(parts, tmp_path, "search" if split == "test" else "eval")
