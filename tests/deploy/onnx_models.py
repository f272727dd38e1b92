"""Tiny calibrated detectors for the tests of ONNX models, and sessions that run them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaqnas.config.settings import EvalConfig
from instaqnas.deploy.packed import IntegerModel
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs
from instaqnas.policy.budget import price_table
from instaqnas.policy.network import PolicyNet, effort_of, policy_gbitops
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.integer import to_integer
from instaqnas.quant.switchable import calibrate

CLASSES = ("disc", "ring", "star")
SIDE, WIDTH = 64, 0.125
FIXED = {"stem": (8, 8), "depthwise": (8, 7), "extras": (4, 4), "heads": (5, 8)}
BITS = {
    "pointwise": DetectorBits([(2, 2), (3, 4), (8, 8)], **FIXED),
    "nested, all": DetectorBits([(3, 3), (7, 4), (2, 8)], **FIXED, positions="all", weights="nested", per_channel=True),
    "pact, backbone": DetectorBits([(2, 2), (8, 4)], **FIXED, positions="backbone+extras", quantizer="pact"),
    "network": DetectorBits([(2, 2), (4, 4), (8, 8)], **FIXED, positions="network", weights="separate"),
    "nested, network": DetectorBits([(8, 8), (4, 3), (2, 2)], **FIXED, positions="network", weights="nested"),
    "one choice": DetectorBits([(6, 5)], **FIXED),
}
SETTINGS = EvalConfig(score_threshold=0.2, nms_iou=0.3, candidates_per_class=7, max_detections=5)


def random_images(count: int, seed: int = 0) -> Tensor:
    """Noise, uint8 [B, 3, S, S]."""
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()


def settle(network: nn.Module, *args: Tensor) -> None:
    """Sets step sizes and running statistics from one batch, as a long training on it would."""
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.momentum = 1.0
    calibrate(network, lambda: network(*args))
    network.eval()


@functools.cache
@torch.no_grad()
def model(name: str, *, on_stem: bool = False, pool: int = 4) -> IntegerModel:
    """A detector at BITS[name] with its policy, all choices of which are likely for some image."""
    torch.manual_seed(0)
    bits = BITS[name]
    detector = SwitchableSSD(len(CLASSES) + 1, bits, image_size=SIDE, width=WIDTH, extras_batch_norm=True)
    if on_stem:
        detector.freeze_stem()
    effort = effort_of(bits.bit_products) if on_stem else None
    shape = {"pool": pool, "width": 4, "bits": (6, 8), "effort": effort}
    policy = PolicyNet(len(detector.positions), len(bits.names), stem_channels=8 if on_stem else None, **shape)
    images = random_images(6)
    choices = torch.arange(6)[:, None] + torch.arange(len(detector.positions))
    settle(detector, images, choices % len(bits.names))
    settle(policy, detector.observe(images).input)
    costs, own = detector_costs(detector), policy_gbitops(policy, SIDE)
    logits = policy(detector.observe(random_images(40, seed=1)).input)
    prices = price_table(logits, costs.gbitops_table(), costs.fixed / 1e9 + own)
    networks = to_integer(detector), to_integer(policy)
    return IntegerModel(*networks, CLASSES, costs, own, SETTINGS, tuple(prices))


def with_settings(found: IntegerModel, **settings: Any) -> IntegerModel:
    """The same networks with other settings of post-processing."""
    return replace(found, settings=replace(found.settings, **settings))


class Session:
    """An ONNX model in onnxruntime, on one thread; called with images uint8 [B, 3, S, S], returns outputs by name."""

    def __init__(self, proto: Any) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # onnxruntime warns of every optional input
        self.session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, images: Tensor, **inputs: Any) -> dict[str, np.ndarray]:
        found = self.session.run(self.names, {"image": images.permute(0, 2, 3, 1).numpy(), **inputs})
        return dict(zip(self.names, found, strict=True))
