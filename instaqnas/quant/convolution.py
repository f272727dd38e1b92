"""Convolution of every image of a batch with the weight of its choice, each image computed once.

On a CPU the images of a choice are convolved together, channels-last; on a GPU, where sorting them would wait for the
device, and under autocast, every image with a copy of its weight.

Levels from 0 to 255 are bytes. On a CPU they are kept as bytes for the backward pass, and on processors with 8-bit dot
products multiplied as bytes by oneDNN: the sums are the same whole numbers, found several times faster than in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ImagesOfChoices = list[tuple[int, Tensor | None]]
PIXELS_WORTH_PACKING = 1024  # of the images of a choice, for which bytes gain more than packing a weight takes


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
        x: [B, in, H, W]; with `levels` only what carries their gradient.
        weight: [K, out, in / groups, kh, kw].
        choice: [B] indices of the K weights; None where K = 1.
        stride, padding, groups: as in `torch.nn.Conv2d`.
        levels: what is convolved, where it is bytes (`keeps_bytes`), uint8 [B, in, H, W], channels-last.
        integers: what holds the whole numbers of `weight` then, int8 or int16.
    """
    if levels is not None or (x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")):
        settings = {"stride": stride, "padding": padding, "groups": groups}
        return _ChoiceConv2d.apply(x, levels, weight, images_of_choices(choice), integers, settings)
    if choice is None:
        return plain_conv2d(x, weight[0], stride, padding, groups)
    return per_image_conv2d(x, _Pick.apply(weight, choice), stride, padding, groups)


def plain_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """`F.conv2d`, but for maps of one pixel in float32 under autocast on a CPU.

    There oneDNN's gradient of a strided 3x3 weight in bf16 is not even finite (torch 2.14, AVX512-BF16).
    """
    if x.device.type == "cpu" and x.shape[2:] == (1, 1) and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), weight.float(), stride=stride, padding=padding, groups=groups)
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)


def per_image_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """Convolution of every image with its own weight.

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


class _Pick(torch.autograd.Function):
    """Rows of a table [K, ...] for B images, [B, ...]; the gradient as a product, many times faster than a scatter."""

    @staticmethod
    def forward(ctx, table: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(choice)
        ctx.shape = table.shape
        return table.index_select(0, choice)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (choice,) = ctx.saved_tensors
        member = F.one_hot(choice, ctx.shape[0]).T.to(grad.dtype)  # [K, B]
        return (member @ grad.flatten(1)).view(ctx.shape), None


def keeps_bytes(y: Tensor) -> bool:
    """Whether levels from 0 to 255 of a feature map are best kept as bytes."""
    plain = y.device.type == "cpu" and y.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and _bytes_are_used


class _ChoiceConv2d(torch.autograd.Function):
    """`choice_conv2d` on a CPU."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        levels: Tensor | None,
        weight: Tensor,
        images: ImagesOfChoices,
        integers: torch.dtype | None,
        settings: dict[str, int],
    ) -> Tensor:
        ctx.dtype, ctx.images, ctx.settings = weight.dtype, images, settings
        if levels is None:
            x = x.contiguous(memory_format=torch.channels_last)
            ctx.save_for_backward(x, weight)
        else:
            whole = weight.to(integers)
            ctx.save_for_backward(levels, whole)
            if levels.numel() // levels.shape[1] >= PIXELS_WORTH_PACKING * len(weight) and uses_bytes():
                return by_choice([levels], images, lambda part, k: ByteConv2d(whole[k], **settings)(part))
            x = levels.to(weight.dtype)
        return by_choice([x], images, lambda part, k: F.conv2d(part, weight[k], **settings))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups = (ctx.settings[name] for name in ("stride", "padding", "groups"))
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        of_weights = {}

        def backward(grad: Tensor, x: Tensor, k: int) -> Tensor:
            grad_x, of_weights[k], _ = torch.ops.aten.convolution_backward(
                grad, x.to(ctx.dtype), weight[k].to(ctx.dtype), None, [stride] * 2, [padding] * 2, [1, 1],
                transposed=False, output_padding=[0, 0], groups=groups, output_mask=[*needs, False],
            )  # fmt: skip
            return grad_x

        grad_x = by_choice([grad.contiguous(memory_format=torch.channels_last), x], ctx.images, backward)
        grad_weight = None
        if needs[1]:
            absent = torch.zeros(weight.shape[1:], dtype=ctx.dtype)
            grad_weight = torch.stack([of_weights.get(k, absent) for k in range(len(weight))])
        return grad_x, None, grad_weight, None, None, None


def images_of_choices(choice: Tensor | None) -> ImagesOfChoices:
    """Each choice that is there, and the indices of its images; None for all images, which need not be picked out.

    Args:
        choice: [B]; None for choice 0 throughout.
    """
    if choice is None or not len(choice):
        return [(0, None)]
    parts = choice.argsort(stable=True).split(choice.bincount().tolist())
    present = [(k, images) for k, images in enumerate(parts) if len(images)]
    return present if len(present) > 1 else [(present[0][0], None)]


