"""Datasets brought into VOC layout: the same from every format, with every problem named; and their splits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from instaqnas.data.voc import read_class_names, read_split
from instaqnas.tools.dataset import main
from tests.data import source_files
from tests.data.source_files import CORNERS, NAMES, save_image

WRITERS = {"coco": source_files.write_coco, "yolo": source_files.write_yolo, "voc": source_files.write_voc}


def run(*words: object) -> None:
    main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """Lines on standard error of a command that ends with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def corners_of(path: Path) -> list[tuple]:
    found = []
    for node in ElementTree.parse(path).getroot().findall("object"):
        numbers = [int(node.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")]
        found.append((node.findtext("name"), *numbers))
    return found


# --- All formats ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trees converted from each format."""
    folder = tmp_path_factory.mktemp("trees")
    for name, write in WRITERS.items():
        run("convert", write(folder / "source" / name), "--to", folder / name, "--copy")
    return {name: folder / name for name in WRITERS}


@pytest.mark.parametrize("name", WRITERS)
def test_a_tree_has_the_pixels_classes_and_splits_of_its_source(trees, name):
    root = trees[name]
    assert {path.stem: corners_of(path) for path in (root / "Annotations").iterdir()} == CORNERS
    assert (root / "labels.txt").read_text() == "".join(f"{name}\n" for name in NAMES)
    lists = {path.stem: path.read_text() for path in (root / "ImageSets/Main").iterdir()}
    assert lists == {"train": "a 1\nb\nempty\n", "val": "large.v2\n", "test": "c\n"}


def test_the_same_objects_give_the_same_files_from_each_format(trees):
    assert len(files_of(trees["coco"])) == 14
    assert files_of(trees["coco"]) == files_of(trees["yolo"]) == files_of(trees["voc"])


def test_a_tree_is_read_with_the_boxes_of_the_source(trees):
    names = read_class_names([trees["yolo"]])
    train = {a.image_id: a for a in read_split([trees["yolo"]], "train", names)}
    assert train["b"].boxes_xyxy.tolist() == [[0, 0, 100, 80], [9, 19, 29, 49]]
    assert train["b"].labels.tolist() == [2, 1]
    assert train["empty"].boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize("write", [source_files.write_coco, source_files.write_yolo])
def test_a_report_counts_and_names_what_is_dropped(tmp_path, capsys, write):
    run("check", write(tmp_path / "source"))
    out = capsys.readouterr().out
    assert "train: 3 images, 1 without objects; 5 objects, 0 difficult (cat 2, dog 1, red cell & <co> 2)" in out
    assert "dropped objects with a side of a pixel or less: 1 (a 1.png)" in out
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_images_are_linked_or_copied(tmp_path):
    source = source_files.write_yolo(tmp_path / "source")
    run("convert", source, "--to", tmp_path / "links")
    run("convert", source, "--to", tmp_path / "copies", "--copy")
    assert files_of(tmp_path / "links") == files_of(tmp_path / "copies")
    assert (tmp_path / "links/JPEGImages/b.jpg").resolve() == source / "images/train/b.jpg"
    assert not any(path.is_symlink() for path in (tmp_path / "copies").rglob("*"))


def test_nothing_is_written_over_a_folder_or_beside_it_after_a_problem(tmp_path, capsys):
    source = source_files.write_yolo(tmp_path / "source")
    root = tmp_path / "root"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    message = f"error: {root}: exists already and is not an empty folder"
    assert refusal(capsys, "convert", source, "--to", root) == [message]
    assert files_of(root) == {"notes.txt": b"mine"}
    (source / "labels/train/b.txt").write_text("0 0.5 0.5 0.1")
    assert refusal(capsys, "convert", source, "--to", tmp_path / "other")[0].startswith("problem: ")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "root"}


def test_images_of_one_name_in_different_folders_get_their_folders_into_their_ids(tmp_path):
    for split in ("train", "val"):
        save_image(tmp_path / f"source/images/{split}/0001.png", (20, 10))
        (tmp_path / f"source/labels/{split}").mkdir(parents=True)
        (tmp_path / f"source/labels/{split}/0001.txt").write_text("0 0.5 0.5 0.5 0.4\n")
    (tmp_path / "source/classes.txt").write_text("cat\n")
    run("convert", tmp_path / "source", "--to", tmp_path / "root")
    assert {path.name for path in (tmp_path / "root/JPEGImages").iterdir()} == {"train_0001.png", "val_0001.png"}
    assert corners_of(tmp_path / "root/Annotations/val_0001.xml") == [("cat", 6, 4, 15, 7)]


def test_images_that_would_have_one_id_are_refused(tmp_path, capsys):
    source = source_files.write_yolo(tmp_path / "source")
    save_image(source / "images/train/b.png", (100, 80))
    [line] = refusal(capsys, "convert", source, "--to", tmp_path / "root")
    assert line.endswith("b.png would both be image 'train_b'")


@pytest.mark.parametrize("words", [["gone"], ["train=gone.json"], ["gone.yaml"]])
def test_a_source_that_is_not_there_is_named(capsys, words):
    name = words[0].removeprefix("train=")
    assert refusal(capsys, "check", *words) == [f"error: {name}: no such file"]


def test_a_folder_of_no_known_format_is_refused(tmp_path, capsys):
    [line] = refusal(capsys, "check", tmp_path)
    assert line.startswith(f"error: {tmp_path}: expected COCO (")


def test_problems_are_capped(tmp_path, capsys):
    source = source_files.write_yolo(tmp_path / "source")
    for number in range(25):
        save_image(source / f"images/train/{number}.png", (9, 9))
        (source / f"labels/train/{number}.txt").write_text("7 0.5 0.5 0.1 0.1")
    lines = refusal(capsys, "check", source)
    assert len(lines) == 21
    assert lines[-1] == "problem: ... and 5 more"


# --- COCO -------------------------------------------------------------------------------------------------------------


IMAGE = {"id": 1, "file_name": "a.png"}
EMPTY = '{"images": [], "annotations": [], "categories": []}'


def coco(folder: Path, annotations: list[dict], **changes: object) -> Path:
    """A file of one image of 40 x 30 pixels, a.png, beside it."""
    save_image(folder / "a.png", (40, 30))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, **item} for number, item in enumerate(annotations)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "train.json").write_text(json.dumps({**content, **changes}))
    return folder / "train.json"


