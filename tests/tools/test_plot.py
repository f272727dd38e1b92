"""The plot of several reports."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from instaqnas.errors import InputError
from instaqnas.tools.plot import joined_rows, main, read_rows


def write_report(path: Path, *rows: tuple[str, float, float]) -> Path:
    path.parent.mkdir(parents=True)
    # As eval.py leaves it, with more keys than the plot needs.
    content = [{"bits": bits, "map_11pt": m, "coco_ap": 0.1, "gbitops_total": cost} for bits, m, cost in rows]
    path.write_text(json.dumps({"rows": content, "config": {}, "seed": 0}))
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_rows_of_one_report_keep_their_names(tmp_path: Path) -> None:
    report = write_report(tmp_path / "A" / "eval" / "report.json", ("fp32", 0.7, 90.0), ("policy", 0.6, 5.0))
    assert joined_rows([report]) == [
        {"bits": "fp32", "map_11pt": 0.7, "gbitops_total": 90.0},
        {"bits": "policy", "map_11pt": 0.6, "gbitops_total": 5.0},
    ]


def test_rows_of_several_reports_carry_the_name_of_their_run(tmp_path: Path) -> None:
    reports = [
        write_report(tmp_path / "A" / "eval" / "report.json", ("policy", 0.6, 5.0)),
        write_report(tmp_path / "B" / "eval" / "uniform_w3a4" / "report.json", ("uniform:w3a4", 0.5, 4.0)),
        write_report(tmp_path / "elsewhere" / "report.json", ("random", 0.4, 4.5)),
        write_report(tmp_path / "A" / "eval" / "static" / "report.json", ("static", 0.5, 5.0)),
    ]
    rows = joined_rows(reports)
    assert [row["label"] for row in rows] == ["A: policy", "B: uniform:w3a4", "elsewhere: random", "A: static"]
    assert [row["run"] for row in rows] == [0, 1, 2, 0]


def test_plot_is_written_into_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = write_report(tmp_path / "A" / "eval" / "report.json", ("fp32", 0.7, 90.0), ("policy", 0.6, 5.0))
    out = tmp_path / "plots" / "plot.png"
    main([str(report), "--out", str(out)])
    image = cv2.imread(str(out))
    assert image.shape[0] > 100
    assert image.std() > 0
    *table, last = capsys.readouterr().out.splitlines()
    assert last == str(out)
    assert [line.split() for line in table] == [
        ["mAP", "11pt", "GBitOps"],
        ["fp32", "70.00", "90.0000"],
        ["policy", "60.00", "5.0000"],
    ]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"rows": 3}', '{"rows": [{"bits": "policy"}]}', '{"rows": [{"bits": "a", "map_11pt": null}]}'],
)
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"report\.json: not a report\.json of eval\.py"):
        read_rows(path)


def test_missing_and_empty_reports_and_other_formats_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    missing = str(tmp_path / "none.json")
    assert missing in refusal([missing, "--out", str(tmp_path / "a.png")], capsys)
    empty = tmp_path / "empty.json"
    empty.write_text('{"rows": []}')
    assert f"error: {empty}: has no rows\n" == refusal([str(empty), "--out", str(tmp_path / "a.png")], capsys)
    assert "--out a.docx: expected a name ending in .png" in refusal([missing, "--out", "a.docx"], capsys)
