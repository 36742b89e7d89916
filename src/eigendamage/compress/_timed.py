"""What the models that plans make take, measured whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eigendamage.batches import Data
from eigendamage.compress._steps import Settings, Source
from eigendamage.distributed import decided
from eigendamage.measure import latency
from eigendamage.plan import Plan
from eigendamage.progress import say
from eigendamage.surgery import apply_own_plan

ROUNDS = 25
_NEAR = 1.05  # times the budget: one timing may be that far off


@dataclass(frozen=True)
class Timing:
    """How latency is measured.

    Attributes:
        data: gives the size of an example.
        batch: examples a call.
    """

    data: Data
    batch: int


def judged(source: Source, plan: Plan, settings: Settings, timing: Timing, goal: float) -> float:
    """The fraction of the time that what a plan makes takes: two timings agree that it is within.

    Where one is within it and one is not, the middle of three counts. What is far above it is not
    timed again.
    """
    cut = cut_by(source, plan, settings)
    found = [fraction_of(source, cut, settings, timing, ROUNDS)]
    if found[0] <= _NEAR * goal:
        found.append(fraction_of(source, cut, settings, timing, ROUNDS))
    if min(found) <= goal < max(found):
        found.append(fraction_of(source, cut, settings, timing, ROUNDS))
    fraction = sorted(found)[len(found) // 2]
    tell(plan, fraction, goal, settings)
    return fraction


def cut_by(source: Source, plan: Plan, settings: Settings) -> nn.Module:
    """What a plan makes, without a repair, which changes no time."""
    with settings.clock.stage("surgery"):
        return apply_own_plan(source.model, plan, source.curvature)


def tell(plan: Plan, fraction: float, goal: float, settings: Settings) -> None:
    say(
        f"timed a model of {plan.left('macs'):.0%} of the MACs: {fraction:.3f} of the latency, "
        f"which may be {goal:g}",
        enabled=settings.progress,
    )


def fraction_of(
    source: Source, cut: nn.Module, settings: Settings, timing: Timing, rounds: int
) -> float:
    """The measured time of a model as a fraction of that which it was made of.

    The first of several processes measures while the others wait.
    """
    with settings.clock.stage("latency"):
        before, after = decided(
            lambda: latency([source.model, cut], timing.data, batch=timing.batch, rounds=rounds)
        )
    return after.median / before.median
