"""Budgets of latency, which are met by building and measuring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from eigendamage.compress._planned import planned
from eigendamage.compress._steps import Built, Settings, Source, built, divergence
from eigendamage.compress._timed import ROUNDS, Timing, cut_by, fraction_of, judged, tell
from eigendamage.errors import BudgetError, EigenDamageError, NothingToCompressError
from eigendamage.plan import ActionKind, Budget, Menus, Plan

_TRIALS = 6
_BELOW = 0.93  # of the budget: a model that is faster than that gives away accuracy
_CLOSE = 0.003  # of what is asked for, between a model that is fast enough and one that is not
_CONFIRMED = 1.02  # times the budget, which a model may take when it is timed again
_BUILT = 2  # models that are repaired and compared
_FAR_BELOW = 0.9  # of the budget
_PLANNABLE = 0.005  # above the least that can be planned: not by rank 1 everywhere


@dataclass(frozen=True)
class _Way:
    """One way to plan for a latency.

    Attributes:
        settings: with the actions that are allowed.
        menus: to plan from.
        unit: what the plans are asked for: ``latency`` by the table of layers, or ``macs``.
    """

    settings: Settings
    menus: Menus | None
    unit: Literal["latency", "macs"] = "latency"

    def limit(self, whole: Budget) -> float:
        """The most that may be asked for, as the budget says something of this unit beside."""
        return whole.given.get(self.unit, 1.0) if self.unit != "latency" else 1.0

    def budget(self, whole: Budget, asked: float) -> Budget:
        """What to plan for: ``asked`` in place of the latency, and what else holds."""
        given = {unit: limit for unit, limit in whole.given.items() if unit != "latency"}
        return Budget(**{**given, self.unit: asked})


@dataclass(frozen=True)
class _Trials:
    """What came of one way.

    Attributes:
        source: with what was calibrated on the way.
        best: the slowest plan whose model is within the latency, if there is one.
        fastest: what the fastest model that was built takes.
        refused: why nothing was built; None if something was.
    """

    source: Source
    best: Plan | None = None
    fastest: float = math.inf
    refused: BudgetError | NothingToCompressError | None = None


def within_latency(
    original: nn.Module,
    source: Source,
    budget: Budget,
    goal: float,
    settings: Settings,
    timing: Timing,
) -> Built:
    """The best model that, measured whole, is within a latency.

    What calls of low-rank layers cost between layers, how many channels a processor handles at a
    time, and what one layer leaves in its caches for the next is in no table of layers. So channels
    alone are tried too, also in other numbers than the multiples of the menus and by MACs; of the
    plans of least price that are fast enough also when they are timed again, apart from the trials,
    that is taken which diverges least once it is repaired; where none is, the fastest.

    Args:
        original: what is repaired towards.
        source: what the model is made of.
        budget: all of it.
        goal: the latency in it.
        settings: of the steps.
        timing: of latencies.

    Raises:
        BudgetError: if no model that was built is fast enough, or none can be planned.
        NothingToCompressError: if nothing may be changed.
    """
    menus, within, slower = source.menus, list[Plan](), list[tuple[float, Plan]]()
    fastest, refused = math.inf, None
    for way in _ways(source, settings):
        tried = _trials(way, source, budget, goal, timing, _dearest(within))
        source = replace(tried.source, menus=menus)
        fastest, refused = min(fastest, tried.fastest), refused or tried.refused
        best = tried.best
        if best is None or any(_alike(best, plan) for plan in (*within, *(p for _, p in slower))):
            continue
        again = _again(source, best, settings, timing, goal)
        if again <= _CONFIRMED * goal:
            within.append(best)
        else:
            slower.append((again, best))
    if math.isinf(fastest) and refused is not None:
        raise refused
    actions = settings.planning.actions
    if not within and not slower:
        channels = "" if "channels" in actions else ", allow channels too, which add no calls"
        raise BudgetError(
            f"a budget of {budget} cannot be met: the fastest model that was built takes "
            f"{fastest:.3f} of the original's latency at batch {timing.batch}. Fewer MACs "
            f"are not always less time, in narrow layers least of all; give a larger budget"
            f"{channels}, or a budget of MACs",
            {"latency": fastest},
        )
    cheapest = sorted(within, key=_price)[:_BUILT]
    # Where none was fast enough again, the machine may have become another since: the fastest.
    plans = cheapest or [min(slower, key=lambda timed: timed[0])[1]]
    chosen = _least_harmed(original, source, plans, settings)
    fraction = fraction_of(source, chosen.cut, settings, timing, 2 * ROUNDS)
    return replace(
        chosen,
        # The gap is that of what was asked for on the way, not of the latency.
        plan=chosen.plan.model_copy(update={"gap": None}),
        latency=fraction,
        notes=(*chosen.notes, *_notes(chosen.plan, actions, fraction, goal)),
    )


def _ways(source: Source, settings: Settings) -> Iterator[_Way]:
    """All that is on the menu, by the table of layers; and channels alone, by it and by MACs."""
    actions = settings.planning.actions
    if actions != ("channels",):
        yield _Way(settings, source.menus)
    if "channels" not in actions:
        return
    alone = replace(settings, planning=replace(settings.planning, actions=("channels",)))
    yield _Way(alone, source.menus)
    yield _Way(alone, source.menus, "macs")
    if source.finer is not None:
        with settings.clock.stage("menus"):
            finer = source.finer()
        yield _Way(alone, finer)
        yield _Way(alone, finer, "macs")


def _again(source: Source, plan: Plan, settings: Settings, timing: Timing, goal: float) -> float:
    """The fraction of the time that what a plan makes takes, apart from the trials that chose it.

    The best of several noisy trials looks faster than it is.
    """
    fraction = fraction_of(source, cut_by(source, plan, settings), settings, timing, 2 * ROUNDS)
    tell(plan, fraction, goal, settings)
    return fraction


def _least_harmed(
    original: nn.Module, source: Source, plans: list[Plan], settings: Settings
) -> Built:
    """Of what plans make the model of least divergence on held-out inputs.

    That of the first plan where there is no divergence.
    """
    first, *others = plans
    best = built(original, source, first, settings)
    least = divergence(original, best.model, settings) if others else None
    if least is None:
        return best
    for plan in others:
        other = built(original, source, plan, settings)
        harm = divergence(original, other.model, settings)
        if harm is not None and harm < least:
            best, least = other, harm
    return best


def _alike(plan: Plan, other: Plan) -> bool:
    """Whether they make the same model, whatever was known of its price."""
    its = other.layers
    return all(layer.action == its[name].action for name, layer in plan.layers.items())


def _price(plan: Plan) -> float:
    return plan.expected or 0.0


def _dearest(within: list[Plan]) -> float:
    """What a plan may cost so as to be built: the price of the last that would be without it."""
    prices = sorted(map(_price, within))
    return prices[_BUILT - 1] if len(prices) >= _BUILT else math.inf


def _trials(
    way: _Way, source: Source, budget: Budget, goal: float, timing: Timing, dearest: float
) -> _Trials:
    """The slowest model within a latency that one way of planning finds.

    The table's times of layers do not add up to those of a model to the last few percent, so models
    are built by it (without a repair, which changes no time) and measured whole beside the one
    that they are made of, and what is asked for is corrected until the result is within the latency
    and not far below. Where by the table no plan is fast enough, what it says is the fastest is
    built: what it counts as time between the layers gets shorter too where they get narrower. Plans
    that cost more than ``dearest`` and are still too slow are not pursued: what is faster costs
    more.
    """
    source, settings = replace(source, menus=way.menus), way.settings
    found = _Trials(source)
    lowest, highest = 0.0, way.limit(budget)
    asked = min(goal, highest)
    slowest, fraction, before = 0.0, math.inf, None
    for _ in range(_TRIALS):
        trial = way.budget(budget, asked)
        try:
            source, plan = planned(source, trial, settings)
        except (BudgetError, NothingToCompressError) as error:
            lowest = asked
            nearest = None if found.best is not None else _nearest(error, trial, way.unit)
            if nearest is not None and nearest < highest:
                asked = lowest = nearest
            elif math.isinf(found.fastest):
                return replace(found, refused=error)
            else:
                asked = (asked + highest) / 2
            continue
        found = replace(found, source=source)
        same = before is not None and _alike(plan, before)
        if not same:
            before, fraction = plan, judged(source, plan, settings, timing, goal)
            found = replace(found, fastest=min(found.fastest, fraction))
        if fraction <= goal:
            if fraction > slowest:
                found, slowest = replace(found, best=plan), fraction
            if same or fraction >= _BELOW * goal:
                break  # the same for more: it is another limit that holds
            lowest = max(lowest, asked)
        elif _price(plan) > dearest:
            break
        else:
            highest = min(highest, asked)
        if highest - lowest < _CLOSE:
            break
        # Exact where time is a fixed part and one in proportion to what was asked for.
        middle = 0.5 * (1 + _BELOW) * goal
        wanted = asked - (fraction - middle) * (1 - asked) / max(1 - fraction, 1e-9)
        near = lowest < wanted < highest and not same
        asked = wanted if near else (lowest + highest) / 2
    return found


def _nearest(error: EigenDamageError, budget: Budget, unit: str) -> float | None:
    """The least of a unit that can be planned; None where something else stands in the way."""
    least = error.least if isinstance(error, BudgetError) else {}
    beyond = [each for each, fraction in budget.given.items() if least.get(each, 0.0) > fraction]
    if beyond != [unit] or least[unit] >= 1 - _PLANNABLE:
        return None
    return least[unit] + _PLANNABLE


def _notes(
    plan: Plan, actions: Sequence[ActionKind], fraction: float, goal: float
) -> Iterator[str]:
    """What a user would not expect of a model within a latency."""
    changes = {layer.action.kind for layer in plan.layers.values() if layer.changes}
    if changes == {"channels"} and len(actions) > 1:
        yield (
            "of the models that were timed one with fewer channels alone does the least harm; "
            "other changes of layers add calls, which take time"
        )
    if fraction > goal:
        yield (
            f"timed once more, the model takes {fraction:.3f} of the latency, above the budget of "
            f"{goal:g}: times vary that much on this machine; ask for less to be on the safe side"
        )
    if fraction < _FAR_BELOW * goal:
        yield (
            f"the model takes {fraction:.3f} of the latency, far below the budget of {goal:g}: "
            f"what was timed between the two was too slow or cost more"
        )
