"""The download of VOC from a folder of miniature archives: fetched, skipped and refused archives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchvision.datasets import VOCDetection

from instaqnas.config.command import parse_command
from instaqnas.data.voc import VOC_CLASSES, read_split
from instaqnas.errors import InputError
from instaqnas.tools import download_voc as tool
from instaqnas.tools.download_voc import ARCHIVES, Archive, download_voc, is_unpacked, main
from tests.voc_archives import write_archives

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Archive]]:
    folder = tmp_path_factory.mktemp("mirror")
    return folder, write_archives(folder)


@pytest.fixture
def fetch(mirror: tuple[Path, list[Archive]], tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[[], str]:
    """Downloads to tmp_path / "data" and returns the output."""

    def run() -> str:
        download_voc(tmp_path / "data", *mirror)
        return capsys.readouterr().out

    return run


def refusal(root: Path, mirror: Path | None, archives: list[Archive]) -> str:
    with pytest.raises(InputError) as caught:
        download_voc(root, mirror, archives)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def replaced(archive: Archive, **changes: object) -> Archive:
    return Archive(**{**vars(archive), **changes})


def test_the_published_archives_are_those_of_voc07_and_voc12() -> None:
    # Sizes: the index of downloads of TensorFlow Datasets. Checksums: torchvision.
    assert [(a.filename, a.images, a.size, a.md5) for a in ARCHIVES] == [
        ("VOCtrainval_06-Nov-2007.tar", 5011, 460032000, "c52e279531787c972589f7e41ab4ae64"),
        ("VOCtest_06-Nov-2007.tar", 4952, 451020800, "b6e924de25625d8de591ea690078ad9f"),
        ("VOCtrainval_11-May-2012.tar", 11540, 1999639040, "6cd6e144f989b92b3379bac3b3de84fd"),
    ]
    assert sum(a.images for a in ARCHIVES if a.split == "trainval") == 16551


@pytest.mark.parametrize("config", ["voc.yaml", "voc_paper.yaml"])
def test_folders_are_those_that_the_configs_name(config: str) -> None:
    data = parse_command("eval", ["--config", str(CONFIGS / config)]).config.data
    assert data.roots == list(dict.fromkeys(f"data/{a.folder}" for a in ARCHIVES if a.split == data.train_split))
    assert data.test_roots == [f"data/{a.folder}" for a in ARCHIVES if a.split == data.test_split]


def test_archives_become_a_tree_that_the_reader_and_torchvision_read(fetch: Callable[[], str], tmp_path: Path) -> None:
    printed = fetch()
    assert printed.splitlines()[-2:] == [
        "trainval: 16 images, test: 5 images",
        f"the archives in {tmp_path}/data are no longer needed",
    ]
    roots = [tmp_path / "data/VOCdevkit/VOC2007", tmp_path / "data/VOCdevkit/VOC2012"]
    assert len(read_split(roots, "trainval", VOC_CLASSES)) == 16
    assert len(read_split(roots[:1], "test", VOC_CLASSES)) == 5
    assert len(VOCDetection(tmp_path / "data", "2007", "test")) == 5


def test_space_is_told_beforehand_and_a_smaller_disk_is_refused(
    fetch: Callable[[], str], mirror: tuple[Path, list[Archive]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, archives = mirror
    large = [replaced(archive, size=10**9) for archive in archives]
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _path: SimpleNamespace(free=5_000_000_000))
    message = refusal(tmp_path / "new" / "data", folder, large)
    assert message == f"{tmp_path}/new/data: 6.30 GB of disk are needed, 5.00 GB are free"
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _path: SimpleNamespace(free=6_400_000_000))
    assert f"{tmp_path}/data: needs 0.00 GB of disk, archives included; 6.40 GB are free\n" in fetch()


def test_unpacked_archives_are_skipped(
    fetch: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch()
    for name in ("extract_archive", "download_url"):
        monkeypatch.setattr(tool, name, None)
    monkeypatch.setattr(tool.shutil, "copyfile", None)
    assert fetch().count("is there already") == 3
    for path in (tmp_path / "data").glob("*.tar"):
        path.unlink()
    again = fetch()
    assert again.count("is there already") == 3
    assert again.endswith("trainval: 16 images, test: 5 images\n")


def test_an_interrupted_copy_is_copied_again_and_a_whole_archive_is_not(
    fetch: Callable[[], str], mirror: tuple[Path, list[Archive]], tmp_path: Path
) -> None:
    folder, archives = mirror
    (tmp_path / "data").mkdir()
    whole, half = (tmp_path / "data" / archive.filename for archive in archives[:2])
    shutil.copyfile(folder / whole.name, whole)
    half.write_bytes((folder / half.name).read_bytes()[:5000])
    printed = fetch()
    assert f"{whole}: copying" not in printed
    assert f"{half}: copying" in printed
    assert printed.count(": unpacking") == 3


@pytest.mark.parametrize("archive_kept", [True, False])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_half_unpacked_year_is_unpacked_again(
    fetch: Callable[[], str], mirror: tuple[Path, list[Archive]], tmp_path: Path, harm: str, archive_kept: bool
) -> None:
    fetch()
    archive, root = mirror[1][2], tmp_path / "data"
    image = root / "VOCdevkit/VOC2012/JPEGImages/2012_trainval_000009.jpg"
    size = image.stat().st_size
    if harm == "missing":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:10])
    if not archive_kept:
        (root / archive.filename).unlink()
    assert not is_unpacked(archive, root)
    printed = fetch()
    assert printed.count("is there already") == 2
    assert (f"{root / archive.filename}: copying" in printed) == (not archive_kept)
    assert image.stat().st_size == size


def test_a_mirror_without_an_archive_or_with_another_one_is_refused(
    mirror: tuple[Path, list[Archive]], tmp_path: Path
) -> None:
    folder, archives = mirror
    assert refusal(tmp_path / "a", tmp_path, archives) == f"--mirror {tmp_path}: no VOCtrainval_2007.tar"
    other = [replaced(archives[0], md5="0" * 32)]
    message = refusal(tmp_path / "b", folder, other)
    assert message == f"{folder}/VOCtrainval_2007.tar: damaged, or another archive: its MD5 is not {'0' * 32}"
    assert not (tmp_path / "b" / "VOCdevkit").exists()


def test_missing_images_are_counted(mirror: tuple[Path, list[Archive]], tmp_path: Path) -> None:
    folder, archives = mirror
    message = refusal(tmp_path, folder, [replaced(archives[1], images=4952)])
    assert message == f"{tmp_path}/VOCdevkit/VOC2007: test has 5 images, expected 4952"


def test_without_a_mirror_archives_come_from_their_address_and_a_failure_is_one_line(
    mirror: tuple[Path, list[Archive]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, archives = mirror
    asked = []

    def download_url(url: str, root: Path, filename: str, md5: str) -> None:
        asked.append((url, md5))
        root.mkdir(exist_ok=True)
        if len(asked) > 2:
            raise RuntimeError("File not found or corrupted.")
        shutil.copyfile(folder / filename, root / filename)

    monkeypatch.setattr(tool, "download_url", download_url)
    message = refusal(tmp_path / "data", None, archives)
    assert asked == [(archive.url, archive.md5) for archive in archives]
    assert message == (
        "http://voc.invalid/VOCtrainval_2012.tar: cannot be fetched (File not found or corrupted.); try again, or get "
        "VOCtrainval_2012.tar elsewhere and pass its folder as --mirror"
    )


def test_command_line_checks_the_published_checksums(
    mirror: tuple[Path, list[Archive]], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**12))
    shutil.copyfile(mirror[0] / "VOCtrainval_2007.tar", tmp_path / "VOCtrainval_06-Nov-2007.tar")
    with pytest.raises(SystemExit) as left:
        main(["--root", str(tmp_path / "data"), "--mirror", str(tmp_path)])
    assert left.value.code == 2
    assert "its MD5 is not c52e279531787c972589f7e41ab4ae64" in capsys.readouterr().err
