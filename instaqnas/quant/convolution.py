"""Convolution of each image of a batch with the weight of its bit choice.

The fastest implementation depends on the device:

- On a CPU, the images of each choice are convolved together, channels-last (`_ChoiceConv2d`). Levels stored as bytes
  are also multiplied as bytes if `byte_conv.uses_bytes()`.
- On a GPU, and under autocast, each image is convolved with its own copy of the weight (`per_image_conv2d`): grouping
  images by choice would synchronise with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from instaqnas.quant.byte_conv import ByteConv2d, channels_last_rows, uses_bytes

ImagesOfChoices = list[tuple[int, Tensor | None]]  # see `images_of_choices`
PIXELS_WORTH_PACKING = 1024  # pixels per choice from which byte products save more time than packing a weight takes


def choice_conv2d(
    x: Tensor,
    weight: Tensor,
    choice: Tensor | None,
    *,
    stride: int,
    padding: int,
    groups: int,
    levels: Tensor | None = None,
    integers: torch.dtype | None = None,
) -> Tensor:
    """Convolution of image b with `weight[choice[b]]`, [B, out, H', W'].

    Args:
        x: [B, in, H, W]. With `levels`, its values are ignored and it only receives the gradient of the levels.
        weight: [K, out, in / groups, kh, kw].
        choice: [B] indices of the K weights; None where K = 1.
        stride, padding, groups: as in `torch.nn.Conv2d`.
        levels: the input as bytes (`byte_conv.keeps_bytes`), uint8 [B, in, H, W], channels-last; None to convolve `x`.
        integers: with `levels`, the integer type of the weight: int8 or int16.
    """
    if levels is not None or (x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")):
        return _ChoiceConv2d.apply(x, levels, weight, images_of_choices(choice), integers, stride, padding, groups)
    if choice is None:
        return plain_conv2d(x, weight[0], stride, padding, groups)
    return per_image_conv2d(x, _Pick.apply(weight, choice), stride, padding, groups)


def plain_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """`F.conv2d`, but in float32 for maps of one pixel under autocast on a CPU.

    For such maps, oneDNN's bf16 gradient of a strided 3x3 weight is not finite (torch 2.14, AVX512-BF16).
    """
    if x.device.type == "cpu" and x.shape[2:] == (1, 1) and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), weight.float(), stride=stride, padding=padding, groups=groups)
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)


def per_image_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """Convolution of each image with its own weight.

    Args:
        x: [B, in, H, W].
        weight: [B, out, in / groups, kh, kw].

    Returns: [B, out, H', W'].
    """
    images, channels, height, width = x.shape
    out = weight.shape[1]
    if weight.shape[2:] == (channels, 1, 1) and stride == 1 and padding == 0:  # pointwise: one batched product
        return torch.bmm(weight.view(images, out, channels), x.flatten(2)).view(images, out, height, width)
    y = plain_conv2d(
        x.reshape(1, images * channels, height, width),
        weight.reshape(images * out, *weight.shape[2:]),
        stride,
        padding,
        images * groups,
    )
    return y.view(images, out, *y.shape[2:])


def images_of_choices(choice: Tensor | None) -> ImagesOfChoices:
    """Pairs (k, indices of its images) for every choice k in the batch; indices are None if all images have choice k.

    Args:
        choice: [B]; None for choice 0 throughout.
    """
    if choice is None or not len(choice):
        return [(0, None)]
    parts = choice.argsort(stable=True).split(choice.bincount().tolist())
    present: ImagesOfChoices = [(k, images) for k, images in enumerate(parts) if len(images)]
    return present if len(present) > 1 else [(present[0][0], None)]


@overload
def by_choice(tensors: Sequence[Tensor], images_of: ImagesOfChoices, function: Callable[..., Tensor]) -> Tensor: ...


@overload
def by_choice(
    tensors: Sequence[Tensor], images_of: ImagesOfChoices, function: Callable[..., Tensor | None]
) -> Tensor | None: ...


def by_choice(
    tensors: Sequence[Tensor], images_of: ImagesOfChoices, function: Callable[..., Tensor | None]
) -> Tensor | None:
    """Calls `function(*parts, k)` with the images of each choice k and joins the results in the order of the batch.

    Args:
        tensors: whole batches [B, C, H, W], channels-last; `parts` are their images [n, C, H, W] of choice k.
        images_of: see `images_of_choices`.
        function: returns [n, C', H', W'], channels-last, or None for every k.

    Returns: [B, C', H', W'], channels-last; None if `function` returns None.
    """
    (k, images), *_ = images_of
    if images is None:
        return function(*tensors, k)
    joined = None
    for k, images in images_of:
        assert images is not None, "several choices have indices each"
        part = function(*(_of(tensor, images) for tensor in tensors), k)
        if part is not None:
            rows = channels_last_rows(part)
            joined = rows.new_empty(len(tensors[0]), *rows.shape[1:]) if joined is None else joined
            for image, row in zip(images.tolist(), rows, strict=True):  # faster than an assignment to `images`
                joined[image].copy_(row)
    return None if joined is None else joined.permute(0, 3, 1, 2)


def _of(x: Tensor, images: Tensor) -> Tensor:
    """`x[images]` for a channels-last batch; the result is channels-last too."""
    rows = channels_last_rows(x)
    return rows.flatten(1).index_select(0, images).view(-1, *rows.shape[1:]).permute(0, 3, 1, 2)


class _Pick(torch.autograd.Function):
    """`table[choice]`: [K, ...] -> [B, ...]; its gradient is a matrix product, which is far faster than a scatter."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(choice)
        ctx.shape = table.shape
        return table.index_select(0, choice)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (choice,) = ctx.saved_tensors
        member = F.one_hot(choice, ctx.shape[0]).T.to(grad.dtype)  # [K, B]
        return (member @ grad.flatten(1)).view(ctx.shape), None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of an input [n, in, H, W] and of its weight, each None where `needs` is False."""
    if weight.shape[2:] == (1, 1) and stride > 1:
        # A strided pointwise convolution reads every `stride`-th pixel. oneDNN's own gradient of its weight writes past
        # its workspace for channels-last inputs of few channels (uxlfoundation/oneDNN#6035).
        read = x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
        of_read, of_weight = _gradients(grad, read, weight, 1, padding, groups, needs)
        if of_read is None:
            return None, of_weight
        grad_x = torch.zeros_like(x)
        grad_x[:, :, ::stride, ::stride] = of_read
        return grad_x, of_weight
    grad_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1],
        transposed=False, output_padding=[0, 0], groups=groups, output_mask=[*needs, False],
    )  # fmt: skip
    return grad_x, of_weight


class _ChoiceConv2d(torch.autograd.Function):
    """`choice_conv2d` on a CPU, arguments as there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        levels: Tensor | None,
        weight: Tensor,
        images: ImagesOfChoices,
        integers: torch.dtype | None,
        stride: int,
        padding: int,
        groups: int,
    ) -> Tensor:
        ctx.dtype, ctx.images, ctx.settings = weight.dtype, images, (stride, padding, groups)
        if levels is None:
            x = x.contiguous(memory_format=torch.channels_last)
            ctx.save_for_backward(x, weight)
        else:
            whole = weight.to(integers)
            ctx.save_for_backward(levels, whole)
            if levels.numel() // levels.shape[1] >= PIXELS_WORTH_PACKING * len(weight) and uses_bytes():

                def multiply_bytes(part: Tensor, k: int) -> Tensor:
                    return ByteConv2d(whole[k], stride=stride, padding=padding, groups=groups)(part)

                return by_choice([levels], images, multiply_bytes)
            x = levels.to(weight.dtype)

        def multiply(part: Tensor, k: int) -> Tensor:
            return F.conv2d(part, weight[k], stride=stride, padding=padding, groups=groups)

        return by_choice([x], images, multiply)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.settings
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        of_weights: dict[int, Tensor] = {}

        def backward(grad: Tensor, x: Tensor, k: int) -> Tensor | None:
            x, own_weight = x.to(ctx.dtype), weight[k].to(ctx.dtype)
            grad_x, of_weight = _gradients(grad, x, own_weight, stride, padding, groups, needs)
            if of_weight is not None:
                of_weights[k] = of_weight
            return grad_x

        grad_x = by_choice([grad.contiguous(memory_format=torch.channels_last), x], ctx.images, backward)
        grad_weight = None
        if needs[1]:
            absent = torch.zeros(weight.shape[1:], dtype=ctx.dtype)  # a choice without images
            grad_weight = torch.stack([of_weights.get(k, absent) for k in range(len(weight))])
        return grad_x, None, grad_weight, None, None, None, None, None
