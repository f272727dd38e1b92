"""Transforms of one sample for training and evaluation.

A sample is a dict: `image` uint8 tv_tensors.Image [3, H, W], `boxes` tv_tensors.BoundingBoxes [N, 4] as XYXY, `labels`
int64 [N], `difficult` bool [N]; other entries pass through. Transformed samples have plain tensors and `image`
[3, S, S]. All random numbers come from torch's default generator.

The training transforms draw the same numbers as torchvision's and give the same result, in a third of the time on one
thread: OpenCV works on pixels in their memory order [H, W, 3], and no step searches the sample for images and boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from instaqnas.pixels import MEAN_PIXEL

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # of R, G, B, as in torchvision
MEAN_FRACTION = 0.5  # grey levels: torchvision rounds down, OpenCV to the nearest; the means differ by this

Sample = dict[str, Any]
SampleTransform = Callable[[Sample], Sample]


def flip_transform(image_size: int, *, vertical_flip: bool) -> SampleTransform:
    """Drops difficult objects, resizes to `image_size` squared and flips."""
    return v2.Compose([drop_difficult, ResizeAndFlip(whole_image, image_size, vertical_flip=vertical_flip)])


def train_transform(image_size: int, *, vertical_flip: bool) -> SampleTransform:
    """Zoom-out, IoU crop, resize to `image_size` squared, flip and photometric distortion (SSD paper, section 2.2).

    Difficult objects are dropped first, so they are not learned and the IoU crop does not keep them in view. Objects
    whose centre is cropped away or whose box gets smaller than a pixel are dropped as well, possibly all objects.
    """
    return v2.Compose([
        drop_difficult,
        ResizeAndFlip(ZoomOutAndCrop(), image_size, vertical_flip=vertical_flip),
        # The paper distorts first. Here it takes a fifth of the time, and only differs in distorting the fill as well.
        RandomPhotometricDistort(),
    ])  # fmt: skip


def eval_transform(image_size: int) -> SampleTransform:
    """Resizes to `image_size` squared and keeps all objects, also difficult ones."""
    return v2.Compose([v2.Resize((image_size, image_size), antialias=True), v2.ToPureTensor()])


def drop_difficult(sample: Sample) -> Sample:
    """The sample without its difficult objects."""
    if not sample["difficult"].any():
        return sample
    kept = _keep_objects(sample, ~sample["difficult"])
    return {**kept, "boxes": tv_tensors.wrap(kept["boxes"], like=sample["boxes"])}


class View(NamedTuple):
    """A rectangle in pixels, which may extend beyond the image, and the objects in it."""

    left: int
    top: int
    right: int
    bottom: int
    shown: np.ndarray  # bool [N]


def whole_image(boxes: tv_tensors.BoundingBoxes) -> View:
    """The view of the whole image."""
    height, width = boxes.canvas_size
    return View(0, 0, width, height, np.ones(boxes.shape[0], bool))


class ZoomOutAndCrop:
    """Draws the view that results from `v2.RandomZoomOut` followed by `RandomIoUCrop`."""

    def __init__(self) -> None:
        self.zoom_out = v2.RandomZoomOut(side_range=(1.0, 2.0), p=0.5)
        self.crop = RandomIoUCrop()

    def __call__(self, boxes: tv_tensors.BoundingBoxes) -> View:
        view = whole_image(boxes)
        if torch.rand(1) < self.zoom_out.p:
            left, top, right, bottom = self.zoom_out.make_params([boxes])["padding"]
            view = View(-left, -top, view.right + right, view.bottom + bottom, view.shown)
            boxes_xyxy = boxes.as_subclass(Tensor) + torch.tensor([left, top, left, top])
            canvas_size = (view.bottom - view.top, view.right - view.left)
            boxes = tv_tensors.wrap(boxes_xyxy, like=boxes, canvas_size=canvas_size)
        crop = self.crop.make_params([boxes])
        if not crop:
            return view
        left, top = view.left + crop["left"], view.top + crop["top"]
        return View(left, top, left + crop["width"], top + crop["height"], crop["is_within_crop_area"].numpy())


@dataclass(frozen=True)
class ResizeAndFlip:
    """Cuts out a view, resizes it to `image_size` squared, and flips it in each direction with probability 1/2.

    Objects outside the view, and objects narrower or lower than a pixel, are dropped. Boxes are clipped afterwards,
    because scaled coordinates are rounded and can exceed the image by an ulp; `v2.SanitizeBoundingBoxes` would drop
    such boxes.
    """

    draw_view: Callable[[tv_tensors.BoundingBoxes], View]
    image_size: int
    vertical_flip: bool

    def __call__(self, sample: Sample) -> Sample:
        view = self.draw_view(sample["boxes"])
        size = self.image_size
        image = functional.resize_image(_cut(sample["image"], view), [size, size], antialias=True)
        x1, y1, x2, y2 = sample["boxes"].as_subclass(Tensor).numpy().T
        x1, x2 = ((x - view.left) * (size / (view.right - view.left)) for x in (x1, x2))
        y1, y2 = ((y - view.top) * (size / (view.bottom - view.top)) for y in (y1, y2))
        if torch.rand(1) < 0.5:
            image, x1, x2 = image.flip(-1), size - x2, size - x1
        if self.vertical_flip and torch.rand(1) < 0.5:
            image, y1, y2 = image.flip(-2), size - y2, size - y1
        boxes_xyxy = np.stack([x1, y1, x2, y2], 1).clip(0, size)
        keep = view.shown & (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= 1).all(1)
        return _keep_objects({**sample, "image": image, "boxes": torch.from_numpy(boxes_xyxy)}, torch.from_numpy(keep))


class RandomIoUCrop(v2.RandomIoUCrop):
    """torchvision's IoU crop with all trials of a round evaluated at once: same distribution, a tenth of the time.

    An image without objects is not cropped.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes))
        size = np.array(boxes.canvas_size[::-1], np.float32)  # width, height
        boxes_xyxy = boxes.as_subclass(Tensor).numpy()
        while len(boxes_xyxy):
            min_iou = self.options[int(torch.randint(len(self.options), ()))]
            if min_iou >= 1:  # the option "no crop"
                break
            crops_xyxy, legal = self._draw_crops(size)
            inside = _holds_centres(crops_xyxy, boxes_xyxy)  # [trials, N]
            overlaps = _iou(crops_xyxy, boxes_xyxy) >= min_iou
            (found,) = (legal & (inside & overlaps).any(1)).nonzero()
            if len(found):
                left, top, right, bottom = crops_xyxy[found[0]].astype(int).tolist()
                return {
                    "top": top,
                    "left": left,
                    "height": bottom - top,
                    "width": right - left,
                    "is_within_crop_area": torch.from_numpy(inside[found[0]]),
                }
        return {}

    def _draw_crops(self, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One round of crops xyxy, [trials, 4] in whole pixels, and a mask of legal shapes, [trials]."""
        scale = self.min_scale + (self.max_scale - self.min_scale) * torch.rand(self.trials, 2).numpy()
        crop_size = np.floor(size * scale)
        left_top = np.floor((size - crop_size) * torch.rand(self.trials, 2).numpy())
        width, height = crop_size.T
        legal = (self.min_aspect_ratio * height <= width) & (width <= self.max_aspect_ratio * height)
        return np.concatenate([left_top, left_top + crop_size], 1), legal & (width > 0) & (height > 0)


class RandomPhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's photometric distortion on OpenCV: equal up to rounding, in a sixth of the time."""

    def forward(self, sample: Sample) -> Sample:
        image = sample["image"]
        return {**sample, "image": self.transform(image, self.make_params([image]))}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        pixels = _to_pixels(inpt)
        contrast_before = params["contrast_before"]
        if params["brightness_factor"] is not None:
            pixels = _adjust_brightness(pixels, params["brightness_factor"])
        if params["contrast_factor"] is not None and contrast_before:
            pixels = _adjust_contrast(pixels, params["contrast_factor"])
        if params["saturation_factor"] is not None:
            pixels = _adjust_saturation(pixels, params["saturation_factor"])
        if params["hue_factor"] is not None:
            pixels = _adjust_hue(pixels, params["hue_factor"])
        if params["contrast_factor"] is not None and not contrast_before:
            pixels = _adjust_contrast(pixels, params["contrast_factor"])
        order = range(3) if params["channel_permutation"] is None else params["channel_permutation"].tolist()
        planes = cv2.split(pixels)
        return torch.from_numpy(np.stack([planes[channel] for channel in order]))


def _holds_centres(crops_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Whether the centre of each box lies in each crop, bool [trials, N]."""
    left, top, right, bottom = crops_xyxy.T[..., None]  # [trials, 1] each, to broadcast with [N]
    x1, y1, x2, y2 = boxes_xyxy.T
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return (left < x) & (x < right) & (top < y) & (y < bottom)


def _iou(crops_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """IoU of each crop and each box, [trials, N]."""
    left, top, right, bottom = crops_xyxy.T[..., None]  # [trials, 1] each, to broadcast with [N]
    x1, y1, x2, y2 = boxes_xyxy.T
    shared_width = np.maximum(np.minimum(right, x2) - np.maximum(left, x1), 0)
    shared_height = np.maximum(np.minimum(bottom, y2) - np.maximum(top, y1), 0)
    shared = shared_width * shared_height
    return shared / ((right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - shared)


def _adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _affine(pixels, factor * np.eye(3), 0)


def _adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    mean_grey = np.dot(GREY_WEIGHTS, cv2.mean(pixels)[:3]) - MEAN_FRACTION
    return _affine(pixels, factor * np.eye(3), (1 - factor) * mean_grey)


def _adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    to_grey = np.tile(GREY_WEIGHTS, (3, 1))
    return _affine(pixels, factor * np.eye(3) + (1 - factor) * to_grey, (factor - 1) * MEAN_FRACTION)


def _adjust_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    # In float32, because 8-bit HSV has errors of ten grey levels.
    hsv: np.ndarray = cv2.cvtColor(pixels.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] += 360 * (turn % 1)
    # torchvision scales 0..1 to 0..255.999 and rounds down.
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), alpha=255.999 / 255, beta=-MEAN_FRACTION)


def _affine(pixels: np.ndarray, matrix: np.ndarray, offset: float) -> np.ndarray:
    """`matrix` @ RGB + `offset` of each pixel, as uint8: clipped and rounded down as in torchvision."""
    return cv2.transform(pixels, np.concatenate([matrix, np.full((3, 1), offset - MEAN_FRACTION)], 1))


def _cut(image: Tensor, view: View) -> Tensor:
    """The `view` of `image`, filled with `MEAN_PIXEL` outside of the image.

    It is channels-last in memory, on which `resize_image` is fastest.
    """
    pixels = _to_pixels(image)
    height, width = pixels.shape[:2]
    visible = pixels[max(view.top, 0) : view.bottom, max(view.left, 0) : view.right]
    above, below = max(-view.top, 0), max(view.bottom - height, 0)
    left, right = max(-view.left, 0), max(view.right - width, 0)
    fill = (MEAN_PIXEL, MEAN_PIXEL, MEAN_PIXEL)
    cut = cv2.copyMakeBorder(visible, above, below, left, right, cv2.BORDER_CONSTANT, value=fill)
    return torch.from_numpy(cut).permute(2, 0, 1)


def _to_pixels(image: Tensor) -> np.ndarray:
    """The pixels of an image [3, H, W] as a contiguous array [H, W, 3]."""
    return np.ascontiguousarray(image.as_subclass(Tensor).permute(1, 2, 0).numpy())


def _keep_objects(sample: Sample, keep: Tensor) -> Sample:
    boxes_xyxy = sample["boxes"].as_subclass(Tensor)
    return {
        **sample,
        "boxes": boxes_xyxy[keep],
        "labels": sample["labels"][keep],
        "difficult": sample["difficult"][keep],
    }
