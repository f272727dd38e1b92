"""Counts of what a training sees, against hand tables and the training transform; images that splits share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from instaqnas.data.loader import DetectionDataset
from instaqnas.data.shapes import generate_shapes
from instaqnas.data.transforms import flip_transform
from instaqnas.data.voc import Annotation, read_split
from instaqnas.errors import InputError
from instaqnas.experiment.checks import quick_preflight
from instaqnas.experiment.data_checks import (
    count_classes,
    evaluation_warnings,
    fraction_warnings,
    objects_at,
    shared_images,
    training_warnings,
)
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import EVAL, PRETRAIN_FP32, SEARCH, Stage
from instaqnas.seeds import SampleKey
from tests.data.voc_files import SIZE, object_xml, write_root

DIFFICULT = "<difficult>1</difficult>"
CLASSES = ("cat", "dog")


def annotation(*boxes_xyxy: tuple, labels: tuple = (), difficult: tuple = (), size: tuple = (200, 100)) -> Annotation:
    labels = labels or (1,) * len(boxes_xyxy)
    difficult = difficult or (False,) * len(boxes_xyxy)
    boxes = np.array(boxes_xyxy, np.float32).reshape(-1, 4)
    return Annotation("a", Path("a.jpg"), boxes, np.array(labels, int), np.array(difficult, bool), *size)


# --- Objects ----------------------------------------------------------------------------------------------------------


def test_objects_by_hand() -> None:
    """At 50 pixels an image of 200 x 100 shrinks to a quarter in width and to half in height."""
    first = annotation(
        (0, 0, 40, 20), (0, 0, 3, 50), (0, 0, 4, 2), (8, 8, 9, 9), labels=(1, 1, 2, 1), difficult=(0, 0, 0, 1)
    )
    tiny, empty = annotation((10, 10, 50, 11)), annotation()
    found = objects_at("train", [first, tiny, empty], 50)
    assert (found.images, found.objects, found.difficult, found.small, found.empty_images) == (3, 5, 1, 2, 2)
    assert found.boxes_xyxy.tolist() == [[0, 0, 10, 10], [0, 0, 1, 1]]
    assert found.labels.tolist() == [1, 2]
    assert found.counted_labels.tolist() == [1, 1, 2, 1]  # also those under a pixel


def test_objects_are_those_that_the_training_transform_keeps(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    bodies = {}
    for number in range(20):
        corners = draw.integers(1, 60, (6, 2))
        boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, draw.integers(1, 8, (6, 2)), strict=True)]
        marks = draw.choice([DIFFICULT, "<difficult>0</difficult>"], 6, p=[0.2, 0.8])
        bodies[f"i{number}"] = SIZE + "".join(map(object_xml, boxes, ["cat"] * 6, marks))
    annotations = read_split([write_root(tmp_path, bodies)], "train", CLASSES)
    dataset = DetectionDataset(annotations, flip_transform(31, vertical_flip=False))
    samples = [dataset[SampleKey(0, index)]["boxes"] for index in range(20)]
    found = objects_at("train", annotations, 31)
    assert 20 < len(found.labels) < 100
    assert len(found.labels) == sum(map(len, samples))
    sides = torch.cat(samples)[:, 2:] - torch.cat(samples)[:, :2]  # a flip moves boxes only
    np.testing.assert_allclose(found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2], sides, atol=1e-4)


def test_lost_objects_and_absent_classes_are_a_line_each() -> None:
    boxes = [(0, 0, 100, 100), (0, 0, 9, 1), (5, 5, 90, 90)]
    found = objects_at("train", [annotation(*boxes, difficult=(0, 0, 1))], 50)
    assert count_classes(found.labels, CLASSES) == {"cat": 1, "dog": 0}
    assert training_warnings(found, CLASSES) == [
        "split 'train': 2 of 3 objects are not trained on (1 difficult, 1 under a pixel at detector.image_size = 50)",
        "split 'train': no object to train on of 1 of 2 classes (dog)",
    ]
    assert training_warnings(objects_at("train", [annotation(boxes[0])], 50), ("cat",)) == []


@pytest.mark.parametrize(
    ("difficult", "counts"), [((1, 1), "2 difficult, 0"), ((0, 0), "0 difficult, 2"), ((1, 0), "1 difficult, 1")]
)
def test_nothing_to_train_on_is_refused(difficult: tuple, counts: str) -> None:
    found = objects_at("train", [annotation((0, 0, 3, 90), (0, 0, 190, 1), difficult=difficult), annotation()], 50)
    with pytest.raises(InputError, match=rf"^split 'train': none of its 2 objects can be trained on \({counts} under"):
        training_warnings(found, CLASSES)


def test_a_split_of_difficult_objects_cannot_be_evaluated_and_one_of_small_objects_can() -> None:
    difficult = objects_at("val", [annotation((0, 0, 90, 90), difficult=(1,))], 50)
    (line,) = evaluation_warnings(difficult)
    assert line.startswith("split 'val': no object counts in an evaluation (1 difficult); its mAP is undefined")
    assert evaluation_warnings(objects_at("val", [annotation((0, 0, 1, 1))], 50)) == []


def test_boxes_that_look_like_fractions() -> None:
    fractions, pixels = annotation((0, 0, 0.7, 1), (0, 0, 0.1, 0.3)), annotation((0, 0, 0.7, 1.5), (0, 0, 0.5, 0.5))
    with pytest.raises(InputError, match=r"^split 'val': boxes from 0 to 1 look like fractions of the image; pixels"):
        fraction_warnings("val", [fractions, annotation(), fractions])
    (line,) = fraction_warnings("val", [fractions, pixels, fractions])
    assert line.endswith(" are expected (2 images: a, a)")
    assert fraction_warnings("val", [pixels, annotation()]) == []


# --- Images in several splits -----------------------------------------------------------------------------------------


@pytest.fixture
def split_of(tmp_path: Path) -> Callable[..., list[Annotation]]:
    """Annotations of image files in `tmp_path` by name; contents are written if given."""

    def make(**contents: bytes | None) -> list[Annotation]:
        annotations = []
        for name, content in contents.items():
            path = tmp_path / f"{name}.jpg"
            if content is not None:
                path.write_bytes(content)
            annotations.append(Annotation(name, path, *(np.zeros(0),) * 3, 10, 10))
        return annotations

    return make


def test_splits_that_list_the_same_images(split_of: Callable) -> None:
    train, val = split_of(a=b"1", b=b"22", c=b"333"), split_of(d=b"4444", c=None, a=None)
    test = split_of(e=b"5", f=b"6")  # as long as a, but different
    assert shared_images([("train", train), ("val", val), ("test", test)]) == [
        "splits 'train' and 'val' share images: 2 (c, a)"
    ]


def test_equal_images_under_different_names(split_of: Callable) -> None:
    long, other_begin, other_middle = bytes(20000), b"1" + bytes(19999), bytes(9000) + b"1" + bytes(10999)
    train = split_of(a=long, a_again=long, b=b"b", c=other_begin)
    val = split_of(v=b"v", w=other_middle)
    test = split_of(x=b"b", y=long, b=None)
    assert shared_images([("train", train), ("val", val), ("test", test)]) == [
        "splits 'train' and 'test' share images: 1 (b)",
        "splits 'train' and 'test' have equal images in different files: 2 (a.jpg = y.jpg, b.jpg = x.jpg)",
    ]
    assert shared_images([("train", train)]) == []


def test_images_with_the_same_id_and_objects_in_several_roots_are_shared(tmp_path: Path) -> None:
    """Such as copies that have been encoded again; images that only have the same number are not."""

    def split_in(root: str, **boxes: list) -> list[Annotation]:
        (tmp_path / root).mkdir()
        found = []
        for name, own in boxes.items():
            (tmp_path / root / name).write_bytes(f"{name} encoded for {root}".encode())
            found.append(replace(annotation(*own), image_id=name, image_path=tmp_path / root / name))
        return found

    train = split_in("first", a=[(1, 2, 30, 40)], b=[(1, 2, 30, 40)], c=[], d=[(5, 5, 9, 9)])
    val = split_in("second", a=[(1, 2, 30, 40)], b=[(1, 2, 30, 41)], c=[])
    val += split_in("third", a=[(1, 2, 30, 40)], d=[(5, 5, 9, 9)])
    assert shared_images([("train", train), ("val", val)]) == [
        "splits 'train' and 'val' share images: 3 (a, a, d)",
    ]


def test_many_shared_images_are_counted_and_the_first_are_named(split_of: Callable) -> None:
    split = split_of(**{f"i{number}": b"" for number in range(9)})
    assert shared_images([("train", split), ("train", split)]) == [
        "splits 'train' and 'train' share images: 9 (i0, i1, i2, i3, i4, ...)"
    ]


# --- In stages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A data set that a test may harm."""
    generate_shapes(tmp_path / "shapes", {"train": 4, "val": 2, "test": 2}, image_size=64, seed=3)
    return tmp_path / "shapes"