def converted(folder: Path, source: Path) -> list[tuple[str | None, ...]]:
    """Name, difficult and corners of the objects of the image a, as text."""
    run("convert", source, "--to", folder / "root")
    nodes = ElementTree.parse(folder / "root/Annotations/a.xml").getroot().findall("object")
    tags = ("name", "difficult", "bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
    return [tuple(node.findtext(tag) for tag in tags) for node in nodes]


def test_fractions_of_pixels_are_kept_to_a_hundredth_and_boxes_clipped(tmp_path):
    boxes = [[1.25, 2.5, 3.333, 4.1], [-2, -1, 10.1, 5], [30, 20, 10.4, 99]]
    assert [item[2:] for item in converted(tmp_path, coco(tmp_path, [{"bbox": box} for box in boxes]))] == [
        ("2.25", "3.5", "4.58", "6.6"),
        ("1", "1", "8.1", "4"),
        ("31", "21", "40", "30"),
    ]


def test_crowds_and_ignored_objects_are_difficult(tmp_path):
    box = {"bbox": [1, 1, 5, 5]}
    items = [{**box, "iscrowd": 1}, {**box, "iscrowd": 0}, {**box, "ignore": 1}, box]
    assert [item[1] for item in converted(tmp_path, coco(tmp_path, items))] == ["1", "0", "1", "0"]


def test_supercategories_and_the_background_are_left_out_if_they_have_no_objects(tmp_path, capsys):
    categories = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cells"},
        {"id": 2, "name": "dog", "supercategory": "dog"},
        {"id": 9, "name": "__background__"},
    ]
    converted(tmp_path, coco(tmp_path, [{"bbox": [1, 1, 5, 5]}], categories=categories))
    assert (tmp_path / "root/labels.txt").read_text() == "cat\ndog\n"
    assert "category 'cells' has no objects and is left out\n" in capsys.readouterr().out


