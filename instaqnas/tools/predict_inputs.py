"""What `predict` reads: image files, folders and patterns, videos, and cameras."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor

from instaqnas.data.images import SMALL_SUFFIXES
from instaqnas.deploy.predictor import as_tensor
from instaqnas.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
DEFAULT_RATE = 25.0  # frames per second of a source that does not say


@dataclass(frozen=True)
class Item:
    """One image, or one frame of a video.

    Args:
        path: of the file; of a camera, camera-0.mp4 and so on.
        image: uint8 RGB [3, H, W].
        frame: `frame`, its number from 0, and `seconds` since the first one; empty for an image.
        rate: frames per second of the video; 0 for an image.
    """

    path: Path
    image: Tensor
    frame: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def is_frame(self) -> bool:
        """Whether it belongs to a video or camera."""
        return self.rate > 0


def input_files(names: Sequence[str]) -> list[Path]:
    """Files in the order of `names`: files, all images of a folder, or the matches of a pattern such as "*.jpg".

    Raises: InputError for a folder or pattern without images.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SMALL_SUFFIXES)
        elif any(sign in name for sign in "*?[") and not path.exists():
            inside = sorted(Path(match) for match in glob.glob(name, recursive=True))
        else:
            inside = [path]
        if not inside:
            raise InputError(f"{name}: no images there ({', '.join(SMALL_SUFFIXES)})")
        found += inside
    return found


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def items_of(path: Path) -> Iterator[Item | InputError]:
    """The image, or the frames of the video; an error in place of an image that cannot be read."""
    if is_video(path):
        yield from _frames(path, cv2.VideoCapture(str(path)))
        return
    try:
        yield Item(path, as_tensor(path))
    except InputError as error:
        yield error


def camera_items(number: int) -> Iterator[Item | InputError]:
    """Frames of a camera until it ends or the process is interrupted."""
    yield from _frames(Path(f"camera-{number}.mp4"), cv2.VideoCapture(number))


def _frames(path: Path, capture: cv2.VideoCapture) -> Iterator[Item | InputError]:
    try:
        if not capture.isOpened():
            yield InputError(f"{path}: cannot be opened as a video")
            return
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if rate > 0 else DEFAULT_RATE
        number = 0
        while True:
            read, pixels = capture.read()  # BGR
            if not read:
                break
            image = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)
            yield Item(path, image, {"frame": number, "seconds": round(number / rate, 3)}, rate)
            number += 1
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if not number or number < announced:
            yield InputError(f"{path}: ended after {number} of {announced} frames")
    finally:
        capture.release()
