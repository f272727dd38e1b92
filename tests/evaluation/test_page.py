"""The report page: one file made from the files of a run folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from instaqnas.errors import InputError
from instaqnas.evaluation.page import write_page
from instaqnas.evaluation.page_images import Failures, ShownImage
from instaqnas.evaluation.page_plots import plot_configurations, plot_cost_of_images
from instaqnas.tools import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Path:
    return write_page(finished_run)


def test_the_page_has_every_row_stage_and_class_of_the_run(page: Path, finished_run: Path) -> None:
    text = page.read_text()
    rows = json.loads((finished_run / "eval" / "report.json").read_text())["rows"]
    for row in rows:
        assert f"<td>{row['bits']}</td>" in text
    for name in rows[0]["ap_11pt"]:
        assert f"<td>{name}</td>" in text
    for stage in ("pretrain_fp32", "pretrain_quant", "search", "finetune"):
        assert f"{stage}: losses" in text
    assert text.count("data:image/jpeg;base64,") >= 6


def test_the_page_loads_nothing_from_elsewhere(page: Path) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page.read_text())
    assert sources
    assert not [source for source in sources if not source.startswith(("data:", "#"))]


def test_a_run_without_an_evaluation_has_curves_and_says_how_to_evaluate(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "pretrain_fp32", tmp_path / "run" / "pretrain_fp32")
    text = write_page(tmp_path / "run").read_text()
    again = write_page(tmp_path / "run").read_text()
    assert re.sub("Written .*", "", again) == re.sub("Written .*", "", text)
    assert "eval.py --bits all" in text
    assert "pretrain_fp32: losses" in text
    assert "base64" not in text


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        report.main([str(tmp_path)])
    assert exit_status.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: neither a stage nor an evaluation of a run\n"
    with pytest.raises(InputError):
        write_page(tmp_path / "missing")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page_without_errors_and_as_wide_as_its_window(
    page: Path, tmp_path: Path, width: int
) -> None:
    probe = tmp_path / "probe.html"
    script = "<script>console.log(`wide ${document.documentElement.scrollWidth} of ${innerWidth}`)</script></body>"
    probe.write_text(page.read_text().replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    result = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=120)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    shown, window = map(int, re.search(r"wide (\d+) of (\d+)", console[0]).groups())
    assert shown <= window
    assert "<svg" in result.stdout


def shown_image(objects: list[tuple], found: list[tuple]) -> ShownImage:
    """Objects are (box, label, difficult), detections (box, label, score)."""

    def boxes(items: list[tuple]) -> torch.Tensor:
        return torch.tensor([item[0] for item in items], dtype=torch.float32).view(-1, 4)

    def labels(items: list[tuple]) -> torch.Tensor:
        return torch.tensor([item[1] for item in items], dtype=torch.int64)

    difficult = torch.tensor([item[2] for item in objects], dtype=torch.bool)
    scores = torch.tensor([item[2] for item in found], dtype=torch.float32)
    return ShownImage(
        "x", Path("x.jpg"), boxes(objects), labels(objects), difficult, boxes(found), scores, labels(found)
    )


A, B, FAR = (0, 0, 10, 10), (20, 20, 40, 40), (60, 60, 80, 80)


@pytest.mark.parametrize(
    "objects, found, expected",
    [
        ([], [], Failures(0, 0.0, 0.0)),
        ([(A, 1, False)], [(A, 1, 0.75)], Failures(0, 0.0, 0.0)),
        ([(A, 1, False), (B, 2, False)], [(A, 1, 0.75)], Failures(1, 0.0, 0.0)),
        ([(A, 1, False)], [(A, 2, 0.5)], Failures(1, 0.5, 0.0)),
        ([(A, 1, False)], [(A, 1, 0.75), (FAR, 1, 0.25), (FAR, 2, 0.5)], Failures(0, 0.0, 0.5)),
        ([(A, 1, False)], [(A, 1, 0.75), (A, 1, 0.5)], Failures(0, 0.0, 0.0)),  # a second detection of an object
        ([(A, 1, True)], [(A, 1, 0.75)], Failures(0, 0.0, 0.0)),
        ([], [(FAR, 1, 0.25)], Failures(0, 0.0, 0.25)),
    ],
)
def test_failures_of_an_image_are_told_apart(objects: list[tuple], found: list[tuple], expected: Failures) -> None:
    assert shown_image(objects, found).failures() == expected


def test_costs_are_shown_by_value_or_in_groups_and_not_at_all_for_one_value() -> None:
    assert plot_cost_of_images([1.0, 2.0], [3.0, 3.0], "objects") is None
    assert plot_cost_of_images([1.0, 2.0], [float("nan")] * 2, "objects") is None
    few = plot_cost_of_images([1.0, 2.0, 4.0], [0.0, 1.0, 1.0], "objects")
    assert few is not None
    assert "objects (above the bars: images)" in few
    many = plot_cost_of_images([1.0] * 20, [float(value) for value in range(20)], "objects")
    assert many is not None
    assert "16 to 19" in many


def test_configurations_that_are_not_shown_are_counted() -> None:
    assert "3 further configurations not shown" in plot_configurations([(f"w{i}a1", 1) for i in range(15)])
    assert "not shown" not in plot_configurations([("level0", 5), ("level1", 2)])
