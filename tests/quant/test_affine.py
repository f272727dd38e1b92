"""An Affine stands for the map scale * y + shift."""

from __future__ import annotations

import torch

from instaqnas.quant.affine import Affine, as_affine, of_images


def test_the_value_is_scaled_and_shifted_per_image_and_channel() -> None:
    y = torch.arange(24.0).view(2, 3, 2, 2)
    scale, shift = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]]), torch.tensor([[10.0, 20.0, 30.0]])
    value = Affine(y, scale, shift).value()
    for image in range(2):
        for channel in range(3):
            expected = scale[image, channel] * y[image, channel] + shift[0, channel]
            assert torch.equal(value[image, channel], expected)


def test_without_scale_and_shift_the_value_is_the_map_itself() -> None:
    y = torch.randn(2, 3, 4, 4)
    assert as_affine(y).value() is y
    assert as_affine(y).shape == y.shape
    x = Affine(y)
    assert as_affine(x) is x


def test_sums_in_bf16_are_scaled_in_float32() -> None:
    y = torch.tensor(3.0).bfloat16().view(1, 1, 1, 1)
    scale = torch.tensor([[1 / 3]])
    value = Affine(y, scale, torch.zeros(1, 1)).value()
    assert value.dtype == torch.float32
    assert value.item() == (3 * scale).item()


def test_a_map_is_not_known_to_be_finite_unless_someone_says_so() -> None:
    assert not as_affine(torch.ones(1, 1, 1, 1)).known_finite


def test_images_get_the_rows_of_their_choices_or_the_only_row() -> None:
    table = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert of_images(table, torch.tensor([2, 0, 2, 1]), 4).tolist() == [[5, 6], [1, 2], [5, 6], [3, 4]]
    assert of_images(table[:1], None, 3).tolist() == [[1, 2]] * 3
    assert of_images(torch.tensor([7]), None, 2).tolist() == [7, 7]
