"""What layers cost alone, held against their prices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from eigendamage.batches import Data
from eigendamage.curvature import Curvature, Loss
from eigendamage.measure._alone import divergences_alone
from eigendamage.measure._change import Change, planned_changes
from eigendamage.plan import OF_CHANNELS, Calibration, Channels, Keep, Plan
from eigendamage.surgery import apply_plan

# A price this near to one that was measured, relatively, is not measured again.
_NEAR = 0.1


def calibrate(
    model: nn.Module,
    curvature: Curvature,
    plans: Sequence[Plan],
    data: Data,
    *,
    known: Calibration | None = None,
    loss: Loss = "cross_entropy",
    max_examples: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure what each change of some plans costs alone, for `make_plan`'s ``calibration``.

    Each layer (each group of channels with its readers) is changed by itself in the otherwise
    original model, as `apply_plan` does it, and the divergence is measured.

    Args:
        model: the original; it is not changed.
        curvature: of it.
        plans: whose changes to measure. Prices near to a known one are left out.
        data: inputs that had no part in the curvature, at best; labels are not needed.
        known: what was measured before.
        loss: as the curvature's.
        max_examples: the most examples to measure on.
        progress: whether to show progress.
    """
    calibration = known or Calibration()
    prices: defaultdict[str, list[float]] = defaultdict(list)
    variants: defaultdict[str, list[Mapping[str, Change]]] = defaultdict(list)
    for plan in plans:
        changes = planned_changes(model, apply_plan(model, plan, curvature), plan)
        for name, planned in plan.layers.items():
            if isinstance(planned.action, Keep) or not planned.price:
                continue
            key, members = _scope(name, planned.action, curvature)
            seen = [p.price for p in calibration.points.get(key, ())] + prices[key]
            if any(abs(planned.price - price) <= _NEAR * price for price in seen):
                continue
            together = {member: changes[member] for member in members if member in changes}
            if together:
                prices[key].append(planned.price)
                variants[key].append(together)
    if not variants:
        return calibration
    measured = divergences_alone(
        model, variants, data, loss=loss, max_examples=max_examples, progress=progress
    )
    return calibration.extended(
        {key: list(zip(prices[key], found, strict=True)) for key, found in measured.items()}
    )


def _scope(name: str, action: object, curvature: Curvature) -> tuple[str, tuple[str, ...]]:
    """Under which name a change is calibrated, and the layers that make it."""
    groups = {} if curvature.channels is None else curvature.channels.groups
    if isinstance(action, Channels) and name in groups:
        readers = groups[name].readers
        return OF_CHANNELS + name, tuple(dict.fromkeys(r.module for r in readers))
    return name, (name,)
