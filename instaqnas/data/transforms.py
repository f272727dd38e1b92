"""Transforms of one sample, in training and in evaluation.

A sample is a dict: `image` uint8 tv_tensors.Image [3, H, W], `boxes` tv_tensors.BoundingBoxes [N, 4] as XYXY, `labels`
int64 [N], `difficult` bool [N]; other entries pass through. What comes out has plain tensors and `image` [3, S, S].
All randomness is from torch's default generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

MEAN_PIXEL = 127  # the detector maps it to 0
Sample = dict[str, Any]
SampleTransform = Callable[[Sample], Sample]


def flip_transform(image_size: int, *, vertical_flip: bool) -> SampleTransform:
    """Resize to `image_size` squared and flip; difficult objects are dropped, as in `train_transform`."""
    return v2.Compose([
        drop_difficult,
        v2.Resize((image_size, image_size), antialias=True),
        v2.RandomHorizontalFlip(),
        *([v2.RandomVerticalFlip()] if vertical_flip else []),
        v2.SanitizeBoundingBoxes(labels_getter=_per_object),
        v2.ToPureTensor(),
    ])  # fmt: skip


def train_transform(image_size: int, *, vertical_flip: bool) -> SampleTransform:
    """Zoom-out, IoU crop, resize to `image_size` squared, flip and photometric distortion (SSD paper, section 2.2).

    Difficult objects are dropped first: they are neither learned nor, in the IoU crop, aimed at. Objects whose centre
    is cropped away or whose box becomes smaller than a pixel are dropped; that may leave none.
    """
    return v2.Compose([
        drop_difficult,
        v2.RandomZoomOut(fill=MEAN_PIXEL, side_range=(1.0, 2.0), p=0.5),
        RandomIoUCrop(),
        v2.Resize((image_size, image_size), antialias=True),
        v2.RandomHorizontalFlip(),
        *([v2.RandomVerticalFlip()] if vertical_flip else []),
        # The paper distorts first. On the small image it costs a fifth; the one difference is that the fill is tinted.
        v2.RandomPhotometricDistort(),
        v2.SanitizeBoundingBoxes(labels_getter=_per_object),
        v2.ToPureTensor(),
    ])  # fmt: skip


def eval_transform(image_size: int) -> SampleTransform:
    """Resize to `image_size` squared; keeps all objects, difficult ones too."""
    return v2.Compose([v2.Resize((image_size, image_size), antialias=True), v2.ToPureTensor()])


def drop_difficult(sample: Sample) -> Sample:
    """The sample without its difficult objects."""
    keep = ~sample["difficult"]
    boxes = tv_tensors.wrap(sample["boxes"][keep], like=sample["boxes"])
    return {**sample, "boxes": boxes, "labels": sample["labels"][keep], "difficult": sample["difficult"][keep]}


class RandomIoUCrop(v2.RandomIoUCrop):
    """torchvision's IoU crop with all trials of a round judged at once: the same distribution in a tenth of the time.

    An image without objects is not cropped.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes))
        size = torch.tensor(boxes.canvas_size[::-1])  # width, height
        boxes_xyxy = boxes.as_subclass(Tensor)
        while len(boxes_xyxy):
            min_iou = self.options[int(torch.randint(len(self.options), ()))]
            if min_iou >= 1:  # the option "leave as is"
                break
            crops_xyxy, legal = self._draw_crops(size)
            inside = _holds_centres(crops_xyxy, boxes_xyxy)  # [trials, N]
            overlaps = ops.box_iou(crops_xyxy, boxes_xyxy) >= min_iou
            found = (legal & (inside & overlaps).any(1)).nonzero()
            if len(found):
                first = int(found[0])
                left, top, right, bottom = (int(v) for v in crops_xyxy[first])
                return {
                    "top": top,
                    "left": left,
                    "height": bottom - top,
                    "width": right - left,
                    "is_within_crop_area": inside[first],
                }
        return {}

    def _draw_crops(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """One round of crops, [trials, 4] in whole pixels, and which of them have a legal shape, [trials]."""
        scale = self.min_scale + (self.max_scale - self.min_scale) * torch.rand(self.trials, 2)
        crop_size = (size * scale).floor()
        left_top = ((size - crop_size) * torch.rand(self.trials, 2)).floor()
        aspect_ratio = crop_size[:, 0] / crop_size[:, 1]
        legal = (self.min_aspect_ratio <= aspect_ratio) & (aspect_ratio <= self.max_aspect_ratio)
        return torch.cat([left_top, left_top + crop_size], 1), legal & (crop_size > 0).all(1)


def _holds_centres(crops_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    crops = crops_xyxy[:, None]  # [trials, 1, 4] against [N, 2]
    return ((crops[..., :2] < centres) & (centres < crops[..., 2:])).all(-1)


def _per_object(sample: Sample) -> tuple[Tensor, Tensor]:
    return sample["labels"], sample["difficult"]
