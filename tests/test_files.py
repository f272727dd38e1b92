"""Files: atomic writes by several writers, and folders that do not exist yet."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from instaqnas.errors import InputError
from instaqnas.files import existing_parent, file_digest, write_text

WRITES = 300


def write_often(path: Path, letter: str) -> None:
    for _ in range(WRITES):
        write_text(path, letter * 5000)


def test_several_writers_of_one_file_leave_the_whole_text_of_one(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_is_that_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2
    with pytest.raises(InputError, match="cannot be read"):
        file_digest(tmp_path / "y")


def test_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
