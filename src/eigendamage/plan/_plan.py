"""The plan: for each layer an action, its price, its cost before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from eigendamage.files import Document, Frozen
from eigendamage.layers import Cost, Form
from eigendamage.plan._budget import Budget

PLAN_VERSION = 1


class Keep(Frozen):
    """The layer stays as it is, for the reason given."""

    kind: Literal["keep"] = "keep"
    reason: str


class EigenBlock(Frozen):
    """Rows and columns of the weight that are kept in the Kronecker-factored eigenbasis.

    Attributes:
        rows: kept rows of W', indices of the columns of Q_S, ascending.
        columns: kept columns of W', indices of the columns of Q_A, ascending.
        form: how the factored layer is laid out.
    """

    kind: Literal["eigenblock"] = "eigenblock"
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    form: Form


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Action = Annotated[Keep | EigenBlock, Field(discriminator="kind")]


class LayerPlan(Frozen):
    """What happens to one layer.

    Attributes:
        action: what is done.
        price: expected rise of the mean loss per example (nats for cross-entropy).
        shape: (o, i, K) of the weight, to recognise the layer.
        macs: multiply-accumulates of one example before and after.
        parameters: parameters before and after.
    """

    action: Action
    price: Amount
    shape: tuple[int, int, int]
    macs: tuple[Amount, Amount]
    parameters: tuple[int, int]

    @property
    def saved(self) -> Cost:
        """What the action saves."""
        return Cost(self.macs[0] - self.macs[1], self.parameters[0] - self.parameters[1])

    @property
    def changes(self) -> bool:
        """Whether the layer is changed at all."""
        return not isinstance(self.action, Keep)


class Plan(Document):
    """What is done to each layer, and what that is expected to cost and save.

    Attributes:
        version: of the file format.
        method: name of the method.
        budget: what was asked for.
        ratio: the fraction of units whose price the threshold reaches, where the method has one.
            Fewer go where a layer would not shrink, or one side would lose too many.
        layers: by dotted path, in the order in which they run.
        left_alone: why other modules with parameters are not in the plan.
        macs: multiply-accumulates of one example in the whole model, before and after.
        parameters: parameters of the whole model, before and after.
        notes: what a user should know.
    """

    version: Literal[1] = PLAN_VERSION
    method: str
    budget: Budget
    ratio: float | None = None
    layers: Mapping[str, LayerPlan]
    left_alone: Mapping[str, str]
    macs: tuple[Amount, Amount]
    parameters: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def price(self) -> float:
        """Expected rise of the mean loss per example, all layers together."""
        return sum(layer.price for layer in self.layers.values())

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers that are changed."""
        return tuple(name for name, layer in self.layers.items() if layer.changes)
