"""What a user is willing to spend."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from eigendamage.errors import BudgetError
from eigendamage.layers import Cost

Unit = Literal["macs", "params"]


class Budget(BaseModel):
    """How small the result has to be: exactly one of the three.

    Attributes:
        macs: the most multiply-accumulates that may be left, as a fraction of the whole model's.
        params: the most parameters that may be left, as a fraction of the whole model's.
        ratio: the fraction of all rows and columns (of the layers that may be compressed) to
            remove, cheapest first: the paper's only hyper-parameter. 0 changes nothing.

    Raises:
        BudgetError: if none or several are given, or one is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    macs: float | None = None
    params: float | None = None
    ratio: float | None = None

    def __init__(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        ratio: float | None = None,
    ) -> None:
        try:
            super().__init__(macs=macs, params=params, ratio=ratio)
        except ValidationError as error:
            raise BudgetError(f"a budget is made of numbers: {error}") from error
        given = {k: v for k, v in self.model_dump().items() if v is not None}
        if len(given) != 1:
            raise BudgetError(
                f"give exactly one of macs, params and ratio; found "
                f"{', '.join(given) if given else 'none'}"
            )
        ((name, value),) = given.items()
        if name == "ratio" and not 0 <= value <= 1:
            raise BudgetError(f"ratio is {value}; it is a fraction of the units, from 0 to 1")
        if name != "ratio" and not 0 < value <= 1:
            raise BudgetError(
                f"{name} is {value}; it is the fraction of the model's {name} that may be left, "
                f"above 0 and at most 1"
            )

    @property
    def unit(self) -> Unit | None:
        """What is counted, None for a ratio."""
        for unit in get_args(Unit):
            if getattr(self, unit) is not None:
                return unit
        return None

    @property
    def limit(self) -> float:
        """The one number given."""
        return next(v for v in (self.macs, self.params, self.ratio) if v is not None)

    def __str__(self) -> str:
        return f"{self.unit or 'ratio'} {self.limit:g}"


def counted(cost: Cost, unit: Unit) -> float:
    """A cost in one unit."""
    return cost.macs if unit == "macs" else float(cost.parameters)