def test_a_supercategory_with_objects_is_a_class(tmp_path):
    categories = [{"id": 2, "name": "animal"}, {"id": 1, "name": "cat", "supercategory": "animal"}]
    items = [{"bbox": [1, 1, 5, 5], "category_id": 2}]
    assert converted(tmp_path, coco(tmp_path, items, categories=categories)) == [("animal", "0", "2", "2", "6", "6")]
    assert (tmp_path / "root/labels.txt").read_text() == "cat\nanimal\n"


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("train/_annotations.coco.json", "train/a.png"),
        ("annotations/instances_train2017.json", "train2017/a.png"),
        ("annotations/instances_train.json", "images/train/a.png"),
        ("annotations/train.json", "images/a.png"),
        ("my_train_set.json", "images/a.png"),
        ("train.json", "a.png"),
    ],
)
def test_files_and_images_are_found_in_the_usual_places(tmp_path, file, image):
    written = coco(tmp_path / "written", [{"bbox": [1, 1, 5, 5]}])
    for source, target in ((written, file), (written.parent / "a.png", image)):
        (tmp_path / "source" / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, tmp_path / "source" / target)
    assert len(converted(tmp_path, tmp_path / "source")) == 1
    assert (tmp_path / "root/ImageSets/Main/train.txt").read_text() == "a\n"


def test_splits_and_images_are_named_by_hand(tmp_path):
    for split in ("one", "two"):
        coco(tmp_path / split, [{"bbox": [1, 1, 5, 5]}])
        save_image(tmp_path / f"pictures/{split}/a.png", (40, 30))
        (tmp_path / split / "a.png").unlink()
    files = [f"{split}={tmp_path}/{split}/train.json" for split in ("one", "two")]
    run("convert", *files, "--images", tmp_path / "pictures", "--to", tmp_path / "root")
    assert (tmp_path / "root/ImageSets/Main/two.txt").read_text() == "two_a\n"


def test_a_single_file_without_a_split_in_its_name_has_none(tmp_path, capsys):
    source = coco(tmp_path, [{"bbox": [1, 1, 5, 5]}])
    converted(tmp_path, source.rename(tmp_path / "labels.json"))
    assert list((tmp_path / "root/ImageSets/Main").iterdir()) == []
    assert f"no splits yet: python -m instaqnas.tools.dataset split {tmp_path}/root\n" in capsys.readouterr().out


def test_files_of_one_split_are_refused(tmp_path, capsys):
    source = source_files.write_coco(tmp_path / "source")
    shutil.copy(source / "annotations/instances_val.json", source / "annotations/instances_valid.json")
    [line] = refusal(capsys, "check", source)
    assert line.endswith("instances_valid.json: the split is not clear; give all files as SPLIT=FILE")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({}, "annotation 0: bbox: expected [x, y, width, height], got None"),
        ({"bbox": [1, 2, 3]}, "annotation 0: bbox: expected [x, y, width, height], got [1, 2, 3]"),
        ({"bbox": [1, 2, 3, "x"]}, "annotation 0: bbox: expected [x, y, width, height], got [1, 2, 3, 'x']"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 0: bbox: expected [x, y, width, height], got [1, 2, 3, nan]"),
        ({"bbox": [5, 5, -2, 9]}, "annotation 0: a box of negative size: -2 x 9"),
        ({"bbox": [50, 5, 2, 9]}, "annotation 0: box 51 6 52 14 lies outside the image of 40 x 30"),
        ({"bbox": [1, 2, 3, 4], "category_id": 5}, "annotation 0: no category has the id 5"),
        ({"bbox": [1, 2, 3, 4], "category_id": [1]}, "annotation 0: no category has the id '[1]'"),
        ({"bbox": [1, 2, 3, 4], "image_id": 7}, "annotation 0: no image has the id 7"),
        ({"bbox": [1, 2, 3, 4], "image_id": {}}, "annotation 0: no image has the id '{}'"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path, capsys, item, message):
    source = coco(tmp_path, [item, {"bbox": [1, 1, 5, 5]}])
    assert refusal(capsys, "convert", source, "--to", tmp_path / "root") == [f"problem: {source}: {message}"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "{file}: no images"),
        ([{"id": 1}], "{file}: image 1: no file_name"),
        ([{"id": 1, "file_name": "b.png"}], "{file}: image b.png is not in a folder near it: use --images"),
        ([{**IMAGE, "width": 30, "height": 30}], "{folder}/a.png: 40 x 30 pixels, but {file} says 30 x 30"),
        ([IMAGE, {"id": 2, "file_name": "b.png"}], "{file}: image 2: no file {folder}/b.png"),
        ([IMAGE, {**IMAGE, "id": 2}], "{file}: image 2, a.png: id or file is listed twice"),
        ([IMAGE, {**IMAGE, "file_name": "b.png"}], "{file}: image 1, b.png: id or file is listed twice"),
    ],
)
def test_a_wrong_image_is_named(tmp_path, capsys, images, message):
    source = coco(tmp_path, [], images=images)
    [line] = refusal(capsys, "check", source)
    assert line.partition(": ")[2] == message.format(file=source, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("[]", "not in COCO format: no list 'images' of objects"),
        (
            EMPTY.replace('"annotations": []', '"annotations": [1]'),
            "not in COCO format: no list 'annotations' of objects",
        ),
        (EMPTY, "no class names"),
        (
            EMPTY.replace('"categories": []', '"categories": [{"id": 1}]'),
            "category {'id': 1}: expected an id of its own",
        ),
    ],
)
def test_a_file_that_is_not_of_coco_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "train.json").write_text(text)
    [line] = refusal(capsys, "check", tmp_path / "train.json")
    assert line.startswith(f"error: {tmp_path}/train.json: {message}")


