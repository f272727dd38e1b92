"""Fetches and unpacks PASCAL VOC 2007 and 2012: `python -m instaqnas.tools.download_voc [--root data] [--mirror DIR]`.

    ROOT/VOCdevkit/VOC2007    trainval, 5,011 images, and test, 4,952
    ROOT/VOCdevkit/VOC2012    trainval, 11,540

Repeat the command after an interruption: it skips archives that are complete and years that are unpacked.
`--mirror DIR` copies the three archives from a folder instead of fetching them. Addresses and checksums come from
torchvision.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import VOCDetection
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

from instaqnas.data.voc import check_split, read_class_names
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.files import GB, free_bytes

UNPACKED = 1.1  # disk of the unpacked files over the size of the archive: a file takes whole blocks


@dataclass(frozen=True)
class Archive:
    """One archive of PASCAL VOC.

    Args:
        year, split: its contents.
        images: number of images in the split.
        url, filename, md5: address, name and checksum.
        size: bytes.
    """

    year: str
    split: str
    images: int
    url: str
    filename: str
    md5: str
    size: int

    @property
    def folder(self) -> str:
        """The folder that it unpacks to, relative to the root."""
        return f"VOCdevkit/VOC{self.year}"


def _published(key: str, split: str, images: int, size: int) -> Archive:
    entry = DATASET_YEAR_DICT[key]
    return Archive(key[:4], split, images, entry["url"], entry["filename"], entry["md5"], size)


ARCHIVES = (
    _published("2007", "trainval", 5011, 460_032_000),
    _published("2007-test", "test", 4952, 451_020_800),
    _published("2012", "trainval", 11540, 1_999_639_040),
)


def download_voc(root: Path, mirror: Path | None = None, archives: Sequence[Archive] = ARCHIVES) -> None:
    """Fetches and unpacks the archives that are not unpacked yet, and counts the images.

    Args:
        root: folder that gets the archives and VOCdevkit.
        mirror: folder to copy archives from; None fetches them.
        archives: archives to fetch.

    Raises: InputError if the disk is too small, an archive cannot be fetched or has another checksum, or images are
        missing in the end.
    """
    wanted = [archive for archive in archives if not is_unpacked(archive, root)]
    for archive in archives:
        if archive not in wanted:
            print(f"{root / archive.folder}: {archive.split} is there already")
    absent = [archive for archive in wanted if not check_integrity(root / archive.filename, archive.md5)]
    _check_space(root, wanted, absent)
    for archive in wanted:
        if archive in absent:
            _fetch(archive, root, mirror)
        print(f"{root / archive.filename}: unpacking")
        extract_archive(root / archive.filename, root)
    _count(root, archives)


def is_unpacked(archive: Archive, root: Path) -> bool:
    """Whether all files of an archive exist: by their sizes, or, without the archive, every annotation and image."""
    path = root / archive.filename
    if not (root / archive.folder).is_dir():
        return False
    if path.exists():
        try:
            with tarfile.open(path) as tar:
                return all(_size(root / member.name) == member.size for member in tar if member.isfile())
        except (tarfile.TarError, OSError):
            return False
    try:
        held = check_split([root / archive.folder], archive.split, read_class_names([root / archive.folder]))
    except InputError:
        return False
    return not held.problems and held.images == archive.images


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _check_space(root: Path, wanted: Sequence[Archive], absent: Sequence[Archive]) -> None:
    """Prints the disk space that is needed; raises InputError if less is free."""
    if not wanted:
        return
    needed = sum(archive.size for archive in absent) + UNPACKED * sum(archive.size for archive in wanted)
    free = free_bytes(root)
    print(f"{root}: needs {needed / GB:.2f} GB of disk, archives included; {free / GB:.2f} GB are free")
    if free < needed:
        raise InputError(f"{root}: {needed / GB:.2f} GB of disk are needed, {free / GB:.2f} GB are free")


def _fetch(archive: Archive, root: Path, mirror: Path | None) -> None:
    path = root / archive.filename
    if mirror is None:
        print(f"{path}: fetching {archive.url}")
        try:
            download_url(archive.url, root, archive.filename, archive.md5)
        except (OSError, RuntimeError) as error:  # RuntimeError: wrong checksum
            raise InputError(
                f"{archive.url}: cannot be fetched ({error}); try again, or get {archive.filename} elsewhere and pass "
                "its folder as --mirror"
            ) from error
        return
    source = mirror / archive.filename
    if not source.is_file():
        raise InputError(f"--mirror {mirror}: no {archive.filename}")
    print(f"{path}: copying {source}")
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    if not check_integrity(path, archive.md5):
        raise InputError(f"{source}: damaged, or another archive: its MD5 is not {archive.md5}")


def _count(root: Path, archives: Sequence[Archive]) -> None:
    """Prints the number of images of each split; raises InputError if an archive has another number than expected."""
    joined: dict[str, int] = defaultdict(int)
    for archive in archives:
        try:
            images = len(VOCDetection(root, archive.year, archive.split))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{root / archive.folder}: {archive.split}: cannot be read ({error})") from error
        if images != archive.images:
            raise InputError(f"{root / archive.folder}: {archive.split} has {images} images, expected {archive.images}")
        joined[archive.split] += images
    print(", ".join(f"{split}: {images:,} images" for split, images in joined.items()))
    if any((root / archive.filename).exists() for archive in archives):
        print(f"the archives in {root} are no longer needed")


def main(arguments: list[str] | None = None) -> None:
    """Fetches and unpacks VOC."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.download_voc",
        description="Fetch and unpack PASCAL VOC 2007 and 2012; repeat the command after an interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that gets VOCdevkit and the archives")
    parser.add_argument("--mirror", type=Path, metavar="DIR", help="copy the archives from this folder, fetch nothing")
    options = parser.parse_args(arguments)
    with exit_on_input_error():
        download_voc(options.root, options.mirror)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
