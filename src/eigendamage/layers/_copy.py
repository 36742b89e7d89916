"""Copies of a model that deepcopy alone refuses to make."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eigendamage.batch import tensors_in
from eigendamage.errors import EigenDamageError

_OF_MODULES = ("_parameters", "_buffers", "_modules")
# What deepcopy raises for locks, files, generators, jitted functions and the like.
_UNCOPYABLE = (
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    copy.Error,
    pickle.PicklingError,
)


def copy_model(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that has run with masks or weight norm.

    Such layers hold a weight that autograd computed, which does not copy itself, and others keep
    what they computed in a list or dict; the copy holds its value until it runs.

    Args:
        model: the model.
        memo: for the id of an object what takes its place in the copy.

    Raises:
        EigenDamageError: if it holds something that cannot be copied.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tensors_in(list(vars(module).values()))
        if not value.is_leaf
    }
    try:
        return copy.deepcopy(model, {**computed, **(memo or {})})
    except torch.OutOfMemoryError:
        raise
    except _UNCOPYABLE as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise EigenDamageError(
            f"{type(model).__name__} cannot be copied, and the smaller model is made of a copy: "
            f"{_culprit(model)}{said}. Take what cannot be copied off the model for the call, or "
            f"give its class a __deepcopy__"
        ) from error


def require_copyable(model: nn.Module) -> None:
    """Refuse a model that `copy_model` cannot copy, at the cost of no weight.

    Raises:
        EigenDamageError: naming what cannot be copied.
    """
    copy_model(model, _weights(model))


def _weights(model: nn.Module) -> dict[int, Any]:
    """All its tensors in their own place."""
    every = (
        *model.parameters(),
        *model.buffers(),
        *(t for m in model.modules() for t in tensors_in(list(vars(m).values()))),
    )
    return {id(tensor): tensor for tensor in every}


def _culprit(model: nn.Module) -> str:
    """The first attribute that cannot be copied, as the start of a sentence; empty if none."""
    same = {**_weights(model), **{id(module): module for module in model.modules()}}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _OF_MODULES:
                continue
            try:
                copy.deepcopy(value, dict(same))
            except _UNCOPYABLE:
                return f"its '{'.'.join(filter(None, (path, name)))}': "
    return ""
