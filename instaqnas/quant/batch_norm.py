"""BatchNorm with parameters and running statistics per bit choice.

The same layer at 2 and at 8 bits has outputs of different mean and variance. `PerChoiceBatchNorm` therefore keeps K
sets of weight, bias and running statistics, and normalises each image with the set of its choice.

- `use_batch_renorm`: switches training to batch renormalization, for batches with few images per choice.
- `reestimate_batch_norm`: replaces the running averages by exact statistics of given data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaqnas import distributed
from instaqnas.quant.affine import Affine, of_images
from instaqnas.quant.fused import sums_of_powers

R_MAX, D_MAX = 3.0, 5.0  # limits of batch renormalization at the end of its schedule (Ioffe, NeurIPS 2017)


class PerChoiceBatchNorm(nn.Module):
    """BatchNorm with its own parameters and statistics for each of K choices.

    Batch statistics of a choice are computed over its images on all processes.

    The input is `factor * y`, where `y` are integer sums and `factor` is the product of their step sizes. The factor is
    folded into the scale and shift of the returned `Affine`.

    With `renormalize` set, training normalises by the running statistics, as evaluation does, but with the gradients of
    batch statistics (batch renormalization: Ioffe, NeurIPS 2017). Plain batch statistics are poor where a choice has
    few images in the batch: a single image would be normalised by itself. The two statistics may differ up to `R_MAX`
    in scale and `D_MAX` in shift. With K = 1 all images share one choice, and `renormalize` has no effect.

    Args:
        channels: C.
        choices: K.
        momentum: weight of a batch in the running statistics.
        eps: added to the variance.
    """

    running_mean: Tensor  # [K, C]
    running_var: Tensor  # [K, C], unbiased

    def __init__(self, channels: int, choices: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.renormalize = False
        self.weight = nn.Parameter(torch.ones(choices, channels))
        self.bias = nn.Parameter(torch.zeros(choices, channels))
        self.register_buffer("running_mean", torch.zeros(choices, channels))
        self.register_buffer("running_var", torch.ones(choices, channels))

    def forward(self, y: Tensor, factor: Tensor | None, choice: Tensor | None) -> Affine:
        """Normalises `factor * y`; in training updates the running statistics of the choices that have images.

        Args:
            y: [B, C, H, W].
            factor: [K, 1] or [K, C]; None for 1.
            choice: [B] indices of the K choices; None where K = 1.
        """
        if choice is None and factor is None and not (self.training and distributed.world_size() > 1):
            state = (self.running_mean[0], self.running_var[0], self.weight[0], self.bias[0])
            return Affine(F.batch_norm(y, *state, self.training, self.momentum, self.eps))
        if not self.training:
            scale, shift = self.folded(factor)
        elif self.renormalize and len(self.weight) > 1:
            known = self.running_mean.clone(), self.running_var.clone()  # before this batch changes them
            y, mean, var = self._batch_statistics(y, factor, choice)
            scale, shift = self._folded(*self._renormalized(mean.detach(), var.detach(), *known), mean, var, factor)
        else:
            y, mean, var = self._batch_statistics(y, factor, choice)
            scale, shift = self._folded(self.weight, self.bias, mean, var, factor)
        return Affine(y, of_images(scale, choice, len(y)), of_images(shift, choice, len(y)))

    def folded(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift [K, C] such that scale * y + shift normalises `factor * y` as in evaluation."""
        return self._folded(self.weight, self.bias, self.running_mean, self.running_var, factor)

    def totals(self, y: Tensor, factor: Tensor | None, choice: Tensor | None) -> Tensor:
        """Count, sum and sum of squares of `factor * y` over the pixels of each choice's images, float64 [3, K, C].

        Arguments as in `forward`. Totals of several batches add up.
        """
        _, sums, squares = sums_of_powers(y)
        member = self._members(y, choice).double()
        count = member.sum(1, keepdim=True) * y[0, 0].numel()  # [K, 1]
        factor = torch.ones_like(count) if factor is None else factor.double()
        sums, squares = factor * (member @ sums.double()), factor**2 * (member @ squares.double())
        return torch.stack([count.expand_as(sums), sums, squares])

    @torch.no_grad()
    def take_statistics(self, totals: Tensor) -> None:
        """Sets the running statistics to the mean and unbiased variance from `totals` [3, K, C].

        A choice with fewer than two pixels keeps its own.
        """
        count, sums, squares = totals
        mean = sums / count.clamp(min=1)
        var = (squares / count.clamp(min=1) - mean**2).clamp(min=0) * count / (count - 1).clamp(min=1)
        self.running_mean.copy_(torch.where(count > 1, mean, self.running_mean))
        self.running_var.copy_(torch.where(count > 1, var, self.running_var))

    def _renormalized(self, mean: Tensor, var: Tensor, known_mean: Tensor, known_var: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias [K, C] that turn normalisation by batch statistics into normalisation by the known ones.

        r = sigma_batch / sigma and d = (mu_batch - mu) / sigma of the paper, both clipped.
        """
        rate = (known_var + self.eps).rsqrt()
        r = ((var + self.eps).sqrt() * rate).clamp(1 / R_MAX, R_MAX)
        d = ((mean - known_mean) * rate).clamp(-D_MAX, D_MAX)
        return self.weight * r, self.bias + self.weight * d

    def _folded(
        self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scale = weight * (var + self.eps).rsqrt()
        shift = bias - mean * scale
        return scale if factor is None else scale * factor, shift

    def _batch_statistics(
        self, y: Tensor, factor: Tensor | None, choice: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`y`, and the mean and variance [K, C] of `factor * y` over the images of each choice.

        Updates the running statistics. Callers go on with the returned `y` (see `sums_of_powers`).
        """
        y, sums, squares = sums_of_powers(y)
        member = self._members(y, choice).to(sums.dtype)
        pixels = member.sum(1, keepdim=True) * y[0, 0].numel()  # [K, 1]
        with torch.autocast(y.device.type, enabled=False):  # in bf16 E[y^2] - E[y]^2 would cancel completely
            sums, squares = member @ sums, member @ squares  # [K, C]
            if distributed.world_size() > 1:
                of_all = distributed.total(torch.cat([pixels, sums, squares], 1))
                pixels, sums, squares = of_all.split([1, y.shape[1], y.shape[1]], 1)
            mean = sums / pixels.clamp(min=1)
            # E[y^2] - E[y]^2 takes one pass over memory and is accurate enough for nearly centred maps.
            var = (squares / pixels.clamp(min=1) - mean**2).clamp(min=0)
        if factor is not None:
            mean, var = mean * factor, var * factor**2
        with torch.no_grad():
            rate = self.momentum * (pixels > 1)  # one pixel has no variance
            unbiased = var * pixels / (pixels - 1).clamp(min=1)
            self.running_mean += rate * (mean - self.running_mean)
            self.running_var += rate * (unbiased - self.running_var)
        return y, mean, var

    def _members(self, y: Tensor, choice: Tensor | None) -> Tensor:
        """1 where image b has choice k, else 0, [K, B]."""
        choice = choice if choice is not None else torch.zeros(len(y), dtype=torch.int64, device=y.device)
        return F.one_hot(choice, len(self.weight)).T


def use_batch_renorm(network: nn.Module, *, on: bool) -> None:
    """Switches batch renormalization of every `PerChoiceBatchNorm` in `network` on or off."""
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.renormalize = on


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, forward: Callable[[], object]) -> None:
    """Sets the running statistics of `network` to exact ones over all the data that `forward()` sends through it.

    Statistics of a choice are taken over all of its images, in all batches and processes ("precise BatchNorm", Wu and
    Johnson, 2021, section 3). A choice without images keeps its own. During `forward()` each batch is normalised by its
    own statistics, as in training. Layers that `network.train()` leaves in evaluation are skipped.
    """
    totals: dict[PerChoiceBatchNorm, Tensor] = {}

    def add(norm: PerChoiceBatchNorm, args: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        totals[norm] = totals.get(norm, 0) + norm.totals(*args)

    was_training = network.training
    network.train()
    norms = [module for module in network.modules() if isinstance(module, PerChoiceBatchNorm) and module.training]
    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        forward()
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    for norm, total in totals.items():
        norm.take_statistics(distributed.total(total))
