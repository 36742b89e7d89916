"""Memory formats of convolutions: the faster one, and one that oneDNN's gradient keeps within."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.calls import call, output_tensors
from eigendamage.layers import preserved_random_state

_BLOCK = 16  # channels that oneDNN computes at a time with AVX-512; 8 with AVX2


@contextmanager
def channels_last(networks: Sequence[nn.Module], batches: Sequence[Batch]) -> Generator[None]:
    """Run networks with channels_last weights where that changes nothing but the time.

    On the CPU, convolutions of few channels are computed from a third to a half faster so. Networks
    that do not run that way on some batch, as those that call ``view`` on what a convolution
    returns, or that do not return the same, stay as they are, all of them: what one returns meets
    what another does. Outside of this the weights are in the memory that they came in.

    Args:
        networks: run in the mode that they are in.
        batches: inputs of all of them, one of every shape that will come.
    """
    weights = [w for network in networks for w in _weights(network)]
    if not weights or not torch.backends.mkldnn.is_available():
        yield
        return
    with preserved_random_state():
        before = [_returned(network, b) for network in networks for b in batches]
    with _as_they_came(weights):
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        try:
            with preserved_random_state():
                after = [_returned(network, b) for network in networks for b in batches]
        except Exception:  # noqa: BLE001 - a user's model may raise anything
            same = False
        else:
            same = all(_close(x, y) for x, y in zip(before, after, strict=True))
        if same:
            yield
            return
    yield


def _weights(network: nn.Module) -> list[Tensor]:
    """The kernels of a network's 2D convolutions on the CPU, without its narrow shortcuts."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and not _is_narrow(m)]
    kernels = [dict(m.named_parameters(recurse=False)).get("weight") for m in convolutions]
    return [w for w in kernels if w is not None and w.device.type == "cpu"]


def _returned(network: nn.Module, batch: Batch) -> list[Tensor]:
    """What a network returns, with the gradient of its sum: some fail only there."""
    trained = [p for p in network.parameters() if p.requires_grad]
    with torch.enable_grad(), narrow_shortcuts_in_rows(network):
        found = output_tensors(call(network, batch))
        if trained and any(x.requires_grad for x in found):
            total = torch.stack([x.float().sum() for x in found]).sum()
            torch.autograd.grad(total, trained, allow_unused=True)
    return [x.detach() for x in found]


def _close(mine: list[Tensor], its: list[Tensor]) -> bool:
    return len(mine) == len(its) and all(
        x.shape == y.shape and bool((x - y).norm() <= 1e-3 * y.norm())
        for x, y in zip(mine, its, strict=True)
    )


@contextmanager
def _as_they_came(weights: Iterable[Tensor]) -> Generator[None]:
    """Weights lie in the memory that they came in again after this, which others may share."""
    before = [(weight, weight.data) for weight in weights]
    try:
        yield
    finally:
        for weight, place in before:
            if weight.data_ptr() != place.data_ptr():
                weight.data = place.copy_(weight.data)


@contextmanager
def narrow_shortcuts_in_rows(model: nn.Module) -> Generator[None]:
    """Run strided 1×1 convolutions of few channels in rows, whatever format their input is in.

    On the CPU, oneDNN's gradient of their weight writes past its scratch memory where the input is
    in channels_last and has fewer channels than it computes at a time (oneDNN issue 6035, found in
    version 3.12): the process dies, or computes with whatever lay there. No value changes, and
    outside of this the weights are in the format that they came in.
    """
    narrow = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _is_narrow(m)]
    hooks = [m.register_forward_pre_hook(_read_in_rows) for m in narrow]
    try:
        with _as_they_came([m.weight for m in narrow]):
            for module in narrow:
                module.weight.data = _in_rows(module.weight.data)
            yield
    finally:
        for hook in hooks:
            hook.remove()


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
