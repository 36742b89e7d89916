"""Copies of a model that deepcopy alone refuses to make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def copy_model(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that has run with masks or weight norm.

    Such layers hold a weight that autograd computed, which does not copy itself; the copy holds its
    value until it runs.

    Args:
        model: the model.
        memo: for the id of an object what takes its place in the copy.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, {**computed, **(memo or {})})
