"""The checks before a long training: what they find, and how they come to their times."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from instaqnas.config.command import parse_command
from instaqnas.config.settings import Config, TrainConfig
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError
from instaqnas.tools import preflight as tool
from instaqnas.tools import stage_figures
from instaqnas.tools.preflight import main
from instaqnas.tools.stage_figures import (
    Note,
    StageFigures,
    due,
    saves_of,
    seconds_per_image,
    steps_for,
    used_images,
)

CONFIG = """
data: {{roots: [{root}], val_split: val, workers: 0}}
detector: {{image_size: 64, width: 0.125, extras_batch_norm: true}}
bits: {{choices: [[2, 2], [4, 4]]}}
policy: {{pool: 4, width: 4}}
pretrain_fp32: {{epochs: 7, batch_size: 4, eval_every: 3, save_every: 2}}
pretrain_quant: {{epochs: 10, batch_size: 4}}
search: {{epochs: 3, batch_size: 4, policy_batch_size: 6}}
finetune: {{epochs: 1, batch_size: 4}}
eval: {{batch_size: 2}}
runtime: {{compile: off}}
device: cpu
"""
STAGES = ["pretrain_fp32", "pretrain_quant", "search", "finetune", "eval"]
ONE_PIXEL = "<bndbox><xmin>5</xmin><ymin>9</ymin><xmax>5</xmax><ymax>9</ymax></bndbox>"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight") / "shapes"
    generate_shapes(root, {"train": 50, "val": 9, "test": 11}, image_size=64, seed=3)
    return root


@pytest.fixture
def config_file(shapes: Path, tmp_path: Path) -> Path:
    shutil.copytree(shapes, tmp_path / "shapes")  # some tests harm it
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(root=tmp_path / "shapes"))
    return tmp_path / "tiny.yaml"


def harm(root: Path, image_id: str) -> None:
    (root / f"JPEGImages/{image_id}.jpg").write_bytes(b"no image")


def read(config_file: Path, *options: str) -> Config:
    return parse_command("eval", ["--config", str(config_file), *options]).config


# --- Times ------------------------------------------------------------------------------------------------------------


def passes(*starts: float, images: int = 4) -> list[Note]:
    return [Note(start, images) for start in starts]


def test_seconds_per_image_are_those_between_forward_passes() -> None:
    assert seconds_per_image(passes(10, 12, 14, 16), burst=1) == 0.5
    assert seconds_per_image([Note(0, 4), Note(2, 2), Note(3, 1)], burst=1) == 0.5  # the last has no end


def test_batches_that_arrive_in_bursts_are_counted_in_whole_bursts() -> None:
    # three workers take 6 seconds for a batch each: 2 seconds a batch
    assert seconds_per_image(passes(6, 6, 6, 12, 12, 12, 18), burst=3) == 0.5
    assert seconds_per_image(passes(6, 6, 6, 12, 12, 12, 18, 18), burst=3) == 0.5
    assert seconds_per_image(passes(6, 8), burst=3) == 0.5  # too few to choose


def test_steps_are_whole_bursts_and_one() -> None:
    assert [steps_for(8, workers) for workers in (0, 1, 2, 3, 8)] == [8, 8, 9, 10, 17]


def test_counts_of_an_epoch() -> None:
    assert [used_images(images, 4) for images in (50, 48, 4, 3)] == [48, 48, 4, 3]
    assert [due(epochs, 3) for epochs in (1, 3, 7, 9)] == [1, 1, 3, 3]


def test_checkpoints_are_those_of_epochs_and_of_minutes() -> None:
    def saves(epoch_seconds: float, **settings: float) -> int:
        return saves_of(TrainConfig(epochs=6, **settings), epoch_seconds)

    assert saves(3000, save_minutes=0) == 6
    assert saves(590, save_minutes=10) == 6
    assert saves(1300, save_minutes=10) == 6 * 3
    assert saves(590, save_minutes=10, save_every=3) == 2 * 3


def test_a_stage_takes_what_its_parts_take() -> None:
    figures = StageFigures("search", 0, 7.0, 10, 100.0, 3, 20.0, 5, 2.0, 30.0)
    assert figures.seconds == 7 + 1000 + 60 + 10 + 30


@pytest.fixture
def measure(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StageFigures]:
    """Measures a stage by a clock that goes on by one second with every forward pass it notes."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(stage_figures.ShortExperiment, "_now", lambda _self: float(next(seconds)))
    monkeypatch.setattr(stage_figures.multiprocessing, "set_start_method", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(stage_figures, "_seconds_of_a_save", lambda _path: 0.0)
    monkeypatch.setattr(stage_figures, "STEPS", 3)
    monkeypatch.setattr(stage_figures, "POLICY_STEPS", 3)
    (tmp_path / "run").mkdir()
    return lambda stage, *options: stage_figures.measure_stage(read(config_file, *options), tmp_path / "run", stage, 0)


@pytest.mark.slow
def test_parts_of_batches_and_the_last_statistics_of_batch_norm_are_counted(
    measure: Callable[..., StageFigures],
) -> None:
    options = ("--pretrain_quant.accumulate=2", "--pretrain_quant.batch_norm_batches=6")
    measure("pretrain_fp32")
    figures = measure("pretrain_quant", *options)
    assert figures.epoch_seconds == 2 * (50 // 4)  # a second for each part
    assert figures.batch_norm_seconds == 6


@pytest.mark.slow
def test_a_search_that_leaves_the_detector_alone_takes_the_time_of_the_policy(
    measure: Callable[..., StageFigures],
) -> None:
    for stage in ("pretrain_fp32", "pretrain_quant"):
        measure(stage)
    figures = measure("search", "--search.train_detector=false", "--search.batch_norm_batches=6")
    assert figures.epoch_seconds == pytest.approx(50 // 6)
    assert figures.batch_norm_seconds == 6


@pytest.mark.slow
def test_times_of_all_stages_by_a_clock_of_forward_passes(measure: Callable[..., StageFigures]) -> None:
    measured = {stage: measure(stage) for stage in STAGES}
    epochs = {stage: (figures.epochs, figures.epoch_seconds) for stage, figures in measured.items()}
    training = 50 // 4  # steps, one second each
    policy = 50 // 6
    assert epochs == {
        "pretrain_fp32": (7, training),
        "pretrain_quant": (10, training),
        "search": (3, pytest.approx(training + policy)),
        "finetune": (1, training),
        "eval": (0, 0),
    }
    evaluations = {s: (f.evaluations, f.evaluation_seconds, f.saves) for s, f in measured.items()}
    assert evaluations == {  # half a second an image: 9 of val, 11 of test
        "pretrain_fp32": (3, 4.5, 4),
        "pretrain_quant": (2, 4.5, 10),
        "search": (1, 4.5, 3),
        "finetune": (1, 4.5, 1),
        "eval": (1, 5.5, 0),
    }


# --- What is found ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_is_measured_and_nothing_left_behind(config_file: Path, tmp_path: Path, capsys) -> None:
    main(["--config", str(config_file), "--run", str(tmp_path / "runs" / "tiny"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["problems"] == []
    assert [(part["split"], part["images"]) for part in result["data"]] == [("train", 50), ("val", 9), ("test", 11)]
    assert [figures["stage"] for figures in result["stages"]] == STAGES
    assert all(figures["seconds"] > 0 for figures in result["stages"])
    assert all(1e8 < figures["memory_bytes"] < 1e10 for figures in result["stages"])
    assert 0 < result["disk"]["needed_gb"] < result["disk"]["free_gb"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "tiny.yaml"]


def test_boxes_without_area_are_reported_and_are_no_problem(config_file: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "shapes/Annotations/val_000003.xml"
    name = path.read_text().split("<name>")[1].split("</name>")[0]
    addition = f"<object><name>{name}</name>{ONE_PIXEL}</object></annotation>"
    objects = path.read_text().count("<object>")
    path.write_text(path.read_text().replace("</annotation>", addition))
    main(["--config", str(config_file), "--quick"])
    printed = capsys.readouterr().out.splitlines()
    assert f"val: dropped boxes without area: 1 (val_000003.xml object {objects})" in printed
    assert printed[0].startswith("train: 50 images, ")


def objects_reported(capsys: pytest.CaptureFixture, *words: str) -> dict:
    capsys.readouterr()
    main([*words, "--quick", "--json"])
    return json.loads(capsys.readouterr().out)["objects"]


def test_objects_to_train_on_are_counted_by_class_and_by_size(config_file: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "shapes/Annotations/train_000003.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    xmls = [file.read_text() for file in path.parent.glob("train_*.xml") if file != path]
    names = re.findall("<object>.*?<name>([^<]+)</name>", "".join(xmls), flags=re.DOTALL)
    lost = path.read_text().count("<difficult>1")
    found = objects_reported(capsys, "--config", str(config_file))
    assert {name: count for name, count in found["classes"]["train"].items() if count} == Counter(names)
    assert list(found["classes"]) == ["train", "val", "test"]
    assert found["empty_images"] == 1
    assert sum(row["objects"] for row in found["sizes"]) == len(names)
    (line,) = [line for line in found["warnings"] if "not trained on" in line]
    assert line.startswith(f"split 'train': {lost} of {lost + len(names)} objects are not trained on ({lost} difficult")


def test_sizes_that_are_suggested_for_poor_default_boxes_reach_what_is_said(config_file: Path, capsys) -> None:
    words = ["--config", str(config_file)]
    poor = objects_reported(capsys, *words, "--detector.box_sizes=[[1,2],[1,2],[2,3],[2,3],[80,90],[80,90]]")
    assert poor["coverage"]["of_classes"] < 0.1
    assert poor["warnings"][0] == (
        "detector.box_sizes: 80, 80 exceed detector.image_size = 64; they are pixels of the network's input and do not "
        "follow it"
    )
    suggested = poor["suggestion"]["box_sizes"]
    assert f"detector.box_sizes: {suggested} would reach " in poor["warnings"][1]
    better = objects_reported(capsys, *words, f"--detector.box_sizes={suggested}")
    assert better["coverage"] == poor["suggestion"]["coverage"]
    assert better["coverage"]["of_classes"] > 0.3


def test_warnings_are_lines_and_no_failure(config_file: Path, tmp_path: Path, capsys) -> None:
    lists = tmp_path / "shapes/ImageSets/Main"
    (lists / "val.txt").write_text((lists / "train.txt").read_text())
    main(["--config", str(config_file), "--quick"])
    printed, errors = capsys.readouterr()
    assert "warning: splits 'train' and 'val' share images: 50 (train_000000, " in errors
    assert next(line for line in printed.splitlines() if line.startswith("side at 64 pixels"))


def test_nothing_to_train_on_is_a_problem(config_file: Path, tmp_path: Path, capsys) -> None:
    for path in (tmp_path / "shapes/Annotations").glob("train_*.xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    with pytest.raises(SystemExit) as left:
        main(["--config", str(config_file)])
    assert left.value.code == 2
    assert "problem: split 'train': none of its " in capsys.readouterr().err


def test_every_problem_of_the_data_is_a_line_and_nothing_is_measured(
    config_file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "_in_fresh_process", None)
    root = tmp_path / "shapes"
    for image_id in ("train_000002", "train_000004", "test_000001"):
        harm(root, image_id)
    (root / "Annotations/val_000001.xml").unlink()
    with pytest.raises(SystemExit) as left:
        main(["--config", str(config_file)])
    assert left.value.code == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem: ")]
    assert problems == [
        f"problem: {root}/JPEGImages/train_000002.jpg: not a readable image",
        f"problem: {root}/JPEGImages/train_000004.jpg: not a readable image",
        f"problem: {root}/ImageSets/Main/val.txt, line 2: no annotation {root}/Annotations/val_000001.xml",
        f"problem: {root}/JPEGImages/test_000001.jpg: not a readable image",
    ]


@pytest.mark.parametrize("orientation, problems", [("auto", 0), ("stored", 0), ("upright", 1)])
def test_images_are_checked_under_the_orientation_of_the_config(
    config_file: Path, tmp_path: Path, capsys, orientation: str, problems: int
) -> None:
    root, exif = tmp_path / "shapes", Image.Exif()
    exif[0x0112] = 6  # turned; the annotation has the size that is stored
    Image.new("RGB", (128, 64)).save(root / "JPEGImages/train_000002.jpg", exif=exif)
    path = root / "Annotations/train_000002.xml"
    path.write_text(path.read_text().replace("<width>64", "<width>128"))
    with contextlib.nullcontext() if not problems else pytest.raises(SystemExit):
        main(["--config", str(config_file), "--quick", f"--data.orientation={orientation}"])
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem: ")]
    assert len(found) == problems
    assert all(line.endswith("size of the stored picture, 128 x 64, but data.orientation is upright") for line in found)


def test_a_data_root_that_is_not_there_is_a_problem(config_file: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--config", str(config_file), "--data.roots", f"[{tmp_path}/gone]"])
    assert left.value.code == 2
    assert f"problem: {tmp_path}/gone: not a folder" in capsys.readouterr().err


def test_a_target_out_of_reach_is_a_problem_before_anything_is_measured(config_file: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--config", str(config_file), "--reward.name=budget", "--reward.target_gbitops=9"])
    assert left.value.code == 2
    assert "problem: reward.target_gbitops: expected 0." in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_that_fails_is_a_problem_and_ends_the_measurement(config_file: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--config", str(config_file), "--pretrain_fp32.pretrained", "absent.pth", "--json"])
    assert left.value.code == 2
    result = json.loads(capsys.readouterr().out)
    assert result["stages"] == []
    (problem,) = result["problems"]
    assert problem.startswith("pretrain_fp32: ")
    assert "absent.pth" in problem


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_problem() -> None:
    with pytest.raises(InputError, match="was killed, probably for want of memory"):
        tool._in_fresh_process(partial(os._exit, 9))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
        tool.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes\nmore"),
        MemoryError("Unable to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_one_line(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(stage_figures, "_run", fail)
    monkeypatch.setattr(stage_figures.multiprocessing, "set_start_method", lambda *_args, **_kwargs: None)
    with pytest.raises(InputError, match=r"^there is too little memory \(.+ 9 bytes\)$"):
        stage_figures.measure_stage(read(config_file), tmp_path, "search", 0)


def test_a_bug_is_not_taken_for_want_of_memory(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_figures, "_run", lambda *_: tool.torch.zeros(2) @ tool.torch.zeros(3))
    monkeypatch.setattr(stage_figures.multiprocessing, "set_start_method", lambda *_args, **_kwargs: None)
    with pytest.raises(RuntimeError, match="size"):
        stage_figures.measure_stage(read(config_file), tmp_path, "search", 0)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "CGROUP_LIMIT", tmp_path / "memory.max")
    machine = tool._memory_there(tool.torch.device("cpu"))
    for limit, there in (("max", machine), ("12345", 12345), (str(2 * machine), machine)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert tool._memory_there(tool.torch.device("cpu")) == there


def test_a_stage_larger_than_the_memory_is_a_problem() -> None:
    stages = [StageFigures(stage, size, 0, 0, 0, 0, 0, 0, 0) for stage, size in (("search", 10**15), ("eval", 1))]
    (problem,) = tool._too_large(stages, tool.torch.device("cpu"))
    assert problem.startswith("search: needs 1000000.0 GB of memory, there are ")