def test_an_unknown_size_is_that_of_the_image(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 0}]
    converted(tmp_path, coco(tmp_path, [], images=images))
    root = ElementTree.parse(tmp_path / "root/Annotations/a.xml").getroot()
    assert (root.findtext("size/width"), root.findtext("size/height")) == ("40", "30")


# --- YOLO -------------------------------------------------------------------------------------------------------------


def yolo(folder: Path, label: str, *, images: str = "images/train", labels: str = "labels/train") -> Path:
    """An image of 40 x 30 pixels, a.png, and its labels."""
    save_image(folder / images / "a.png", (40, 30))
    (folder / labels).mkdir(parents=True, exist_ok=True)
    (folder / labels / "a.txt").write_text(label)
    return folder


def yaml_at(path: Path, train: str = "images/train", more: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"train: {train}\nnames: [cat, dog]\n{more}")
    return path


FORM = "expected a class and x, y, width, height, or a polygon; got {!r}"
BOX = "1 0.5 0.5 0.25 0.2\n"  # 10 x 6 pixels around (20, 15)
CORNERS_OF_BOX = [("dog", "0", "16", "13", "25", "18")]


@pytest.mark.parametrize(
    ("images", "labels", "train"),
    [
        ("images/train", "labels/train", "images/train"),
        ("train/images", "train/labels", "train/images"),
        ("train/images", "train/labels", "../train/images"),  # as an exporter writes it
        ("train", "train", "train"),
        ("images/x/images/train", "images/x/labels/train", "images/x/images/train"),
    ],
)
def test_labels_are_found_for_the_images_of_a_yaml(tmp_path, images, labels, train):
    yaml_at(yolo(tmp_path / "source", BOX, images=images, labels=labels) / "data.yaml", train)
    assert converted(tmp_path, tmp_path / "source") == CORNERS_OF_BOX
    assert (tmp_path / "root/ImageSets/Main/train.txt").read_text() == "a\n"


@pytest.mark.parametrize("classes", ["classes.txt", "labels/classes.txt"])
def test_folders_without_a_yaml_are_read(tmp_path, classes):
    (yolo(tmp_path / "source", BOX) / classes).write_text("cat\ndog\n")
    assert converted(tmp_path, tmp_path / "source") == CORNERS_OF_BOX
    assert (tmp_path / "root/ImageSets/Main/train.txt").read_text() == "a\n"


def test_images_and_labels_in_one_folder_have_no_split(tmp_path):
    (yolo(tmp_path / "source", BOX, images=".", labels=".") / "classes.txt").write_text("cat\ndog\n")
    assert converted(tmp_path, tmp_path / "source") == CORNERS_OF_BOX
    assert list((tmp_path / "root/ImageSets/Main").iterdir()) == []


def test_a_yaml_may_be_elsewhere_and_list_images_in_text_files(tmp_path):
    source = yolo(tmp_path / "source", BOX, images="images", labels="labels")
    save_image(source / "images/b.png", (40, 30))
    (source / "train.txt").write_text("./images/a.png\n")
    (source / "rest.txt").write_text(f"images/b.png\n{source}/images/a.png\n")
    more = f"path: {source}\nval: [rest.txt]\ntest:\n"
    assert converted(tmp_path, yaml_at(tmp_path / "elsewhere/any.yaml", "train.txt", more)) == CORNERS_OF_BOX
    lists = {path.stem: path.read_text() for path in (tmp_path / "root/ImageSets/Main").iterdir()}
    assert lists == {"train": "a\n", "val": "a\nb\n"}


def test_a_polygon_becomes_the_box_around_it(tmp_path):
    yaml_at(yolo(tmp_path / "source", "0 0.25 0.1 0.5 0.2 0.125 0.4\n") / "data.yaml")
    assert converted(tmp_path, tmp_path / "source") == [("cat", "0", "6", "4", "20", "12")]


