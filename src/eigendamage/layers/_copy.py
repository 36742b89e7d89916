"""Copies of a model that deepcopy alone refuses to make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from eigendamage.batches import tensors_in


def copy_model(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that has run with masks or weight norm.

    Such layers hold a weight that autograd computed, which does not copy itself, and others keep
    what they computed in a list or dict; the copy holds its value until it runs.

    Args:
        model: the model.
        memo: for the id of an object what takes its place in the copy.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in tensors_in(list(vars(module).values()))
        if not value.is_leaf
    }
    return copy.deepcopy(model, {**computed, **(memo or {})})
