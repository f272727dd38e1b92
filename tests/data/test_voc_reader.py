"""Datasets in PASCAL VOC layout: what is read, and every way in which a tree can be wrong."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from instaqnas.data import voc
from instaqnas.errors import InputError
from tests.data.voc_files import SIZE, object_xml, write_root


def read_one(root: Path, *objects: str) -> voc.Annotation:
    (annotation,) = voc.read_split([write_root(root, {"a": SIZE + "".join(objects)})], "train", ("cat", "dog"))
    return annotation


def assert_split_error(root: Path, message: str, split: str = "train") -> None:
    with pytest.raises(InputError) as caught:
        voc.read_split([root], split, ("cat", "dog"))
    assert str(caught.value) == message


def test_there_are_twenty_voc_classes_in_alphabetical_order():
    assert len(set(voc.VOC_CLASSES)) == 20
    assert list(voc.VOC_CLASSES) == sorted(voc.VOC_CLASSES)


def test_an_annotation_has_the_documented_types(tmp_path):
    difficult = object_xml((11, 21, 30, 22), difficult="<difficult>1</difficult>")
    annotation = read_one(tmp_path, object_xml((1, 1, 100, 80), "dog"), difficult)
    assert (annotation.boxes_xyxy.dtype, annotation.labels.dtype, annotation.difficult.dtype) == (
        np.float32,
        np.int64,
        bool,
    )
    assert annotation.boxes_xyxy.tolist() == [[0, 0, 100, 80], [10, 20, 30, 22]]
    assert annotation.labels.tolist() == [2, 1]
    assert annotation.difficult.tolist() == [False, True]
    assert (annotation.image_id, annotation.width, annotation.height) == ("a", 100, 80)
    assert annotation.image_path == tmp_path / "JPEGImages/a.jpg"


def test_an_image_without_objects_is_kept(tmp_path):
    root = write_root(tmp_path, {"a": SIZE, "b": SIZE + object_xml((1, 1, 10, 10))})
    empty, _ = voc.read_split([root], "train", ("cat",))
    assert empty.boxes_xyxy.shape == (0, 4)
    assert empty.labels.shape == empty.difficult.shape == (0,)


def test_path_and_filename_are_not_followed(tmp_path):
    extra = "<filename>other.jpg</filename><path>/nowhere/other.jpg</path>"
    assert read_one(tmp_path, extra, object_xml((1, 1, 9, 9))).image_path == tmp_path / "JPEGImages/a.jpg"


@pytest.mark.parametrize("suffix", [".jpeg", ".png"])
def test_other_image_suffixes_are_found(tmp_path, suffix):
    root = write_root(tmp_path, {"a": SIZE + object_xml((1, 1, 10, 10))})
    (root / "JPEGImages/a.jpg").rename(root / f"JPEGImages/a{suffix}")
    (annotation,) = voc.read_split([root], "train", ("cat",))
    assert annotation.image_path.name == f"a{suffix}"


def test_roots_are_joined_in_order_and_further_columns_of_a_split_are_ignored(tmp_path):
    body = SIZE + object_xml((1, 1, 10, 10))
    first, second = write_root(tmp_path / "07", {"b": body, "a": body}), write_root(tmp_path / "12", {"a": body})
    (first / "ImageSets/Main/train.txt").write_text("b  1\r\n\na -1\n")
    annotations = voc.read_split([str(first), second], "train", ("cat",))
    assert [str(a.image_path.relative_to(tmp_path)) for a in annotations] == [
        "07/JPEGImages/b.jpg", "07/JPEGImages/a.jpg", "12/JPEGImages/a.jpg",
    ]  # fmt: skip


def test_one_warning_counts_and_names_boxes_without_area(tmp_path):
    good = object_xml((1, 1, 10, 10))
    body_of = {"a": SIZE + good + object_xml((50, 33, 50, 33)), "b": SIZE + object_xml((5, 5, 5, 9)) + good}
    with pytest.warns(UserWarning) as caught:
        annotations = voc.read_split([write_root(tmp_path, body_of)], "train", ("cat",))
    assert [str(w.message) for w in caught] == [
        "split 'train': dropped boxes without area: 2 (a.xml object 1, b.xml object 0)"
    ]
    assert [a.boxes_xyxy.tolist() for a in annotations] == [[[0, 0, 10, 10]]] * 2


def test_the_warning_names_ten_boxes_at_most(tmp_path):
    objects = object_xml((1, 1, 10, 10)) + 11 * object_xml((5, 5, 5, 5))
    with pytest.warns(UserWarning, match=r"area: 11 \(.*a\.xml object 10, \.\.\.\)$"):
        read_one(tmp_path, objects)


def test_a_clean_split_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_one(tmp_path, object_xml((1, 1, 2, 2))) is not None


def test_an_unknown_class_is_named_with_its_labels_file(tmp_path):
    root = write_root(tmp_path, {"a": SIZE + object_xml((1, 1, 9, 9), "cow")})
    where = f"{root}/Annotations/a.xml: object 0"
    assert_split_error(root, f"{where}: class 'cow' is not in {root}/labels.txt; known: cat, dog")
    (root / "labels.txt").unlink()
    source = f"{root} (without labels.txt: the VOC classes)"
    assert_split_error(root, f"{where}: class 'cow' is not in {source}; known: cat, dog")


def test_a_wrong_root_is_named_with_what_it_lacks(tmp_path):
    assert_split_error(tmp_path / "gone", f"{tmp_path}/gone: not a folder")
    for missing in ("JPEGImages", "ImageSets/Main", "Annotations"):
        root = tmp_path / missing[:5]
        for folder in {"Annotations", "ImageSets/Main", "JPEGImages"} - {missing}:
            (root / folder).mkdir(parents=True)
        assert_split_error(root, f"{root}: no folder {missing}, so not in PASCAL VOC layout")


def test_an_unknown_split_is_named_with_the_known_ones_except_splits_of_single_classes(tmp_path):
    for split in ("train", "val", "cat_train"):
        write_root(tmp_path, {}, split=split)
    message = f"{tmp_path}/ImageSets/Main: no split 'test'; known: train, val"
    assert_split_error(tmp_path, message, split="test")


def test_an_empty_split_is_an_error(tmp_path):
    assert_split_error(write_root(tmp_path, {}), f"{tmp_path}/ImageSets/Main/train.txt: the split is empty")


def test_a_split_without_objects_is_an_error(tmp_path):
    assert_split_error(write_root(tmp_path, {"a": SIZE}), f"split 'train' of {tmp_path}: no objects")


def test_an_id_listed_twice_is_an_error(tmp_path):
    root = write_root(tmp_path, {"a": SIZE, "b": SIZE})
    (root / "ImageSets/Main/train.txt").write_text("a\nb\na\n")
    assert_split_error(root, f"{root}/ImageSets/Main/train.txt: 'a' is listed 2 times")


def test_a_split_that_is_not_text_is_an_error(tmp_path):
    root = write_root(tmp_path, {})
    (root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfea\0")
    assert_split_error(root, f"{root}/ImageSets/Main/train.txt: not UTF-8 text")


def test_missing_files_are_named(tmp_path):
    root = write_root(tmp_path, {"a": SIZE + object_xml((1, 1, 9, 9))})
    (root / "JPEGImages/a.jpg").unlink()
    assert_split_error(root, f"{root}/JPEGImages/a.jpg: no such image, nor as .jpeg, .png")
    (root / "Annotations/a.xml").unlink()
    assert_split_error(root, f"{root}/Annotations/a.xml: cannot be read: No such file or directory")


def test_class_names_are_the_lines_of_labels_txt_or_else_those_of_voc(tmp_path):
    bare = write_root(tmp_path / "bare", {}, labels=None)
    named = write_root(tmp_path / "named", {}, labels="\ufeffred cell\n white cell \r\n\n")
    assert voc.read_class_names([bare, str(bare)]) == voc.VOC_CLASSES
    assert voc.read_class_names([named]) == ("red cell", "white cell")


def test_roots_with_different_class_names_are_an_error(tmp_path):
    roots = [write_root(tmp_path / name, {}, labels=name) for name in ("cat", "dog")]
    with pytest.raises(InputError, match=r"dog/labels\.txt has dog; .*cat/labels\.txt has cat$"):
        voc.read_class_names(roots)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("cat\ndog\ncat", "class 'cat' is listed 2 times"),
        ("__background__\ncat", "'__background__' must not be listed; class 0 is always background"),
        ("BACKGROUND\ncat", "'BACKGROUND' must not be listed; class 0 is always background"),
        ("\n", "no class names"),
    ],
)
def test_wrong_class_names_are_named(tmp_path, labels, message):
    root = write_root(tmp_path, {}, labels=labels)
    with pytest.raises(InputError) as caught:
        voc.read_class_names([root])
    assert str(caught.value) == f"{root}/labels.txt: {message}"


def test_class_names_of_no_root_or_a_wrong_root_are_an_error(tmp_path):
    with pytest.raises(InputError, match="no data root given"):
        voc.read_class_names([])
    with pytest.raises(InputError, match="gone: not a folder"):
        voc.read_class_names([tmp_path / "gone"])


def test_an_image_is_read_as_rgb(tmp_path):
    blue_green_red = np.zeros((2, 3, 3), np.uint8)
    blue_green_red[..., 2] = 200
    blue_green_red[0, 0] = (10, 20, 30)
    cv2.imwrite(str(tmp_path / "a.png"), blue_green_red)
    image = voc.read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert image.tolist() == [[[30, 20, 10], [200, 0, 0], [200, 0, 0]], [[200, 0, 0]] * 3]


def test_an_orientation_tag_is_ignored(tmp_path):
    _, encoded = cv2.imencode(".jpg", np.zeros((8, 24, 3), np.uint8))
    # APP1: Exif, little-endian TIFF, one entry: orientation (0x0112) = 6, a quarter turn
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    app1 = b"\xff\xe1" + (8 + len(tiff)).to_bytes(2, "big") + b"Exif\0\0" + tiff
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded.tobytes()[:2] + app1 + encoded.tobytes()[2:])
    assert cv2.imread(str(path)).shape == (24, 8, 3), "the tag itself is not understood"
    assert voc.read_image(path).shape == (8, 24, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0\0\0"])
def test_a_broken_image_is_named(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        voc.read_image(path)
    assert str(caught.value) == f"{path}: not a readable image"


def test_an_absent_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jpg: cannot be read: No such file"):
        voc.read_image(tmp_path / "gone.jpg")


# --- The check of a whole split ---------------------------------------------------------------------------------------


def test_a_check_goes_on_after_a_problem_and_names_each(tmp_path):
    good = object_xml((1, 1, 10, 10))
    bodies = {
        "a": SIZE + good + object_xml((50, 33, 50, 33)),
        "b": SIZE + object_xml((9, 1, 5, 9)),
        "c": SIZE.replace("100", "99") + good,
        "d": SIZE + good + good,
        "e": SIZE + good,
    }
    root = write_root(tmp_path / "07", bodies)
    (root / "JPEGImages/d.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\0")
    (root / "JPEGImages/e.jpg").unlink()
    held = voc.check_split([tmp_path / "gone", root], "train", ("cat", "dog"))
    assert (held.images, held.objects) == (3, 4)
    assert held.without_area == ["a.xml object 1"]
    assert held.problems == [
        f"{tmp_path}/gone: not a folder",
        f"{root}/Annotations/b.xml: object 0: xmax 5 < xmin 9",
        f"{root}/JPEGImages/e.jpg: no such image, nor as .jpeg, .png",
        f"{root}/JPEGImages/c.jpg: 100 x 80 pixels, but its annotation says 99 x 80",
        f"{root}/JPEGImages/d.jpg: not a readable image",
    ]


def test_a_check_of_a_clean_split_finds_no_problem_and_one_without_objects_is_a_problem(tmp_path):
    root = write_root(tmp_path / "a", {"a": SIZE + object_xml((1, 1, 10, 10)), "b": SIZE})
    assert voc.check_split([root], "train", ("cat",)) == voc.SplitCheck(2, 1, [], [])
    root = write_root(tmp_path / "b", {"a": SIZE})
    assert voc.check_split([root], "train", ("cat",)).problems == [f"split 'train' of {root}: no objects"]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_header_is_read_in_stored_pixels(tmp_path, suffix):
    root = write_root(tmp_path, {"a": SIZE + object_xml((1, 1, 10, 10))})
    (root / "JPEGImages/a.jpg").unlink()
    cv2.imwrite(str(root / f"JPEGImages/a{suffix}"), np.zeros((80, 100, 3), np.uint8))
    (annotation,) = voc.read_split([root], "train", ("cat",))
    voc.check_image_header(annotation)
    annotation.image_path.unlink()
    with pytest.raises(InputError, match=rf"a\{suffix}: cannot be read: No such file"):
        voc.check_image_header(annotation)


# --- Difficulty -------------------------------------------------------------------------------------------------------


def test_difficulties_come_from_the_root_of_each_image(tmp_path):
    box = object_xml((1, 1, 10, 10))
    roots = [write_root(tmp_path / name, {image_id: SIZE + box for image_id in "ab"}) for name in ("one", "two")]
    (roots[0] / "difficulty.csv").write_text("image_id,difficulty\nb,0.25\n\nother,7\nwith,comma,-1e3\n")
    annotations = voc.read_split(roots, "train", ("cat", "dog"))
    assert [annotation.image_id for annotation in annotations] == ["a", "b", "a", "b"]
    assert [annotation.difficulty for annotation in annotations] == pytest.approx(
        [math.nan, 0.25, math.nan, math.nan], nan_ok=True
    )
    assert voc.read_difficulties(roots[0]) == {"b": 0.25, "other": 7, "with,comma": -1000}
    assert voc.read_difficulties(roots[1]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,0.5\n", "line 1: expected image_id,difficulty, got 'a,0.5'"),
        ("image_id,difficulty\na,0.5\nb\n", "line 3: expected an image id, a comma and a number, got 'b'"),
        ("image_id,difficulty\n0.5\n", "line 2: expected an image id, a comma and a number, got '0.5'"),
        ("image_id,difficulty\n,0.5\n", "line 2: expected an image id, a comma and a number, got ',0.5'"),
        ("image_id,difficulty\n\na,hard\n", "line 3: expected an image id, a comma and a number, got 'a,hard'"),
        ("image_id,difficulty\na,nan\n", "line 2: expected an image id, a comma and a number, got 'a,nan'"),
        ("image_id,difficulty\na,0.5\nb,1\na,0.5\n", "line 4: 'a' is listed twice"),
    ],
)
def test_malformed_difficulties_name_file_and_line(tmp_path, text, message):
    root = write_root(tmp_path, {"a": SIZE + object_xml((1, 1, 10, 10))})
    (root / "difficulty.csv").write_text(text)
    assert_split_error(root, f"{root}/difficulty.csv, {message}")
    assert voc.check_split([root], "train", ("cat", "dog")).problems[0] == f"{root}/difficulty.csv, {message}"
