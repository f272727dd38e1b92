"""One epoch of the detector: what is clipped, and what is added to the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import DetectorBits, SSDOutput, SwitchableSSD
from instaqnas.policy.bit_config import fixed
from instaqnas.quant.switchable import calibrate
from instaqnas.training.detector_epoch import DetectorEpoch, train_detector_epoch

CONFIG = [0, 1] * 6 + [0]


def random_batch() -> Batch:
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[5.0, 5, 40, 40]], [[20.0, 10, 60, 50]]])
    return Batch(images, boxes, torch.tensor([[1], [2]]), torch.zeros(2, 1, dtype=torch.bool), ["a", "b"])


def train_one_step(
    clip_grad_norm: float, distill: Callable[[Tensor, SSDOutput], Tensor] | None = None
) -> tuple[dict[str, Tensor], DetectorEpoch]:
    """How far every parameter moves in one step of SGD at learning rate 1, and what the epoch returns."""
    torch.manual_seed(0)
    bits = DetectorBits([(2, 2), (4, 4)], (8, 8), (8, 8), (4, 4), (8, 8))
    detector = SwitchableSSD(3, bits, image_size=64, width=0.125)
    batch = random_batch()
    calibrate(detector, lambda: detector(batch.images, fixed(CONFIG)(batch.images)))
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    optimizer = torch.optim.SGD(detector.parameters(), lr=1.0)
    epoch = train_detector_epoch(
        detector,
        [batch],
        fixed(CONFIG),
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        clip_grad_norm=clip_grad_norm,
        device=torch.device("cpu"),
        on_step=lambda step, scalars: None,
        distill=distill,
    )
    return {name: p.detach() - before[name] for name, p in detector.named_parameters()}, epoch


def test_clipping_scales_all_gradients_but_those_of_quantizers() -> None:
    free, clipped = train_one_step(0.0)[0], train_one_step(0.01)[0]
    own = [name for name in free if "quantizer" in name]
    others = [name for name in free if "quantizer" not in name]
    norms = [torch.cat([moves[name].flatten() for name in others]).norm().item() for moves in (free, clipped)]
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)
    assert any(free[name].any() for name in own)
    for name in own:
        assert torch.equal(clipped[name], free[name])


def test_a_further_loss_is_added_logged_and_learned_from() -> None:
    def distill(images: Tensor, output: SSDOutput) -> Tensor:
        assert images.shape == (2, 3, 64, 64)
        return 3 + (output.box_offsets - output.box_offsets.detach()).sum()

    (plain, plain_epoch), (moves, epoch) = train_one_step(0.0), train_one_step(0.0, distill)
    assert set(plain_epoch.losses) == {"loss", "loss_box", "loss_class"}
    assert epoch.losses == {
        **plain_epoch.losses,
        "loss": pytest.approx(plain_epoch.losses["loss"] + 3),
        "loss_distill": 3,
    }
    bias = "box_heads.5.bias"  # one cell, six boxes: its gradient is the number of images
    torch.testing.assert_close(moves[bias], plain[bias] - 2)
