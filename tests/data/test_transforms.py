from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from instaqnas.data.transforms import (
    MEAN_PIXEL,
    RandomIoUCrop,
    RandomPhotometricDistort,
    eval_transform,
    flip_transform,
    train_transform,
)

HEIGHT, WIDTH = 120, 160
NO_DISTORTION = {
    "brightness_factor": None,
    "contrast_factor": None,
    "saturation_factor": None,
    "hue_factor": None,
    "contrast_before": True,
    "channel_permutation": None,
}


def make_sample(boxes: list, labels: list | None = None, difficult: list | None = None) -> dict:
    """A black image with each box filled in white."""
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 255
    boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=(HEIGHT, WIDTH)),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(boxes), dtype=torch.bool),
    }


def make_colourful_sample(boxes: list) -> dict:
    """Blurred noise of all colours and brightnesses, with flat black, white and grey corners."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    pixels = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    pixels[:20, :20], pixels[:20, -20:], pixels[-20:, :20] = 0, 255, MEAN_PIXEL
    return {**make_sample(boxes), "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))}


def torchvisions_train_transform(image_size: int) -> v2.Compose:
    return v2.Compose([
        v2.RandomZoomOut(fill=MEAN_PIXEL, side_range=(1.0, 2.0), p=0.5),
        RandomIoUCrop(),  # compared with torchvision's in tests of its own
        v2.Resize((image_size, image_size), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.RandomPhotometricDistort(),
        v2.SanitizeBoundingBoxes(labels_getter=lambda sample: (sample["labels"], sample["difficult"])),
    ])  # fmt: skip


def assert_same_but_for_rounding(image: torch.Tensor, expected: torch.Tensor) -> None:
    """Each distortion may round to the neighbouring grey level, and later ones may amplify the difference."""
    differences = (image.int() - expected.int()).abs()
    assert differences.max() <= 6
    assert (differences > 2).float().mean() <= 0.01


def visible_extent(image: torch.Tensor, inside_xy: tuple[int, int]) -> torch.Tensor:
    """The xyxy bounds of all pixels about as bright as the one at `inside_xy`."""
    grey = image.float().mean(0)
    ys, xs = ((grey - grey[inside_xy[1], inside_xy[0]]).abs() < 25).nonzero(as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def test_eval_transform_scales_image_and_boxes_and_keeps_difficult_objects():
    sample = make_sample([(16, 12, 80, 60), (0, 0, 160, 120)], labels=[2, 1], difficult=[True, False])
    out = eval_transform(80)(sample)
    assert out["image"].shape == (3, 80, 80)
    assert out["image"].dtype == torch.uint8
    assert out["boxes"].tolist() == [[8, 8, 40, 40], [0, 0, 80, 80]]
    assert out["labels"].tolist() == [2, 1]
    assert out["difficult"].tolist() == [True, False]


def test_transforms_return_plain_tensors():
    for transform in (eval_transform(32), train_transform(32, vertical_flip=True)):
        out = transform(make_sample([(20, 20, 90, 90)]))
        assert {type(value) for value in out.values()} == {torch.Tensor}
        assert out["boxes"].dtype == torch.float32


def test_boxes_follow_the_pixels_through_the_train_transform():
    transform = train_transform(96, vertical_flip=True)
    sample = make_sample([(24, 18, 72, 48)])
    flips = set()
    for seed in range(60):
        torch.manual_seed(seed)
        out = transform(sample)
        assert out["image"].shape == (3, 96, 96)
        for box in out["boxes"]:
            assert (box >= 0).all()
            assert (box <= 96).all()
            centre = tuple(int(v) for v in (box[:2] + box[2:]) / 2)
            torch.testing.assert_close(visible_extent(out["image"], centre), box, atol=2.5, rtol=0)
            flips.add((box[0] > 48).item())
            flips.add(f"lower half: {(box[1] > 48).item()}")
    assert len(flips) == 4, "60 draws did not flip both ways"


def test_without_vertical_flip_the_upper_object_stays_above_the_lower_one():
    transform = train_transform(64, vertical_flip=False)
    sample = make_sample([(40, 10, 120, 40), (40, 80, 120, 110)], labels=[1, 2])
    orders = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out = transform(sample)
        if out["labels"].tolist() == [1, 2]:
            orders.add((out["boxes"][0, 1] < out["boxes"][1, 1]).item())
    assert orders == {True}


def test_training_drops_difficult_objects_and_leaves_the_given_sample_alone():
    sample = make_sample([(10, 10, 70, 70), (80, 10, 150, 110)], labels=[1, 2], difficult=[False, True])
    transform = train_transform(64, vertical_flip=False)
    for seed in range(20):
        torch.manual_seed(seed)
        out = transform(sample)
        assert out["labels"].tolist() == [1]
        assert out["difficult"].tolist() == [False]
        assert out["boxes"].shape == (1, 4)
    assert sample["labels"].tolist() == [1, 2], "the given sample was changed"


def test_an_image_without_objects_or_with_difficult_ones_only_passes_the_train_transform():
    transform = train_transform(64, vertical_flip=True)
    for sample in (make_sample([]), make_sample([(10, 10, 70, 70)], difficult=[True])):
        for seed in range(10):
            torch.manual_seed(seed)
            out = transform(sample)
            assert out["image"].shape == (3, 64, 64)
            assert out["boxes"].shape == (0, 4)
            assert out["labels"].shape == out["difficult"].shape == (0,)


def test_labels_stay_with_their_boxes_when_objects_vanish():
    boxes = [(5, 5, 30, 25), (120, 10, 155, 30), (10, 80, 50, 115), (60, 40, 110, 100)]
    transform = train_transform(128, vertical_flip=True)
    counts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out = transform(make_sample(boxes, labels=[1, 2, 3, 4]))
        counts.add(len(out["labels"]))
        # The same draw with the labels reversed must give the same boxes with the reversed labels.
        torch.manual_seed(seed)
        other = transform(make_sample(boxes, labels=[4, 3, 2, 1]))
        assert torch.equal(other["boxes"], out["boxes"])
        assert (other["labels"] + out["labels"] == 5).all()
        assert len(out["boxes"]) == len(out["labels"]) == len(out["difficult"])
    assert len(counts) > 1, "no draw dropped an object"


def test_iou_crop_meets_the_constraints_of_torchvisions():
    torch.manual_seed(0)
    boxes = torch.tensor([[20.0, 10, 70, 60], [90, 50, 150, 110]])
    given = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(HEIGHT, WIDTH))
    crop = RandomIoUCrop(sampler_options=[0.5])
    for _ in range(200):
        params = crop.make_params([given])
        left, top, width, height = (params[key] for key in ("left", "top", "width", "height"))
        assert 0 <= left < left + width <= WIDTH
        assert 0 <= top < top + height <= HEIGHT
        assert 0.5 <= width / height <= 2
        assert int(0.3 * WIDTH) <= width
        assert int(0.3 * HEIGHT) <= height
        ious = []
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            inside = left < (x1 + x2) / 2 < left + width and top < (y1 + y2) / 2 < top + height
            assert params["is_within_crop_area"][i].item() == inside
            shared_w, shared_h = min(x2, left + width) - max(x1, left), min(y2, top + height) - max(y1, top)
            shared = max(shared_w, 0) * max(shared_h, 0)
            ious.append(inside * shared / ((x2 - x1) * (y2 - y1) + width * height - shared))
        assert max(ious) >= 0.5


@pytest.mark.slow
def test_iou_crop_has_torchvisions_distribution():
    boxes = torch.tensor([[20.0, 10, 70, 60], [90, 50, 150, 110], [5, 80, 30, 100]])
    given = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(HEIGHT, WIDTH))
    image = tv_tensors.Image(torch.zeros(3, HEIGHT, WIDTH))
    rows = []
    for crop in (RandomIoUCrop(), v2.RandomIoUCrop()):
        torch.manual_seed(1)
        draws = [crop.make_params([image, given]) for _ in range(600)]
        cropped = [p for p in draws if p]
        rows.append([len(cropped) / len(draws)] + [
            sum(float(p[key].sum() if key.startswith("is") else p[key]) for p in cropped) / len(cropped) / scale
            for key, scale in (("width", WIDTH), ("height", HEIGHT), ("left", WIDTH), ("top", HEIGHT),
                               ("is_within_crop_area", 3))
        ])  # fmt: skip
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), atol=0.06, rtol=0)


def test_train_transform_equals_torchvisions_after_the_same_draws():
    sample = make_colourful_sample([(20, 10, 70, 60), (90, 50, 150, 110), (5, 80, 30, 100)])
    # Scaling to 64 rounds no side between 1 and 2 * WIDTH up, so torchvision drops no box at the edge.
    image_size = 64
    ours, torchvisions = train_transform(image_size, vertical_flip=True), torchvisions_train_transform(image_size)
    for seed in range(60):
        torch.manual_seed(seed)
        expected = torchvisions(sample)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        out = ours(sample)
        assert torch.equal(torch.get_rng_state(), state), "other numbers were drawn"
        torch.testing.assert_close(out["boxes"], expected["boxes"].as_subclass(torch.Tensor), atol=1e-3, rtol=0)
        assert torch.equal(out["labels"], expected["labels"])
        assert_same_but_for_rounding(out["image"], expected["image"])


def test_flip_transform_equals_torchvisions_after_the_same_draws():
    sample = make_colourful_sample([(20, 10, 70, 60), (90, 50, 150, 110)])
    resize, ours = v2.Resize((64, 64), antialias=True), flip_transform(64, vertical_flip=True)
    torchvisions = v2.Compose([resize, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    for seed in range(8):
        torch.manual_seed(seed)
        expected = torchvisions(sample)
        torch.manual_seed(seed)
        out = ours(sample)
        assert torch.equal(out["image"], expected["image"].as_subclass(torch.Tensor))
        torch.testing.assert_close(out["boxes"], expected["boxes"].as_subclass(torch.Tensor))


def test_a_box_at_the_edge_of_the_image_survives_the_rounding_of_the_resize():
    width, image_size = 75, 320
    assert torch.tensor(float(width)) * torch.tensor(image_size / width) > image_size, "not rounded up"
    sample = {
        "image": tv_tensors.Image(torch.zeros(3, width, width, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes([[50.0, 50, 75, 75]], format="XYXY", canvas_size=(width, width)),
        "labels": torch.tensor([1]),
        "difficult": torch.tensor([False]),
    }
    transform = flip_transform(image_size, vertical_flip=True)
    for seed in range(10):
        torch.manual_seed(seed)
        (box,) = transform(sample)["boxes"]
        assert (box >= 0).all()
        assert (box <= image_size).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness_factor", [0.875, 0.93, 1.06, 1.125]),
        ("contrast_factor", [0.5, 0.77, 1.21, 1.5]),
        ("saturation_factor", [0.5, 0.77, 1.21, 1.5]),
        ("hue_factor", [-0.05, -0.013, 0.013, 0.05]),
    ],
)
def test_each_distortion_differs_from_torchvisions_by_a_grey_level_at_most(name, values):
    image = make_colourful_sample([])["image"]
    for value in values:
        params = {**NO_DISTORTION, name: value}
        out = RandomPhotometricDistort().transform(image, params).int()
        expected = v2.RandomPhotometricDistort().transform(image, params).int()
        assert (out - expected).abs().max() <= 1
        assert (out - expected).float().mean().abs() <= 0.3


def test_channels_are_permuted_as_by_torchvision():
    image = make_colourful_sample([])["image"]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [1, 0, 2]):
        params = {**NO_DISTORTION, "channel_permutation": torch.tensor(order)}
        assert torch.equal(RandomPhotometricDistort().transform(image, params), image[order])


def test_photometric_distortion_draws_and_distorts_as_torchvision_does():
    sample = make_colourful_sample([(20, 10, 70, 60)])
    given = sample["image"].clone()
    for seed in range(100):
        torch.manual_seed(seed)
        expected = v2.RandomPhotometricDistort()(sample)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        out = RandomPhotometricDistort()(sample)
        assert torch.equal(torch.get_rng_state(), state), "other numbers were drawn"
        assert_same_but_for_rounding(out["image"], expected["image"])
        assert all(out[key] is sample[key] for key in ("boxes", "labels", "difficult"))
    assert torch.equal(sample["image"], given), "the given image was changed"