def test_boxes_refer_to_the_upright_picture(tmp_path, capsys):
    source = yolo(tmp_path / "source", BOX)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 40)).save(source / "images/train/a.png", exif=exif)
    yaml_at(source / "data.yaml")
    assert converted(tmp_path, source) == CORNERS_OF_BOX
    assert "stored turned: 1; boxes refer to the upright picture, so set data.orientation to upright" in (
        capsys.readouterr().out
    )
    (annotation,) = read_split([tmp_path / "root"], "train", ("cat", "dog"), "upright")
    assert (annotation.width, annotation.height) == (40, 30)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("0 0.5 0.5 0.1", FORM),
        ("0 0.5 0.5 0.1 0.1 0.9", FORM),
        ("cat 0.5 0.5 0.1 0.1", FORM),
        ("0 0.5 nan 0.1 0.1", FORM),
        ("2 0.5 0.5 0.1 0.1", "class 2 is not one of 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is not one of 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is not one of 0 to 1"),
        ("0 20 15 10 6", "20 is not a fraction of the image, from 0 to 1"),
        ("0 0.5 0.5 -0.1 0.1", "-0.1 is not a fraction of the image, from 0 to 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, capsys, label, message):
    source = yolo(tmp_path / "source", f"{BOX}\n{label}\n")
    yaml_at(source / "data.yaml")
    problem = f"problem: {source}/labels/train/a.txt, line 3: {message.format(label)}"
    assert refusal(capsys, "convert", source, "--to", tmp_path / "root") == [problem]


@pytest.mark.parametrize(("images", "labels"), [("images/train", "labels/train"), ("all", "all")])
def test_labels_whose_image_is_missing_or_of_another_format_are_a_problem(tmp_path, capsys, images, labels):
    source = yolo(tmp_path / "source", BOX, images=images, labels=labels)
    yaml_at(source / "data.yaml", images)
    (source / images / "b.tif").write_bytes(b"")
    (source / labels / "b.txt").write_text(BOX)
    (source / labels / "notes.txt").write_text("five words of a note\n")
    assert refusal(capsys, "check", source) == [
        f"problem: {source}/{labels}/b.txt: no image {source}/{images}/b.jpg, nor of another known format"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: gone\nnames: [a]\n", "train: {folder}/gone: no such file or folder"),
        ("train: empty\nnames: [a]\n", None),
        ("train: images/train\n", "expected `names`, a list"),
        ("train: images/train\nnames: [a, a]\n", "class 'a' is listed 2 times"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "names: expected the numbers 0 to 1, got [0, 2]"),
        ("train: images/train\nnames: [a]\nnc: 2\n", "nc is 2, but there are 1 names"),
        ("names: [a]\n", "expected `train`, `val` or `test`"),
        ("- a\n", "expected `names`, `train` and `val`"),
        ("a: [\n", "not YAML: "),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML: "),
    ],
)
def test_a_wrong_yaml_is_named(tmp_path, capsys, text, message):
    source = yolo(tmp_path / "source", BOX)
    (source / "empty").mkdir()
    (source / "data.yaml").write_text(text)
    [line] = refusal(capsys, "check", source)
    wanted = f"{source}/empty: no images" if message is None else f"{source}/data.yaml: {message}"
    assert line.startswith(f"error: {wanted.format(folder=source)}")


def test_a_split_without_any_labels_is_refused(tmp_path, capsys):
    source = yaml_at(yolo(tmp_path / "source", BOX) / "data.yaml").parent
    (source / "labels/train/a.txt").unlink()
    [line] = refusal(capsys, "check", source)
    assert line.startswith(f"error: {source}/labels/train/a.txt: no such file, nor for any other image")


# --- VOC --------------------------------------------------------------------------------------------------------------


def test_a_check_of_a_tree_names_the_problems_of_all_splits(tmp_path, capsys):
    root = source_files.write_voc(tmp_path / "root")
    (root / "Annotations/c.xml").unlink()
    (root / "JPEGImages/b.jpg").unlink()
    lines = refusal(capsys, "check", root)
    assert [line.partition(": no ")[0] for line in lines] == [
        f"problem: {root}/ImageSets/Main/test.txt, line 1",
        f"problem: {root}/ImageSets/Main/train.txt, line 1",
    ]


