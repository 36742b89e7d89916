"""How a model was made, noted on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from eigendamage.documents import Document
from eigendamage.plan import Plan

_ATTRIBUTE = "_eigendamage_made"


@dataclass(frozen=True, eq=False)
class Made:
    """What a model was made by. Copies of the model share it.

    Attributes:
        plan: the last that was applied.
        report: of the whole, once there is one.
    """

    plan: Plan
    report: Document | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Made:
        return self


def made_by(model: nn.Module) -> Made | None:
    """What was noted on a model; None if `apply_plan` has not made it."""
    return vars(model).get(_ATTRIBUTE)


def set_made(model: nn.Module, made: Made) -> None:
    """Note on a model how it was made."""
    setattr(model, _ATTRIBUTE, made)
