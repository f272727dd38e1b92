"""The drawn dataset on disk: complete, reproducible, and never over other files."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest

from instaqnas.data import voc
from instaqnas.data.drawing import draw_image
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError
from instaqnas.tools.shapes import main

COUNTS = {"train": 120, "val": 20, "test": 20}
IMAGE_SIZE = 96


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, COUNTS, image_size=IMAGE_SIZE, seed=3)
    return root


def read_ids(root: Path, split: str) -> list[str]:
    return (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def read_objects(root: Path, image_id: str) -> list[tuple[str, list[int]]]:
    annotation = ET.parse(root / "Annotations" / f"{image_id}.xml").getroot()
    return [
        (element.findtext("name"), [int(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")])
        for element in annotation.iter("object")
    ]


def read_difficulties(root: Path) -> dict[str, float]:
    with (root / "difficulty.csv").open(newline="") as file:
        return {row["image_id"]: float(row["difficulty"]) for row in csv.DictReader(file)}


def file_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_reader_finds_the_difficulty_of_every_image(tree: Path) -> None:
    written = read_difficulties(tree)
    for split, count in COUNTS.items():
        annotations = voc.read_split([tree], split, voc.read_class_names([tree]))
        assert len(annotations) == count
        assert all(annotation.difficulty == written[annotation.image_id] for annotation in annotations)


def test_same_seed_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "again", COUNTS, image_size=IMAGE_SIZE, seed=3)
    assert file_bytes(tmp_path / "again") == file_bytes(tree)


def test_another_seed_gives_other_images(tree: Path, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "other", {"train": 1}, image_size=IMAGE_SIZE, seed=4)
    image = Path("JPEGImages") / "train_000000.jpg"
    assert (tmp_path / "other" / image).read_bytes() != (tree / image).read_bytes()


def test_larger_data_set_begins_with_the_images_of_a_smaller_one(tree: Path, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "small", {"train": 2, "test": 2}, image_size=IMAGE_SIZE, seed=3)
    large, small = file_bytes(tree), file_bytes(tmp_path / "small")
    images = [path for path in small if path.endswith((".jpg", ".xml"))]
    assert len(images) == 8
    assert all(small[path] == large[path] for path in images)


def test_images_of_different_splits_differ(tree: Path) -> None:
    images = {(tree / "JPEGImages" / f"{split}_000000.jpg").read_bytes() for split in COUNTS}
    assert len(images) == len(COUNTS)


def test_layout_is_complete(tree: Path) -> None:
    for split, count in COUNTS.items():
        assert len(read_ids(tree, split)) == count
    image_ids = {image_id for split in COUNTS for image_id in read_ids(tree, split)}
    assert len(image_ids) == sum(COUNTS.values())
    assert {path.stem for path in (tree / "JPEGImages").glob("*.jpg")} == image_ids
    assert {path.stem for path in (tree / "Annotations").glob("*.xml")} == image_ids
    assert (tree / "difficulty.csv").read_text().startswith("image_id,difficulty\n")
    assert read_difficulties(tree).keys() == image_ids
    assert json.loads((tree / "generated.json").read_text())["seed"] == 3


def test_annotation_has_the_elements_of_voc(tree: Path) -> None:
    annotation = ET.parse(tree / "Annotations" / "val_000000.xml").getroot()
    assert annotation.findtext("folder") == "JPEGImages"
    assert annotation.findtext("filename") == "val_000000.jpg"
    assert [annotation.findtext(f"size/{key}") for key in ("width", "height", "depth")] == ["96", "96", "3"]
    first = annotation.find("object")
    assert [child.tag for child in first] == ["name", "pose", "truncated", "difficult", "bndbox"]
    assert first.findtext("difficult") == "0"
    image = cv2.imread(str(tree / "JPEGImages" / "val_000000.jpg"))
    assert image.shape == (96, 96, 3)


def test_every_image_has_1_to_12_objects_with_boxes_inside(tree: Path) -> None:
    for split in COUNTS:
        for image_id in read_ids(tree, split):
            objects = read_objects(tree, image_id)
            assert 1 <= len(objects) <= 12
            for _, (xmin, ymin, xmax, ymax) in objects:
                assert 1 <= xmin < xmax <= IMAGE_SIZE
                assert 1 <= ymin < ymax <= IMAGE_SIZE


def test_every_label_appears_and_no_other(tree: Path) -> None:
    labels = (tree / "labels.txt").read_text().split()
    names = {name for image_id in read_ids(tree, "train") for name, _ in read_objects(tree, image_id)}
    assert len(labels) >= 6
    assert names == set(labels)


def test_difficulties_cover_the_range_and_raise_the_number_of_objects(tree: Path) -> None:
    difficulties = read_difficulties(tree)
    values = np.array(list(difficulties.values()))
    assert values.min() >= 0 and values.max() <= 1
    assert values.min() < 0.1 and values.max() > 0.9
    numbers = [len(read_objects(tree, image_id)) for image_id in difficulties]
    assert np.corrcoef(values, numbers)[0, 1] > 0.7


def test_second_run_with_the_same_request_changes_nothing(tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    generate_shapes(tree, COUNTS, image_size=IMAGE_SIZE, seed=3)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


@pytest.mark.parametrize(
    ("counts", "image_size", "seed"), [({"train": 1}, IMAGE_SIZE, 3), (COUNTS, 128, 3), (COUNTS, IMAGE_SIZE, 4)]
)
def test_other_request_for_an_existing_data_set_is_refused(
    tree: Path, counts: dict[str, int], image_size: int, seed: int
) -> None:
    with pytest.raises(InputError, match="holds another dataset"):
        generate_shapes(tree, counts, image_size=image_size, seed=seed)


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a generated dataset"):
        generate_shapes(tmp_path, {"train": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    generate_shapes(tmp_path, {"test": 1}, image_size=64)
    assert read_ids(tmp_path, "test") == ["test_000000"]


def test_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(*args: object, **settings: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return draw_image(*args, **settings)

    monkeypatch.setattr("instaqnas.data.shapes.draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path / "shapes", {"train": 5}, image_size=64)
    assert calls == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("counts", "image_size", "seed", "message"),
    [
        ({"trian": 1}, 160, 0, "unknown split 'trian'"),
        ({"train": -1}, 160, 0, "split train: -1"),
        ({"train": 0}, 160, 0, "no images"),
        ({"train": 1}, 63, 0, "image size 63"),
        ({"train": 1}, 160, -1, "seed -1"),
    ],
)
def test_wrong_values_are_refused(
    tmp_path: Path, counts: dict[str, int], image_size: int, seed: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate_shapes(tmp_path / "shapes", counts, image_size=image_size, seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        generate_shapes(tmp_path / "file" / "below" / "shapes", {"train": 1})


def test_command_line_writes_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "shapes"
    main(["--root", str(root), "--train", "3", "--val", "2", "--test", "1", "--image-size", "64"])
    assert [len(read_ids(root, split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert "3 train, 2 val, 1 test" in capsys.readouterr().out


def test_command_line_reports_wrong_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--root", str(tmp_path / "shapes"), "--train", "-1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_empty_images_have_no_objects_and_the_others_are_as_they_were(tree: Path, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "watch", COUNTS, image_size=IMAGE_SIZE, seed=3, empty=0.6)
    with_objects = [i for i in read_ids(tmp_path / "watch", "train") if read_objects(tmp_path / "watch", i)]
    assert 0.25 < len(with_objects) / COUNTS["train"] < 0.55
    for image_id in with_objects:
        for name in (f"JPEGImages/{image_id}.jpg", f"Annotations/{image_id}.xml"):
            assert (tmp_path / "watch" / name).read_bytes() == (tree / name).read_bytes()
    assert (tmp_path / "watch" / "difficulty.csv").read_text() == (tree / "difficulty.csv").read_text()
    fewer = tmp_path / "fewer"
    generate_shapes(fewer, COUNTS, image_size=IMAGE_SIZE, seed=3, empty=0.3)
    assert set(with_objects) < {i for i in read_ids(fewer, "train") if read_objects(fewer, i)}


def test_a_background_is_that_of_an_image_of_the_same_difficulty() -> None:
    full, empty = (draw_image(np.random.default_rng(1), 96, 0.0, empty=e) for e in (False, True))
    assert len(empty.boxes) == 0
    xmin, ymin, xmax, ymax = full.boxes.min(0)[0], full.boxes.min(0)[1], full.boxes.max(0)[2], full.boxes.max(0)[3]
    outside = np.ones((96, 96), dtype=bool)
    outside[max(ymin - 3, 0) : ymax + 2, max(xmin - 3, 0) : xmax + 2] = False
    assert (full.image[outside] == empty.image[outside]).all()  # difficulty 0: no noise, and nothing else drawn


@pytest.mark.parametrize("empty", [-0.1, 1.0])
def test_a_share_of_empty_images_outside_its_range_is_refused(tmp_path: Path, empty: float) -> None:
    with pytest.raises(InputError, match="share of empty images"):
        generate_shapes(tmp_path / "x", {"train": 1}, empty=empty)