def test_difficult_objects_stay_difficult(tmp_path):
    root = source_files.write_voc(tmp_path / "source")
    path = root / "Annotations/c.xml"
    path.write_text(path.read_text().replace("</name>", "</name><difficult>1</difficult>"))
    run("convert", root, "--to", tmp_path / "root")
    assert "<difficult>1</difficult>" in (tmp_path / "root/Annotations/c.xml").read_text()


# --- Splits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    """A tree of 40 images without lists."""
    root = tmp_path / "unsplit"
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for number in range(40):
        (root / f"Annotations/img {number:02d}.xml").write_text("<annotation/>")
        (root / f"JPEGImages/img {number:02d}.JPG").write_bytes(b"")
    return root


def lists_of(root: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text().splitlines() for path in (root / "ImageSets/Main").iterdir()}


def test_every_image_is_in_one_of_the_splits_which_have_their_shares(unsplit):
    run("split", unsplit, "--val", "0.25", "--test", "0.1")
    lists = lists_of(unsplit)
    assert {split: len(ids) for split, ids in lists.items()} == {"train": 26, "val": 10, "test": 4}
    assert sorted(sum(lists.values(), [])) == [f"img {number:02d}" for number in range(40)]
    assert all(ids == sorted(ids) for ids in lists.values())


def test_lists_depend_on_the_seed_alone(unsplit):
    found = []
    for seed in (0, 0, 1):
        run("split", unsplit, "--seed", seed)
        found.append(lists_of(unsplit))
        shutil.rmtree(unsplit / "ImageSets")
    assert found[0] == found[1] != found[2]


def test_a_share_of_0_makes_no_list(unsplit):
    run("split", unsplit, "--test", "0")
    assert {split: len(ids) for split, ids in lists_of(unsplit).items()} == {"train": 36, "val": 4}


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(unsplit, tmp_path, seed):
    group_of = {f"img {number:02d}": f"scene{number % 13}" for number in range(40)}  # of three or four images
    (tmp_path / "groups").write_text("".join(f"{image_id} {group}\n" for image_id, group in group_of.items()) + "x y\n")
    run("split", unsplit, "--groups", tmp_path / "groups", "--seed", seed)
    groups = {split: {group_of[image_id] for image_id in ids} for split, ids in lists_of(unsplit).items()}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 13
    sizes = {split: len(ids) for split, ids in lists_of(unsplit).items()}
    assert abs(sizes["val"] - 4) <= 3
    assert abs(sizes["test"] - 8) <= 3


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (lambda root: (root / "Annotations/img 03.xml").unlink(), [], "img 03.JPG: no annotation; one without objects"),
        (lambda root: (root / "JPEGImages/img 03.JPG").unlink(), [], "img 03.xml: no image in JPEGImages has this id"),
        (lambda root: shutil.rmtree(root / "JPEGImages"), [], "no folder JPEGImages, so not in PASCAL VOC layout"),
        (lambda root: None, ["--val", "0.5", "--test", "0.5"], "--val and --test: expected shares from 0"),
        (lambda root: None, ["--val", "nan"], "--val and --test: expected shares from 0 with a sum below 1"),
        (lambda root: None, ["--val", "0.01"], "40 images in 40 groups leave none for val"),
    ],
)
def test_what_cannot_be_split_is_named(unsplit, capsys, prepare: Callable[[Path], object], words, message):
    prepare(unsplit)
    [line] = refusal(capsys, "split", unsplit, *words)
    assert message in line
    assert not (unsplit / "ImageSets").exists()


def test_lists_that_exist_are_kept(unsplit, capsys):
    (unsplit / "ImageSets/Main").mkdir(parents=True)
    (unsplit / "ImageSets/Main/val.txt").write_text("img 00\n")
    assert refusal(capsys, "split", unsplit) == [f"error: {unsplit}/ImageSets/Main/val.txt: exists already"]
    assert lists_of(unsplit) == {"val": ["img 00"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img 00 a\n", "no group for 39 of 40 images, such as 'img 01'"),
        ("a b\n\nlonely\n", ", line 3: expected an id of its own and a group, got 'lonely'"),
        ("a b\na c\n", ", line 2: expected an id of its own and a group, got 'a c'"),
    ],
)
def test_wrong_groups_are_named(unsplit, tmp_path, capsys, text, message):
    (tmp_path / "groups").write_text(text)
    [line] = refusal(capsys, "split", unsplit, "--groups", tmp_path / "groups")
    assert line.startswith(f"error: {tmp_path}/groups")
    assert line.endswith(message)
