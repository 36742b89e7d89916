"""An accelerator of accelerate that leaves those of others alone."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from eigendamage.distributed import world
from eigendamage.errors import EigenDamageError, ProcessError
from eigendamage.training._config import FinetuneConfig


@contextmanager
def accelerator_of(config: FinetuneConfig, device: torch.device) -> Generator[Accelerator]:
    """An accelerator of our own; a user's keeps its settings, which accelerate shares by class."""
    if config.precision == "fp16" and device.type == "cpu":
        # accelerate would train in full precision without a word.
        raise EigenDamageError("precision 'fp16' needs a GPU; on the CPU give 'bf16' or 'no'")
    if world() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # accelerate would make a group of its own, which the rest of this run knows nothing of.
        raise ProcessError(
            "WORLD_SIZE says that there are several processes, but there is no group of them: call "
            "torch.distributed.init_process_group first"
        )
    shared: list[dict[str, Any]] = [
        state._shared_state  # pyright: ignore[reportPrivateUsage]
        for state in (AcceleratorState, GradientState, PartialState)
    ]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield Accelerator(
            mixed_precision=config.precision, cpu=device.type == "cpu", device_placement=False
        )
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)
