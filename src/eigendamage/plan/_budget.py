"""What a compressed model may cost at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from eigendamage.errors import BudgetError
from eigendamage.layers import Cost

Unit = Literal["macs", "params", "bytes"]
"""What is counted of a model, in closed form."""
UNITS: tuple[Unit, ...] = get_args(Unit)


class Budget(BaseModel):
    """How small the result has to be.

    Sizes are fractions of the whole model's: one of them, or several that must all hold. A loss or
    a ratio stands alone.

    Attributes:
        macs: the most multiply-accumulates that may be left.
        params: the most parameters that may be left.
        bytes: the most bytes of parameters that may be left; another measure than ``params`` where
            a model mixes data types.
        latency: the most of the original's latency that may be left, measured on the device at
            hand; for ``method="auto"``.
        loss: the most that the mean divergence from the original on held-out inputs may be (KL in
            nats for cross-entropy), measured on models that are built and repaired; the smallest
            such model is searched for. For ``method="auto"`` in `compress`.
        ratio: the fraction of all units (of the layers that may be compressed) to remove, cheapest
            first: the paper's only hyper-parameter. 0 changes nothing. Not for ``method="auto"``.

    Raises:
        BudgetError: if none is given, a loss or a ratio is given with others, or one is out of
            range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    loss: float | None = None
    ratio: float | None = None

    def __init__(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        bytes: float | None = None,
        latency: float | None = None,
        loss: float | None = None,
        ratio: float | None = None,
    ) -> None:
        try:
            super().__init__(
                macs=macs, params=params, bytes=bytes, latency=latency, loss=loss, ratio=ratio
            )
        except ValidationError as error:
            found = error.errors()[0]
            raise BudgetError(
                f"a budget is made of numbers: {found['loc'][0]} is {found['input']!r}"
            ) from error
        given = self.given
        if not given:
            raise BudgetError(
                "a budget is empty; give macs, params, bytes or latency (or several of them), "
                "or loss, or ratio"
            )
        for alone in ("loss", "ratio"):
            if alone in given and len(given) > 1:
                raise BudgetError(
                    f"a budget of {alone} stands alone; found {', '.join(given)} together"
                )
        for name, value in given.items():
            _check(name, value)

    @property
    def given(self) -> dict[str, float]:
        """What is given, by name."""
        return {k: v for k, v in self.model_dump().items() if v is not None}

    @property
    def limits(self) -> dict[Unit, float]:
        """The fraction that may be left of everything that is counted in closed form."""
        given = self.given
        return {unit: given[unit] for unit in UNITS if unit in given}

    @property
    def unit(self) -> Unit | None:
        """What is counted (the first, if it is several), None for a ratio, a loss, a latency."""
        return next(iter(self.limits), None)

    def step(self, goal: float, left: Mapping[str, float]) -> Budget:
        """What a step on the way has to leave of the model that it starts from.

        Args:
            goal: how far along the way the step ends, from 0 to 1: sizes shrink by the same factor
                in steps of the same length. A loss or a ratio is that of every step.
            left: what earlier steps have left of the model, by unit.
        """
        if self.loss is not None or self.ratio is not None:
            return self
        sizes = {k: v**goal / left.get(k, 1.0) for k, v in self.given.items()}
        return Budget(**{k: min(1.0, v) for k, v in sizes.items()})

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.given.items())


def _check(name: str, value: float) -> None:
    if name == "loss":
        if not 0 < value < float("inf"):
            raise BudgetError(f"loss is {value}; it is a divergence in nats, above 0")
    elif name == "ratio":
        if not 0 <= value <= 1:
            raise BudgetError(f"ratio is {value}; it is a fraction of the units, from 0 to 1")
    elif not 0 < value <= 1:
        raise BudgetError(
            f"{name} is {value}; it is the fraction of the model's {name} that may be left, "
            f"above 0 and at most 1"
        )


def counted(cost: Cost, unit: Unit) -> float:
    """A cost in one unit."""
    match unit:
        case "macs":
            return cost.macs
        case "params":
            return float(cost.parameters)
        case "bytes":
            return float(cost.bytes)


def cost_of(model: nn.Module, macs: float) -> Cost:
    """What a whole model costs; its MACs are known already."""
    parameters = list(model.parameters())
    return Cost(
        macs,
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )
