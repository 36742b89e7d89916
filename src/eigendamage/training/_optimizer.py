"""The optimizer and the learning rates that a config names."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from eigendamage.training._config import FinetuneConfig


def optimizer_of(parameters: list[nn.Parameter], config: FinetuneConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over these parameters."""
    if config.optimizer == "adamw":
        # One kernel a parameter; elsewhere torch joins them by itself.
        fused = all(p.device.type == "cpu" and p.is_floating_point() for p in parameters)
        return torch.optim.AdamW(
            parameters, lr=config.peak, weight_decay=config.weight_decay, fused=fused or None
        )
    return torch.optim.SGD(
        parameters,
        lr=config.peak,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def schedule_of(
    optimizer: torch.optim.Optimizer, config: FinetuneConfig, updates: int
) -> LRScheduler:
    """The learning rate of each of so many updates."""
    if config.schedule == "one-cycle":
        return OneCycleLR(
            optimizer,
            config.peak,
            total_steps=max(2, updates + 1),
            cycle_momentum=False,
        )
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=updates)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