@pytest.fixture
def warnings_of(make_command, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Runs the quick checks of a stage on a data set and returns the warnings."""

    def run(root: Path, *stages: Stage) -> list[str]:
        caplog.clear()
        parts = Experiment(make_command("search", tmp_path, f"--data.roots=[{root}]").config)
        quick_preflight(parts, tmp_path, stages)
        assert all(record.levelname == "WARNING" for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    return run


def rewrite(root: Path, split: str, change: Callable[[str], str]) -> None:
    for path in root.glob(f"Annotations/{split}_*.xml"):
        path.write_text(change(path.read_text()))


def test_whole_data_pass_without_a_line(own_data: Path, warnings_of: Callable) -> None:
    assert warnings_of(own_data, SEARCH) == []


def test_objects_under_a_pixel_at_the_networks_size_stop_the_training(tmp_path: Path, warnings_of: Callable) -> None:
    """14 pixels of 2000 at 64 pixels are 0.45; of 200 pixels they are 4.5."""
    size = "<size><width>{}</width><height>{}</height><depth>3</depth></size>"
    for width, height in ((2000, 1500), (200, 150)):
        body = size.format(width, height) + object_xml((100, 100, 113, 113))
        for split in ("train", "val", "test"):
            write_root(tmp_path / "voc", {f"{split}{i}": body for i in range(4)}, split=split)
        for number, path in enumerate(sorted((tmp_path / "voc/JPEGImages").iterdir())):
            cv2.imwrite(str(path), np.full((height, width, 3), number, np.uint8))
        if width == 2000:
            with pytest.raises(InputError, match=r"none of its 4 objects can be trained on \(0 difficult, 4 under a"):
                warnings_of(tmp_path / "voc", PRETRAIN_FP32)
    assert any(
        "no object to train on of 1 of 2 classes (dog)" in line for line in warnings_of(tmp_path / "voc", SEARCH)
    )


def test_difficult_objects_only_stop_the_training_and_mark_a_val_split(own_data: Path, warnings_of: Callable) -> None:
    def all_difficult(xml: str) -> str:
        return xml.replace("<difficult>0", "<difficult>1")

    rewrite(own_data, "val", all_difficult)
    (line,) = warnings_of(own_data, PRETRAIN_FP32)[:1]
    assert line.startswith("warning: split 'val': no object counts in an evaluation")
    rewrite(own_data, "train", all_difficult)
    with pytest.raises(
        InputError, match=r"^split 'train': none of its \d+ objects can be trained on \(\d+ difficult, 0"
    ):
        warnings_of(own_data, PRETRAIN_FP32)


@pytest.mark.parametrize(("split", "stage"), [("train", SEARCH), ("val", PRETRAIN_FP32), ("test", EVAL)])
def test_fractions_are_refused_in_the_splits_that_a_stage_reads(
    tmp_path: Path, warnings_of: Callable, split: str, stage: Stage
) -> None:
    for name in ("train", "val", "test"):
        box = (0.1, 0.2, 0.6, 0.9) if name == split else (10, 20, 60, 70)
        write_root(tmp_path / "voc", {f"{name}{i}": SIZE + object_xml(box) for i in range(4)}, split=name)
    with pytest.raises(InputError, match=rf"^split '{split}': boxes from 0 to 1 look like fractions .*{split}0\.xml"):
        warnings_of(tmp_path / "voc", stage)


def test_splits_that_share_images_are_named_before_a_training_and_an_evaluation(
    own_data: Path, warnings_of: Callable
) -> None:
    lists = own_data / "ImageSets/Main"
    shutil.copy(lists / "train.txt", lists / "test.txt")
    for stage in (SEARCH, EVAL):
        (line,) = warnings_of(own_data, stage)
        assert line.startswith("warning: splits 'train' and 'test' share images: 4 (train_000000, train_000001, ")
    shutil.copy(own_data / "JPEGImages/train_000002.jpg", own_data / "JPEGImages/val_000001.jpg")
    assert warnings_of(own_data, SEARCH)[0] == (
        "warning: splits 'train' and 'val' have equal images in different files: 1 (train_000002.jpg = val_000001.jpg)"
    )


def test_a_split_that_cannot_be_compared_is_named(own_data: Path, warnings_of: Callable) -> None:
    (own_data / "ImageSets/Main/test.txt").unlink()
    (line,) = warnings_of(own_data, SEARCH)
    assert line.startswith("warning: images of split 'test' were not compared with other splits (")
