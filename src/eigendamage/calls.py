"""A model called with a batch, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from eigendamage.batches import Batch, tensors_in
from eigendamage.errors import DataError, LossError


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's raw output on a batch, passed as `as_passed` says."""
    passed = as_passed(model, batch)
    return model(*passed.args, **passed.kwargs)


def as_passed(model: nn.Module, batch: Batch) -> Batch:
    """The batch by position and by name as the model takes it.

    A dict with one tensor under a name that ``forward`` does not know is passed by position.
    """
    if len(batch.kwargs) == 1 and not batch.args:
        (name, value) = next(iter(batch.kwargs.items()))
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name not in parameters and not takes_any:
            return replace(batch, args=(value,), kwargs={})
    return batch


def first_call(model: nn.Module, batch: Batch) -> Any:
    """The model's raw output on a batch that it may not fit.

    Raises:
        DataError: if the model cannot run on it.
    """
    try:
        return call(model, batch)
    except (RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the model cannot run on inputs of shape {batch.shapes()}: {reason}. Give batches of "
            f"the form that the model takes"
        ) from error


def logits_of(output: Any) -> Tensor:
    """The tensor that the loss is taken of: the output, its ``.logits``, or its first item.

    Raises:
        LossError: if the output holds no floating-point tensor there.
    """
    found: Any = output
    if isinstance(output, Mapping):
        found = cast("Mapping[str, Any]", output).get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", output)
        found = items[0] if items else None
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise LossError(
            f"the model returned {type(output).__name__}; expected a floating-point tensor, an "
            f"object with .logits, or a tuple that starts with one. Wrap the model so that its "
            f"forward returns the logits."
        )
    return found


def output_tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, whatever holds them.

    Raises:
        LossError: if there is none.
    """
    found = [t for t in tensors_in(output) if t.is_floating_point()]
    return found or [logits_of(output)]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
