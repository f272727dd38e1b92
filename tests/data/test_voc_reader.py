"""Datasets in PASCAL VOC layout: what is read, and every way in which a tree can be wrong."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize("suffix", [".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG", ".BMP", ".WEBP"])
def test_other_image_suffixes_are_found(tmp_path, suffix):
    root = write_root(tmp_path, {"a": SIZE + object_xml((1, 1, 10, 10))})
    (root / "JPEGImages/a.jpg").unlink()
    Image.new("RGB", (100, 80), (200, 200, 200)).save(root / f"JPEGImages/a{suffix}")
    (annotation,) = voc.read_split([root], "train", ("cat",))
    assert annotation.image_path.name == f"a{suffix}"
    voc.check_image_header(annotation)
    pixels = voc.read_pixels(annotation)
    assert pixels.shape == (80, 100, 3)
    assert abs(pixels.astype(int) - 200).max() <= 2


def test_roots_are_joined_in_order_and_flags_of_a_split_are_dropped(tmp_path):
    body = SIZE + object_xml((1, 1, 10, 10))
    first, second = write_root(tmp_path / "07", {"b": body, "a": body}), write_root(tmp_path / "12", {"a": body})
    (first / "ImageSets/Main/train.txt").write_text("b  1\r\n\na -1\n")
    annotations = voc.read_split([str(first), second], "train", ("cat",))
    assert [str(a.image_path.relative_to(tmp_path)) for a in annotations] == [
        "07/JPEGImages/b.jpg", "07/JPEGImages/a.jpg", "12/JPEGImages/a.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("dog 2\ndog\n", ["dog 2", "dog"]),
        ("dog 1 \n", ["dog 1"]),
        ("dog 1 -1\ndog\t0\n", ["dog 1", "dog"]),
        ("dog 2  1\n", ["dog 2"]),
        ("dog  x\n", ["dog  x"]),
        ("0\n1\n", ["0", "1"]),
    ],
)
def test_ids_have_blanks_and_flags_behind_them_are_dropped(tmp_path, text, ids):
    bodies = dict.fromkeys(("dog", "dog 1", "dog 2", "dog  x", "0", "1"), SIZE + object_xml((1, 1, 10, 10)))
    root = write_root(tmp_path, bodies)
    (root / "ImageSets/Main/train.txt").write_text(text)
    annotations = voc.read_split([root], "train", ("cat",))
    assert [a.image_id for a in annotations] == [a.image_path.stem for a in annotations] == ids


@pytest.mark.parametrize(("line", "stem"), [("a.jpg", "a"), ("b.PNG", "b"), ("a.xml", "a")])
def test_an_id_with_suffix_is_named_with_its_line_and_the_id_that_is_wanted(tmp_path, line, stem):
    root = write_root(tmp_path, {"a": SIZE, "b": SIZE})
    (root / "ImageSets/Main/train.txt").write_text(f"\n{line}\n")
    where = f"{root}/ImageSets/Main/train.txt, line 2"
    assert_split_error(root, f"{where}: no annotation {root}/Annotations/{line}.xml; ids have no suffix: {stem}")


@pytest.mark.parametrize("line", ["x" * 300, "x" * 300 + " 1"])
def test_an_id_too_long_for_a_file_name_is_named_with_its_line(tmp_path, line):
    root = write_root(tmp_path, {"a": SIZE, "b": SIZE})
    (root / "ImageSets/Main/train.txt").write_text(f"a\n{line}\n")
    assert_split_error(root, f"{root}/ImageSets/Main/train.txt, line 2: File name too long")


def test_a_dot_in_an_id_is_no_suffix(tmp_path):
    root = write_root(tmp_path, {"a.jpg.rf.1f": SIZE + object_xml((1, 1, 10, 10))})
    (annotation,) = voc.read_split([root], "train", ("cat",))
    assert annotation.image_path.name == "a.jpg.rf.1f.jpg"


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
    where = f"{root}/ImageSets/Main/train.txt, line 1"
    suffixes = ".jpeg, .png, .bmp, .webp, in small letters or capitals"
    assert_split_error(root, f"{where}: no image {root}/JPEGImages/a.jpg, nor {suffixes}")
    (root / "Annotations/a.xml").unlink()
    assert_split_error(root, f"{where}: no annotation {root}/Annotations/a.xml")


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
        f"{root}/ImageSets/Main/train.txt, line 5: no image {root}/JPEGImages/e.jpg, nor .jpeg, .png, .bmp, .webp, "
        "in small letters or capitals",
        f"{root}/JPEGImages/c.jpg: 100 x 80 pixels, but its annotation says 99 x 80",
        f"{root}/JPEGImages/d.jpg: not a readable image",
    ]


def test_a_check_of_a_clean_split_finds_no_problem_and_one_without_objects_is_a_problem(tmp_path):
    root = write_root(tmp_path / "a", {"a": SIZE + object_xml((1, 1, 10, 10)), "b": SIZE})
    assert voc.check_split([root], "train", ("cat",)) == voc.SplitCheck(2, 1, [], [])
    root = write_root(tmp_path / "b", {"a": SIZE})
    assert voc.check_split([root], "train", ("cat",)).problems == [f"split 'train' of {root}: no objects"]


def test_a_missing_labels_file_is_one_problem(tmp_path):
    bodies = {f"{i:03d}": SIZE + object_xml((1, 1, 10, 10), name) for i, name in enumerate(("rbc", "wbc") * 100)}
    root = write_root(tmp_path, bodies, labels=None)
    with pytest.raises(InputError) as caught:
        voc.read_class_names([root])
    assert str(caught.value) == (
        f"{root}: no labels.txt with the class names, one a line; 000.xml has 'rbc', no class of VOC"
    )
    assert voc.check_split([root], "train", voc.VOC_CLASSES).problems == [
        f"{root}/Annotations/000.xml: object 0: class 'rbc' is not in {root} (without labels.txt: the VOC classes); "
        f"known: {', '.join(voc.VOC_CLASSES)}"
    ]


def test_a_missing_labels_file_is_noticed_behind_images_without_objects_and_broken_files(tmp_path):
    bodies = {"a": SIZE, "b": "<object>", "c": SIZE + object_xml((1, 1, 10, 10), "helmet")}
    with pytest.raises(InputError, match=r"no labels\.txt.*c\.xml has 'helmet'"):
        voc.read_class_names([write_root(tmp_path, bodies, labels=None)])


def test_classes_that_labels_txt_lacks_are_one_problem_each(tmp_path):
    bodies = {f"{i}": SIZE + object_xml((1, 1, 10, 10), name) for i, name in enumerate(("cat", "cow", "elk", "cow"))}
    root = write_root(tmp_path, bodies)
    assert voc.check_split([root], "train", ("cat", "dog")).problems == [
        f"{root}/Annotations/{i}.xml: object 0: class {name!r} is not in {root}/labels.txt; known: cat, dog"
        for i, name in ((1, "cow"), (2, "elk"))
    ]


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


# --- Orientation ------------------------------------------------------------------------------------------------------


def write_turned(root: Path, tag: int, stored: tuple[int, int], annotated: tuple[int, int] | None) -> Path:
    """A tree with one image whose EXIF orientation is `tag`, its first row bright."""
    size = "" if annotated is None else f"<size><width>{annotated[0]}</width><height>{annotated[1]}</height></size>"
    write_root(root, {"a": size + object_xml((1, 1, 10, 10))})
    image, exif = Image.new("L", stored), Image.Exif()
    image.paste(255, (0, 0, stored[0], 1))
    exif[0x0112] = tag
    (root / "JPEGImages/a.jpg").unlink()
    image.save(root / "JPEGImages/a.png", exif=exif)
    return root


def header_warnings(annotation: voc.Annotation) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        voc.check_image_header(annotation)
    for warning in caught:
        assert str(annotation.image_path.parent) in str(warning.message)
        assert "data.orientation" in str(warning.message)
    return len(caught)


@pytest.mark.parametrize(
    ("tag", "stored", "annotated", "orientation", "bright", "warned"),
    [
        (1, (6, 4), (6, 4), "auto", "top", 0),
        (6, (6, 4), (6, 4), "auto", "top", 0),  # the size tells that boxes are stored
        (6, (6, 4), (4, 6), "auto", "right", 0),  # the size tells that they are upright
        (8, (6, 4), (4, 6), "auto", "left", 0),
        (3, (6, 4), (6, 4), "auto", "top", 1),
        (2, (6, 4), (6, 4), "auto", "top", 1),
        (6, (6, 6), (6, 6), "auto", "top", 1),
        (6, (6, 4), (6, 4), "stored", "top", 0),
        (3, (6, 4), (6, 4), "stored", "top", 0),
        (3, (6, 4), (6, 4), "upright", "bottom", 0),
        (6, (6, 6), (6, 6), "upright", "right", 0),
        (6, (6, 4), (4, 6), "upright", "right", 0),
    ],
)
def test_boxes_refer_to_stored_or_upright_pixels(tmp_path, tag, stored, annotated, orientation, bright, warned):
    root = write_turned(tmp_path, tag, stored, annotated)
    (annotation,) = voc.read_split([root], "train", ("cat",), orientation)
    assert header_warnings(annotation) == warned
    grey = voc.read_pixels(annotation)[..., 0]
    assert grey.shape == annotated[::-1]
    edges = {"top": grey[0], "bottom": grey[-1], "left": grey[:, 0], "right": grey[:, -1]}
    assert [name for name, edge in edges.items() if edge.min() == 255] == [bright]


@pytest.mark.parametrize(
    ("orientation", "annotated", "message"),
    [
        ("stored", (4, 6), "its annotation has the size of the upright picture, 4 x 6, but data.orientation is stored"),
        (
            "upright",
            (6, 4),
            "its annotation has the size of the stored picture, 6 x 4, but data.orientation is upright",
        ),
        ("auto", (4, 7), "6 x 4 pixels, but its annotation says 4 x 7"),
        ("upright", (4, 7), "4 x 6 pixels, but its annotation says 4 x 7"),
    ],
)
def test_a_size_that_contradicts_the_setting_is_an_error(tmp_path, orientation, annotated, message):
    root = write_turned(tmp_path, 6, (6, 4), annotated)
    (annotation,) = voc.read_split([root], "train", ("cat",), orientation)
    with pytest.raises(InputError) as caught:
        voc.check_image_header(annotation)
    assert str(caught.value).removeprefix(f"{annotation.image_path}: ") == message
    with pytest.raises(InputError, match="but its annotation says"):
        voc.read_pixels(annotation)


@pytest.mark.parametrize(
    ("tag", "orientation", "size", "warned"),
    [(1, "auto", (6, 4), 0), (6, "auto", (6, 4), 1), (6, "stored", (6, 4), 0), (6, "upright", (4, 6), 0)],
)
def test_an_unknown_size_is_that_of_the_picture_which_the_setting_names(tmp_path, tag, orientation, size, warned):
    root = write_turned(tmp_path, tag, (6, 4), None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (annotation,) = voc.read_split([root], "train", ("cat",), orientation)
    assert ((annotation.width, annotation.height), len(caught)) == (size, warned)
    assert header_warnings(annotation) == 0
    assert voc.read_pixels(annotation).shape[:2] == size[::-1]


def test_images_whose_orientation_cannot_be_told_are_warned_of_once(tmp_path):
    root = write_turned(tmp_path, 3, (6, 4), (6, 4))
    for name in "bcd":
        shutil.copy(root / "JPEGImages/a.png", root / f"JPEGImages/{name}.png")
        shutil.copy(root / "Annotations/a.xml", root / f"Annotations/{name}.xml")
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\nd\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own
        assert voc.check_split([root], "train", ("cat",)).problems == []
    assert len(caught) == 1


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
