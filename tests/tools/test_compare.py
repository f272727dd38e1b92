"""The difference of two evaluations on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instaqnas.metrics.bootstrap import MatchedSplit, save_matches
from instaqnas.metrics.voc import MatchedDetections
from instaqnas.tools.compare import main


def save(path: Path, found: list[bool], ids: str = "abcdefghij") -> str:
    """One object in each of ten images, found or missed; a found one has precision 1."""
    hits = torch.tensor(found).nonzero()[:, 0]
    count = len(hits)
    no = torch.zeros(count, dtype=torch.bool)
    detections = MatchedDetections(torch.full((count,), 0.5), torch.ones(count, dtype=torch.int64), ~no, no, hits)
    save_matches(path, MatchedSplit(list(ids), detections, torch.ones(10, 1, dtype=torch.int64)))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two detectors of two seeds: they find 10 and 8, and 5 and 5 of the ten objects."""
    found = ([True] * 10, [True] * 8 + [False] * 2, [True] * 5 + [False] * 5, [False] * 5 + [True] * 5)
    return [save(tmp_path / f"{number}.npz", row) for number, row in enumerate(found)]


def test_seeds_are_compared_one_by_one_and_in_the_mean(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*files[:2], "--minus", *files[2:]])
    first, second, mean = capsys.readouterr().out.splitlines()
    # AP of a recall of n / 10 at precision 1 is (n + 1) / 11.
    assert first == "mAP 100.00 - 54.55 = +45.45"
    assert second == "mAP 81.82 - 54.55 = +27.27"
    assert mean.startswith("mAP 90.91 - 54.55 = +36.36, 95 % interval +")
    assert mean.endswith("(10 images, 1000 resampled splits)")


def test_groups_are_drawn_together(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = tmp_path / "groups.txt"
    groups.write_text("".join(f"{image_id} tile\n" for image_id in "abcdefghij"))  # a single group: nothing varies
    main([files[0], "--minus", files[2], "--groups", str(groups)])
    assert "+45.45, 95 % interval +45.45 to +45.45" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [("a tile\n", "no group for b and 8 other images"), ("a b c\n", "line 1: expected IMAGE_ID GROUP, got a b c")],
)
def test_wrong_groups_are_refused(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "groups.txt").write_text(content)
    with pytest.raises(SystemExit) as error:
        main([files[0], "--minus", files[1], "--groups", str(tmp_path / "groups.txt")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_other_images_and_other_counts_of_files_are_refused(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "other.npz", [True] * 10, ids="klmnopqrst")
    for words, message in (
        ([files[0], "--minus", other], f"{other}: other images than {files[0]}"),
        ([files[0], "--minus", *files[:2]], "--minus: expected 1 files, got 2"),
    ):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
