"""Optimizer and learning-rate schedule of the detector."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from instaqnas.config.settings import TrainConfig
from instaqnas.quant.quantizers import Quantizer
from instaqnas.quant.switchable import SwitchableConv2d


def parameter_groups(network: nn.Module, settings: TrainConfig) -> list[dict]:
    """Convolution weights with weight decay; BatchNorm and biases without; step sizes without, at their own rate."""
    weights = {m.weight for m in network.modules() if isinstance(m, SwitchableConv2d)}
    steps = {p for m in network.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    named = [p for p in network.parameters() if p.requires_grad]  # a set has no order to rely on
    groups = [
        {"params": [p for p in named if p in weights], "weight_decay": settings.weight_decay},
        {"params": [p for p in named if p not in weights and p not in steps], "weight_decay": 0.0},
        {
            "params": [p for p in named if p in steps],
            "weight_decay": 0.0,
            "lr": settings.lr * settings.step_size_lr_factor,
        },
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(network: nn.Module, settings: TrainConfig) -> Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9."""
    groups = parameter_groups(network, settings)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)


def build_scheduler(optimizer: Optimizer, settings: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """Linear warm-up to the peak, then a cosine that is 0 after the last step; stepped once a batch."""
    total = settings.epochs * steps_per_epoch
    warmup = min(int(settings.warmup_epochs * steps_per_epoch), total - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return LambdaLR(optimizer, factor)
