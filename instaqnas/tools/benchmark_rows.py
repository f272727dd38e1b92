"""Rows of the benchmark: the networks at work on one batch, and the columns that are measured of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from instaqnas.bits import Amp
from instaqnas.config.settings import BitsConfig, PolicyConfig, SearchConfig
from instaqnas.data.loader import Batch
from instaqnas.detector import ssd
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.evaluation.inference import detections_of, quality_of
from instaqnas.policy.bit_config import mix_uniform, sample
from instaqnas.policy.network import PolicyNet
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.integer import to_integer
from instaqnas.quant.switchable import SwitchableConv2d, calibrate
from instaqnas.seeds import SampleKey, generator, uniform_numbers
from instaqnas.tools.peers import EVAL, BaselineSSD, MaskedBranches, TorchConv, judge_in_loops

BITS, POLICY, SEARCH = BitsConfig(), PolicyConfig(), SearchConfig()
CHOICES = (*BITS.choices, (2, 4), (6, 4), (7, 4), (8, 4), (8, 8))
POSITIONS = ssd.position_count("pointwise")
OBJECTS = 3  # an image


@dataclass(frozen=True)
class Workload:
    """Size of networks and batches; `classes` counts the background, `choices` is K."""

    image_size: int
    width: float
    classes: int
    choices: int
    batch: int
    amp: Amp = "off"


# --- Networks ---------------------------------------------------------------------------------------------------------


def switchable(bits: DetectorBits, workload: Workload, images: Tensor) -> SwitchableSSD:
    """An untrained detector, on the device of the images."""
    torch.manual_seed(0)
    network = SwitchableSSD(
        workload.classes, bits, image_size=workload.image_size, width=workload.width, amp=workload.amp
    )
    return network.to(images.device)


def initial_network(workload: Workload, images: Tensor) -> SwitchableSSD:
    """The full-precision detector whose weights and BatchNorm statistics (of `images`) all rows start from."""
    network = switchable(DetectorBits.full_precision(), workload, images)
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(images, torch.zeros(len(images), POSITIONS, dtype=torch.int64, device=images.device))
    return network


def fp32(workload: Workload, images: Tensor, _choices: Tensor) -> BaselineSSD:
    """Full precision in torch's own modules, channels-last."""
    network = BaselineSSD(initial_network(workload, images), lambda _, layer: TorchConv(layer))
    return network.to(memory_format=torch.channels_last).to(images.device)


def fp32_compiled(workload: Workload, images: Tensor, choices: Tensor) -> BaselineSSD:
    """`fp32` under torch.compile."""
    # torch.compile wraps the module, and the wrapper passes `loss` and all other attributes on.
    return cast(BaselineSSD, torch.compile(fp32(workload, images, choices)))


def masked(workload: Workload, images: Tensor, _choices: Tensor) -> BaselineSSD:
    """The published strategy: all K branches of every pointwise layer on every image, then the mask."""

    def convert(group: str, layer: SwitchableConv2d) -> nn.Module:
        if group == "pointwise":
            return MaskedBranches(layer, CHOICES[: workload.choices])
        return TorchConv(layer, getattr(BITS, group))

    return BaselineSSD(initial_network(workload, images), convert).to(images.device)


def ours(workload: Workload, images: Tensor, choices: Tensor) -> SwitchableSSD:
    """Each image computed once, at its own bit configuration; calibrated under `choices`."""
    bits = DetectorBits(CHOICES[: workload.choices], BITS.stem, BITS.depthwise, BITS.extras, BITS.heads)
    network = switchable(bits, workload, images)
    ssd.copy_weights(initial_network(workload, images), network)
    calibrate(network, lambda: network(images, choices))
    return network


def ours_integer(workload: Workload, images: Tensor, choices: Tensor) -> SwitchableSSD:
    """`ours` on integers."""
    return to_integer(ours(workload, images, choices))


@torch.no_grad()
def judge_batched(network: SwitchableSSD, batch: Batch, choices: Tensor) -> Tensor:
    """Quality (F1) [B] under bit configurations [B, L], as the search computes it, at the threshold of evaluation."""
    detections = detections_of(network, network(batch.images, choices), EVAL)
    return quality_of(detections, batch, "f1", EVAL.score_threshold)


