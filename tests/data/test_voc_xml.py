"""Annotation files: boxes, flags, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from instaqnas.data.voc_xml import KnownClasses, XmlAnnotation, XmlObject, parse_annotation
from instaqnas.errors import InputError
from tests.data.voc_files import SIZE, object_xml

CLASSES = KnownClasses({"cat": 1, "dog": 2}, "labels.txt")


def parse(folder: Path, body: str) -> XmlAnnotation:
    (folder / "a.xml").write_text(f"<annotation>{body}</annotation>")
    return parse_annotation(folder / "a.xml", CLASSES, lambda: (90, 70))


def boxes_of(folder: Path, *objects: str) -> list[tuple | None]:
    return [item.box_xyxy for item in parse(folder, SIZE + "".join(objects)).objects]


def refusal(folder: Path, body: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(folder, body)
    return str(caught.value).removeprefix(f"{folder}/a.xml: ")


def test_inclusive_boxes_from_1_become_continuous_boxes_from_0(tmp_path):
    annotation = parse(tmp_path, SIZE + object_xml((1, 1, 100, 80), "dog") + object_xml((11, 21, 30, 22)))
    expected = [XmlObject((0, 0, 100, 80), 2, False), XmlObject((10, 20, 30, 22), 1, False)]
    assert annotation == XmlAnnotation(100, 80, expected)


def test_fractional_boxes_are_accepted(tmp_path):
    assert boxes_of(tmp_path, object_xml((1.5, 2.25, 10.5, 20))) == [(0.5, 1.25, 10.5, 20)]


def test_boxes_that_stick_out_are_clipped_to_the_image(tmp_path):
    boxes = boxes_of(tmp_path, object_xml((0, -5, 10, 20)), object_xml((91, 71, 110, 81)))
    assert boxes == [(0, 0, 10, 20), (90, 70, 100, 80)]


def test_a_box_without_width_or_height_has_no_area(tmp_path):
    assert boxes_of(tmp_path, object_xml((5, 5, 5, 9)), object_xml((5, 9, 7, 9))) == [None, None]


def test_difficult_is_read_and_defaults_to_false(tmp_path):
    box = (1, 1, 10, 10)
    marked, unmarked = object_xml(box, difficult="<difficult>1</difficult>"), object_xml(box, difficult="")
    assert [item.difficult for item in parse(tmp_path, SIZE + marked + unmarked).objects] == [True, False]


def test_parts_of_an_object_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    assert boxes_of(tmp_path, object_xml((5, 6, 7, 8)).replace("<name>", f"{part}<name>", 1)) == [(4, 5, 7, 8)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (object_xml((52, 1, 40, 9)), "xmax 40 < xmin 52"),
        (object_xml((1, 9.5, 40, 9)), "ymax 9 < ymin 9.5"),
        (object_xml((101, 1, 120, 9)), "box 101 1 120 9 lies outside the image of 100 x 80"),
        (object_xml((-9, 1, 0, 9)), "box -9 1 0 9 lies outside the image of 100 x 80"),
        (object_xml((1, 1, "x", 9)), "xmax is not a number: 'x'"),
        (object_xml((1, "nan", 5, 9)), "ymin is not a number: 'nan'"),
        (object_xml((1, 1, "", 9)), "xmax is not a number: ''"),
        (object_xml((1, 1, 5, 9)).replace("ymax", "top"), "no ymax"),
        (object_xml((1, 1, 5, 9)).replace("bndbox", "box"), "no bndbox"),
        (object_xml((1, 1, 5, 9)).replace("name", "label"), "no name"),
        (object_xml((1, 1, 5, 9), "  "), "no name"),
        (object_xml((1, 1, 5, 9), "cow"), "class 'cow' is not in labels.txt; known: cat, dog"),
        (object_xml((1, 1, 5, 9), difficult="<difficult>yes</difficult>"), "difficult is neither 0 nor 1: 'yes'"),
    ],
)
def test_a_wrong_object_is_named(tmp_path, body, message):
    assert refusal(tmp_path, SIZE + object_xml((1, 1, 9, 9)) + body) == f"object 1: {message}"


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height><depth>3</depth></size>"])
def test_an_unknown_size_is_that_of_the_image(tmp_path, size):
    inside = XmlObject((60, 50, 90, 70), 1, False)
    assert parse(tmp_path, size + object_xml((61, 51, 95, 90))) == XmlAnnotation(90, 70, [inside])


def test_the_image_is_not_asked_for_a_known_size(tmp_path):
    (tmp_path / "a.xml").write_text(f"<annotation>{SIZE}</annotation>")
    annotation = parse_annotation(tmp_path / "a.xml", CLASSES, lambda: pytest.fail("asked"))
    assert (annotation.width, annotation.height) == (100, 80)


BOX = object_xml((1, 1, 9, 9))


@pytest.mark.parametrize(
    ("body", "tag"),
    [
        (BOX.replace("object>", "Object>"), "Object"),
        (f"<objects>{BOX}</objects>", "object"),
        (f"<annotation>{BOX}</annotation>", "object"),
        (f"<size>{BOX}</size>", "object"),
        (BOX + BOX.replace("</object>", f"{BOX}</object>"), "object"),
        (BOX.replace("object>", "item>"), "bndbox"),
        (BOX.replace("bndbox>", "BndBox>"), "BndBox"),
        (BOX.replace("</object>", "<bndbox><xmin>1</xmin></bndbox></object>"), "bndbox"),
        (BOX.replace("<object>", '<object xmlns="urn:v">'), "{urn:v}object"),
    ],
)
def test_an_object_or_box_in_an_unknown_place_is_refused_instead_of_ignored(tmp_path, body, tag):
    assert refusal(tmp_path, SIZE + BOX + body) == (
        f"<{tag}> in an unknown place: expected <annotation><object><bndbox>"
    )


def test_another_kind_of_file_is_refused_instead_of_read_as_an_image_without_objects(tmp_path):
    (tmp_path / "a.xml").write_text("<html><body/></html>")
    with pytest.raises(InputError, match=r"a\.xml: expected <annotation>, got <html>$"):
        parse_annotation(tmp_path / "a.xml", CLASSES, lambda: (90, 70))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (SIZE.replace("100", "wide"), "size: width is not a number: 'wide'"),
        (SIZE.replace("height", "rows"), "size: no height"),
        (SIZE.replace("100", "0"), "size: 0 x 80 is not positive"),
    ],
)
def test_a_wrong_size_is_named(tmp_path, size, message):
    assert refusal(tmp_path, size + object_xml((1, 1, 9, 9))) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation>", "not well-formed XML: no element found: line 1, column 12"),
        (b'<?xml version="1.0" encoding="nonsense"?><a/>', "not well-formed XML: unknown encoding: nonsense"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "<!DOCTYPE is not accepted"),
        ("<!DOCTYPE a><a/>".encode("utf-16"), "<!DOCTYPE is not accepted"),
        (b"<a>" + b" " * 10_000_000 + b"</a>", "larger than 10000000 bytes"),
    ],
)
def test_unusable_xml_is_refused(tmp_path, content, message):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(InputError) as caught:
        parse_annotation(tmp_path / "a.xml", CLASSES, lambda: (90, 70))
    assert str(caught.value) == f"{tmp_path}/a.xml: {message}"