def by_choice(
    tensors: Sequence[Tensor], images_of: ImagesOfChoices, function: Callable[..., Tensor | None]
) -> Tensor | None:
    """What `function(*parts, k)` makes of the images of each choice k, joined to one batch, channels-last.

    Args:
        tensors: of the whole batch, [B, C, H, W], channels-last.
        images_of: see `images_of_choices`.
        function: of those of n images, to [n, C', H', W'], channels-last, or None.
    """
    (k, images), *_ = images_of
    if images is None:
        return function(*tensors, k)
    joined = None
    for k, images in images_of:
        part = function(*(_of(tensor, images) for tensor in tensors), k)
        if part is not None:
            rows = _rows(part)
            joined = rows.new_empty(len(tensors[0]), *rows.shape[1:]) if joined is None else joined
            for image, row in zip(images.tolist(), rows, strict=True):  # faster than an assignment to `images`
                joined[image].copy_(row)
    return None if joined is None else joined.permute(0, 3, 1, 2)


def _of(x: Tensor, images: Tensor) -> Tensor:
    """Those images of a batch that is channels-last, and they too."""
    rows = _rows(x)
    return rows.flatten(1).index_select(0, images).view(-1, *rows.shape[1:]).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


class ByteConv2d:
    """Convolution of bytes with one weight of whole numbers, exact, for processors that `has_byte_products` tells of.

    Args:
        weight: [out, in / groups, kh, kw], whole numbers of up to 13 bits.
        stride, padding, groups: as in `torch.nn.Conv2d`.
        zero: the byte that stands for 0; it is also the padding.
    """

    def __init__(self, weight: Tensor, *, stride: int, padding: int, groups: int, zero: int = 0) -> None:
        self.stride, self.padding, self.groups, self.zero = [stride] * 2, [padding] * 2, groups, zero
        self.is_matrix = weight.shape[2:] == (1, 1) and (stride, padding, groups) == (1, 0, 1)
        self.unscaled = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        self.parts: list[tuple[Tensor, float]] = []  # the weight is their sum, each times its factor
        for part, factor in _byte_parts(weight):
            if self.is_matrix:
                packed = torch.ops.onednn.qlinear_prepack(part.flatten(1).contiguous(), None)
            else:
                packed = torch.ops.onednn.qconv_prepack(
                    part.contiguous(), self.unscaled[0], 1.0, zero, self.stride, self.padding, [1, 1], groups, None
                )
            self.parts.append((packed, factor))

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 [B, in, H, W], channels-last -> float32 [B, out, H', W'], channels-last; exact below 2^24."""
        (packed, factor), *others = self.parts
        y = self._sums(x, packed)
        if not others:
            return y
        y *= factor
        for packed, factor in others:
            y.add_(self._sums(x, packed), alpha=factor)
        return y

    def _sums(self, x: Tensor, packed: Tensor) -> Tensor:
        if self.is_matrix:
            rows = _rows(x)
            y = torch.ops.onednn.qlinear_pointwise(
                rows.flatten(0, 2), 1.0, self.zero, packed, *self.unscaled, None, 1.0, 0, torch.float32, "none", [], ""
            )
            return y.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)
        return torch.ops.onednn.qconv2d_pointwise(
            x, 1.0, self.zero, packed, *self.unscaled, None, self.stride, self.padding, [1, 1], self.groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def _byte_parts(weight: Tensor) -> list[tuple[Tensor, float]]:
    """int8 tensors and factors whose products sum up to `weight`."""
    if weight.dtype == torch.int8:
        return [(weight, 1.0)]
    weight = weight.to(torch.int32)
    lowest, highest = weight.min().item(), weight.max().item()
    shift = 0
    while lowest >> shift < -128 or highest >> shift > 127:
        shift += 1
    parts = [((weight >> shift).to(torch.int8), 2.0**shift)]
    if shift:
        parts.append(((weight & (2**shift - 1)).to(torch.int8), 1.0))
    return parts


_bytes_are_used = True


@contextlib.contextmanager
def in_floating_point() -> Iterator[None]:
    """Has fake-quantized layers keep and multiply levels in floating point where bytes are faster, to compare both."""
    global _bytes_are_used
    _bytes_are_used = False
    try:
        yield
    finally:
        _bytes_are_used = True


def uses_bytes() -> bool:
    """Whether fake-quantized layers multiply bytes."""
    return _bytes_are_used and has_byte_products()


@functools.cache
def has_byte_products() -> bool:
    """Whether this processor multiplies bytes fast, and oneDNN exactly.

    Without 8-bit dot products, libraries may add pairs of products in 16 bits, which saturates.
    """
    try:
        return torch.cpu._is_vnni_supported() and _products_are_exact()
    except (RuntimeError, AttributeError):  # not built for this processor, or not in this version of torch
        return False


def _products_are_exact() -> bool:
    """Whether the largest products and random ones come out right, in kernels of each kind."""
    g = torch.Generator().manual_seed(0)
    settings = {"generator": g, "device": "cpu"}
    for inside, out, size, stride, groups in (
        (64, 64, 1, 1, 1),
        (33, 5, 1, 2, 1),
        (33, 5, 3, 2, 1),
        (32, 32, 3, 1, 32),
    ):
        drawn = torch.randint(-128, 128, (out, inside // groups, size, size), **settings).to(torch.int8)
        levels = torch.randint(256, (2, inside, 12, 13), **settings).to(torch.uint8)
        layer = {"stride": stride, "padding": size // 2, "groups": groups}
        for weight in (drawn, torch.full_like(drawn, -128), torch.full_like(drawn, 127)):
            for x in (levels, torch.full_like(levels, 255)):
                for zero in (0, 128):
                    found = ByteConv2d(weight, **layer, zero=zero)(x.contiguous(memory_format=torch.channels_last))
                    if not torch.equal(found.double(), F.conv2d(x.double() - zero, weight.double(), **layer)):
                        return False
    return True
