"""The memory format of convolutions whose gradient oneDNN would write past its memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 16  # channels that oneDNN computes at a time with AVX-512; 8 with AVX2


@contextmanager
def narrow_shortcuts_in_rows(model: nn.Module) -> Generator[None]:
    """Run strided 1×1 convolutions of few channels in rows, whatever format their input is in.

    On the CPU, oneDNN's gradient of their weight writes past its scratch memory where the input is
    in channels_last and has fewer channels than it computes at a time (oneDNN issue 6035, found in
    version 3.12): the process dies, or computes with whatever lay there. No value changes, and
    outside of this the weights are in the format that they came in.
    """
    narrow = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _is_narrow(m)]
    strides = [m.weight.stride() for m in narrow]
    hooks = [m.register_forward_pre_hook(_read_in_rows) for m in narrow]
    try:
        for module in narrow:
            module.weight.data = _in_rows(module.weight.data)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, stride in zip(narrow, strides, strict=True):
            if module.weight.stride() != stride:
                old = module.weight.data
                module.weight.data = old.new_empty_strided(old.shape, stride).copy_(old)


def _is_narrow(module: nn.Conv2d) -> bool:
    return (
        module.weight.device.type == "cpu"
        and set(module.kernel_size) == {1}
        and set(module.stride) != {1}
        and module.in_channels // module.groups < _BLOCK
    )


def _read_in_rows(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_in_rows(x) if isinstance(x, Tensor) else x for x in inputs)


def _in_rows(x: Tensor) -> Tensor:
    """The same in rows by its strides, which is what a convolution chooses its format by.

    Not ``contiguous()``: it does not look at the strides of axes of size 1, and so leaves a kernel
    of 1×1 as it is.
    """
    rows = torch.empty(x.shape, device="meta").stride()
    return x if x.stride() == rows else x.clone(memory_format=torch.contiguous_format)
