"""What every kind of method starts from, and what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eigendamage.curvature import Curvature
from eigendamage.errors import NonFiniteError, NothingToCompressError
from eigendamage.layers import Cost, Layer
from eigendamage.plan._budget import Budget
from eigendamage.plan._plan import Action, CarrierPlan, CounterPlan
from eigendamage.plan._views import LayerView


@dataclass(frozen=True, eq=False)
class Task:
    """What every kind of method starts from.

    Attributes:
        model: the model; only its weights are read.
        curvature: of it.
        layers: the layers that the curvature is of.
        total: cost of the whole model as it is.
        budget: what is asked for.
        max_ratio: the most of a side that may go.
        damping: of S and A where they are inverted.
        ignored: why modules are left alone on request.
    """

    model: nn.Module
    curvature: Curvature
    layers: Mapping[str, Layer]
    total: Cost
    budget: Budget
    max_ratio: float
    damping: float
    ignored: Mapping[str, str]

    def view(self, name: str) -> LayerView:
        """A layer as the prices see it."""
        layer = self.layers[name]
        return LayerView(
            name,
            layer.weight(),
            layer.bias(),
            self.curvature[name],
            self.damping,
            factored=not isinstance(layer.module, nn.Linear | nn.Conv2d),
        )

    def refuse_non_finite(self, name: str, prices: Tensor) -> None:
        """Raise NonFiniteError if a price is not a number."""
        if not bool(torch.isfinite(prices).all()):
            raise NonFiniteError(
                f"'{name}': its prices are not finite; the weight or the curvature holds NaN or "
                f"overflows"
            )


@dataclass(frozen=True, eq=False)
class Result:
    """What a kind of method decided.

    Attributes:
        actions: for the layers that are not simply kept.
        costs: of the layers afterwards, where they change.
        prices: of the layers; 0 where none is named, None where the measure is no rise of loss.
        kept: the reasons for the layers without an action.
        left: cost of the whole model afterwards.
        ratio: the fraction of units that do not exceed the threshold, where there is one.
        changes: whether anything is changed.
        carriers: modules between the layers that lose channels.
        counters: attributes of modules that have to follow what goes.
        left_alone: why other things than layers are left alone.
        calibrated: prices corrected by measurements, where they were.
        gap: the most that a better allocation could save, where it is known.
        notes: what a user should know.
    """

    actions: Mapping[str, Action]
    costs: Mapping[str, Cost]
    prices: Mapping[str, float | None]
    kept: Mapping[str, str]
    left: Cost
    ratio: float | None
    changes: bool
    carriers: Mapping[str, CarrierPlan] = field(default_factory=dict[str, CarrierPlan])
    counters: tuple[CounterPlan, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict[str, str])
    calibrated: Mapping[str, float] = field(default_factory=dict[str, float])
    gap: float | None = None
    notes: tuple[str, ...] = ()


def refuse_none(found: Mapping[str, object], kept: Mapping[str, str]) -> None:
    """Raise NothingToCompressError with the reasons if there is nothing to choose from."""
    if not found:
        raise NothingToCompressError(
            "every compressible layer is kept: "
            + "; ".join(f"'{n}': {r}" for n, r in list(kept.items())[:6])
        )