# --- Rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A network at work on a batch: each method does once what its column measures.

    `judge` computes the quality [B] of `network` on the batch under bit configurations [B, L]; `optimizer` is None for
    a network without parameters.
    """

    network: SwitchableSSD | BaselineSSD
    batch: Batch
    choices: Tensor  # [B, L]
    policy: PolicyNet
    judge: Callable[[Any, Batch, Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None

    def train_step(self) -> None:
        """Forward, loss, backward and update."""
        assert self.optimizer is not None, "integers are not trained"
        self.network.train()
        output = self.network(self.batch.images, self.choices)
        losses = self.network.loss(output, self.batch.boxes_xyxy, self.batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        cast(Tensor, sum(losses.values())).backward()  # by its type, a sum could be the 0 of no summands
        self.optimizer.step()

    @torch.no_grad()
    def eval_forward(self) -> None:
        """Raw outputs of the batch."""
        self.network.eval()(self.batch.images, self.choices)

    @torch.no_grad()
    def rollout(self) -> None:
        """The policy, then the quality of its sampled and of its greedy bit configurations."""
        self.network.eval()
        logits = self.policy(self.batch.images)
        uniform = uniform_numbers(self.batch.keys, POSITIONS, "benchmark samples")
        sampled = sample(mix_uniform(logits, SEARCH.epsilon_start), uniform)
        for choices in (sampled, logits.argmax(-1)):
            self.judge(self.network, self.batch, choices)


ACTIONS = {"train_seconds": Row.train_step, "eval_seconds": Row.eval_forward, "rollout_seconds": Row.rollout}
COLUMNS = (*ACTIONS, "memory_mib")
TRAINING = ("train_seconds", "memory_mib")


@dataclass(frozen=True)
class Plan:
    """How a row is built, and its columns."""

    build: Callable[[Workload, Tensor, Tensor], SwitchableSSD | BaselineSSD]  # from images [B, 3, S, S], choices [B, L]
    columns: tuple[str, ...]
    judge: Callable[[Any, Batch, Tensor], Tensor] = judge_batched  # takes networks of the type that `build` returns
    adapt: Callable[[Workload], Workload] = replace  # without changes, a copy


PLANS = {
    "fp32": Plan(fp32, ("train_seconds", "eval_seconds", "memory_mib")),
    "fp32_compiled": Plan(fp32_compiled, ("train_seconds", "eval_seconds")),
    "masked": Plan(masked, COLUMNS, judge_in_loops),
    "ours": Plan(ours, COLUMNS),
    "ours_k2": Plan(ours, TRAINING, adapt=partial(replace, choices=2)),
    "ours_k8": Plan(ours, TRAINING, adapt=partial(replace, choices=8)),
    "ours_bf16": Plan(ours, TRAINING, adapt=partial(replace, amp="bf16")),
    "ours_integer": Plan(ours_integer, ("eval_seconds",)),
    "ours_half_batch": Plan(ours, TRAINING, adapt=lambda workload: replace(workload, batch=workload.batch // 2)),
}


def build_row(name: str, workload: Workload, device: torch.device) -> Row:
    """The row `name` of PLANS, ready to run."""
    plan = PLANS[name]
    workload = plan.adapt(workload)
    batch = random_batch(workload).to(device)
    random = generator("benchmark choices")
    choices = torch.randint(workload.choices, (workload.batch, POSITIONS), generator=random).to(device)
    network = plan.build(workload, batch.images, choices)
    policy = PolicyNet(POSITIONS, workload.choices, pool=POLICY.pool, width=POLICY.width, bits=POLICY.bits).to(device)
    calibrate(policy, lambda: policy(batch.images))
    parameters = list(network.parameters())
    # Weights stay as they are, so that all columns measure the same network.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True) if parameters else None
    return Row(network, batch, choices, policy, plan.judge, optimizer)


def random_batch(workload: Workload) -> Batch:
    """Images of noise with objects, the same for all rows."""
    images, size, random = workload.batch, workload.image_size, generator("benchmark images")
    pixels = torch.randint(256, (images, 3, size, size), generator=random, dtype=torch.uint8)
    boxes, labels = random_objects(images, OBJECTS, workload.classes, random)
    difficult = torch.zeros_like(labels, dtype=torch.bool)
    image_ids, keys = [str(index) for index in range(images)], [SampleKey(0, index) for index in range(images)]
    return Batch(pixels, boxes * size, labels, difficult, image_ids, keys)


def random_objects(images: int, objects: int, classes: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes xyxy [B, N, 4] in the unit square, 0.1 to 0.5 wide and high, and labels [B, N] from 1."""
    corner, side = torch.rand(2, images, objects, 2, generator=random)
    labels = torch.randint(1, classes, (images, objects), generator=random)
    return torch.cat([corner / 2, corner / 2 + 0.1 + 0.4 * side], -1), labels
