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
    """Groups of the trainable parameters; groups without parameters are left out.

    1. Convolution weights, with weight decay.
    2. BatchNorm parameters and biases, without weight decay.
    3. Step sizes, without weight decay, at the learning rate `lr * step_size_lr_factor`.
    """
    weights = {m.weight for m in network.modules() if isinstance(m, SwitchableConv2d)}
    steps = {p for m in network.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    # Each group keeps the order of `parameters()`: optimizer states in checkpoints go by it, and sets have no order.
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p in weights], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p not in weights and p not in steps], "weight_decay": 0.0},
        {
            "params": [p for p in trainable if p in steps],
            "weight_decay": 0.0,
            "lr": settings.lr * settings.step_size_lr_factor,
        },
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(network: nn.Module, settings: TrainConfig) -> Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9, as `settings.optimizer` says."""
    groups = parameter_groups(network, settings)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)


def build_scheduler(optimizer: Optimizer, settings: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """Linear warm-up to `lr`, then a cosine that reaches 0 after the last step; step it once per batch."""
    total = settings.epochs * steps_per_epoch
    warmup = min(int(settings.warmup_epochs * steps_per_epoch), total - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return LambdaLR(optimizer, factor)
