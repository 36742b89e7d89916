"""Single weights: what a threshold over their prices makes of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eigendamage.errors import BudgetError
from eigendamage.layers import Cost
from eigendamage.plan._budget import Unit
from eigendamage.plan._methods import WeightMethod
from eigendamage.plan._plan import Mask
from eigendamage.plan._task import Result, Task, refuse_none
from eigendamage.plan._threshold import Cut, GlobalThreshold, keep_above

MASKS_ARE_NOT_SMALLER = (
    "masks set weights to zero and leave them in place: the model is neither smaller nor faster "
    "than before"
)


@dataclass(frozen=True, eq=False)
class WeightCut(Cut):
    """What one threshold makes of each layer: which weights stay."""

    keep: Mapping[str, Bool[Tensor, "o i K"]]


class WeightThreshold(GlobalThreshold[WeightCut]):
    """Sets single weights of all layers to zero at one price. The model's cost stays the same."""

    def __init__(
        self, prices: Mapping[str, Float[Tensor, "o i K"]], total: Cost, max_ratio: float
    ) -> None:
        super().__init__(total, max_ratio)
        self._prices = prices

    def units(self) -> Float[Tensor, " units"]:
        return torch.cat([p.flatten() for p in self._prices.values()])

    def at(self, threshold: float, unit: Unit) -> WeightCut:
        keep = {
            name: keep_above(p.flatten(), threshold, self._max_ratio).reshape(p.shape)
            for name, p in self._prices.items()
        }
        changes = any(not bool(k.all()) for k in keep.values())
        return WeightCut(left=self._total, changes=changes, keep=keep)


def plan_weights(task: Task, method: WeightMethod) -> Result:
    """Which single weights become zero.

    Raises:
        BudgetError: if the budget is not a ratio, which masks cannot meet.
    """
    if task.budget.ratio is None:
        raise BudgetError(
            f"a budget of {task.budget} cannot be met by masks: {MASKS_ARE_NOT_SMALLER}. Give "
            f"Budget(ratio=…), the fraction of single weights to set to zero, or a method that "
            f"removes channels or ranks"
        )
    kept = dict(task.ignored)
    prices: dict[str, Tensor] = {}
    for name, layer in task.layers.items():
        if isinstance(layer.module, nn.Linear | nn.Conv2d):
            if name not in kept:
                prices[name] = method.prices(task.view(name))
                task.refuse_non_finite(f"layer {name}", prices[name])
        else:
            kept[name] = "it is factored; its weight is a product, which a mask does not fit"
    refuse_none(prices, kept)
    chosen = WeightThreshold(prices, task.total, task.max_ratio).meet(task.budget)
    keep = {name: k for name, k in chosen.cut.keep.items() if not bool(k.all())}
    return Result(
        actions={n: Mask.of(k, method.repair, task.damping) for n, k in keep.items()},
        costs={},
        prices={n: float(prices[n][~k].sum()) for n, k in keep.items()},
        kept={**dict.fromkeys(prices, "all its weights stay"), **kept},
        left=task.total,
        ratio=chosen.ratio,
        changes=chosen.cut.changes,
        notes=(MASKS_ARE_NOT_SMALLER,),
    )
