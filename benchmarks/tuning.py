"""The fine-tuning that is the same for every competitor."""

from __future__ import annotations

import copy

import torch
from torch import nn

import eigendamage as ed
from eigendamage import zoo

LEARNING_RATE = 0.02
"""At its peak; learning_rates.py compares others."""


def fine_tune(
    small: nn.Module,
    original: nn.Module,
    images: zoo.ImageSet,
    *,
    epochs: int,
    precision: str,
    seed: int = 0,
    rate: float = LEARNING_RATE,
    held_out: zoo.ImageSet | None = None,
) -> None:
    """Labels and distillation, crops and flips, on all but what is held out to choose the epoch by.

    What is held out is a tenth of the images where none are given for it.
    """
    ed.finetune(
        small,
        images.batches(128, shuffle_seed=seed, augment=True),
        ed.FinetuneConfig(epochs=epochs, learning_rate=rate, precision=precision, seed=seed),
        original=copy.deepcopy(original).to(memory_format=torch.channels_last),
        held_out=None if held_out is None else held_out.batches(200),
        progress=False,
    )
