"""Budgets that are met by building and measuring: latency and loss; and several shots."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import nn

from eigendamage.batches import Data
from eigendamage.compress._planned import planned
from eigendamage.compress._steps import Built, Settings, Source, built, divergence
from eigendamage.distributed import decided
from eigendamage.errors import BudgetError, NothingToCompressError
from eigendamage.measure import Latency, latency
from eigendamage.plan import Budget, Plan
from eigendamage.surgery import apply_plan

_LATENCY_TRIALS = 6
_LATENCY_BELOW = 0.93  # of the budget: a model that is faster than that gives away accuracy
_LATENCY_CLOSE = 0.003  # by the table, between a model that is fast enough and one that is not
_LATENCY_ROUNDS = 25
_PLANNABLE = 0.005  # of the latency above the least of a table: not by rank 1 everywhere
_LOSS_TRIALS = 7
_LOSS_CLOSE = 0.01  # of the original's MACs between a model that is good enough and one that is not

Refresh = Callable[[nn.Module], Source]
"""Curvature and menus of a model."""


@dataclass(frozen=True)
class Timing:
    """How latency is measured.

    Attributes:
        data: gives the size of an example.
        batch: examples a call.
    """

    data: Data
    batch: int


def smaller(
    original: nn.Module, source: Source, budget: Budget, settings: Settings, timing: Timing
) -> Built:
    """The best model within a budget of any kind but a ratio."""
    if budget.loss is not None:
        found = _within_loss(original, source, budget.loss, settings)
        return replace(found, plan=found.plan.model_copy(update={"budget": budget}))
    if budget.latency is None:
        found, plan = planned(source, budget, settings)
        return built(original, found, plan, settings)
    found, plan, fraction = _within_latency(source, budget, settings, timing)
    plan = plan.model_copy(update={"budget": budget})
    result = built(original, found, plan, settings)
    notes = (*result.notes, *_above(fraction, budget.latency))
    return replace(result, latency=fraction, notes=notes)


def _above(fraction: float, goal: float) -> tuple[str, ...]:
    """A note where a model that was within a latency is not when it is timed once more."""
    if fraction <= goal:
        return ()
    return (
        f"timed once more, the model takes {fraction:.3f} of the latency, above the budget of "
        f"{goal:g}: times vary that much on this machine; ask for less to be on the safe side",
    )


def _within_latency(
    source: Source, budget: Budget, settings: Settings, timing: Timing
) -> tuple[Source, Plan, float]:
    """The plan whose model, measured whole, is within a latency, and the fraction that it takes.

    Where no model of all kinds of changes is fast enough, one of channels alone may be: a low-rank
    layer is several calls, and what that costs between layers is in no table of layers.

    Raises:
        BudgetError: if no model that was built is fast enough.
    """
    best, fastest = _trials(source, budget, settings, timing)
    actions = settings.planning.actions
    if best is None and "channels" in actions and len(actions) > 1:
        alone = replace(settings, planning=replace(settings.planning, actions=("channels",)))
        with suppress(BudgetError, NothingToCompressError):
            best, other = _trials(source, budget, alone, timing)
            fastest = min(fastest, other)
    if best is None:
        raise BudgetError(
            f"a budget of {budget} cannot be met: the fastest model that was built takes "
            f"{fastest:.3f} of the original's latency at batch {timing.batch}. Fewer MACs "
            f"are not always less time, in narrow layers least of all; give a larger budget, or "
            f"one of MACs",
            {"latency": fastest},
        )
    # The best of several noisy trials looks faster than it is: it is timed once more.
    source, plan, _ = best
    return source, plan, _fraction(source, plan, settings, timing, 2 * _LATENCY_ROUNDS)


def _trials(
    source: Source, budget: Budget, settings: Settings, timing: Timing
) -> tuple[tuple[Source, Plan, float] | None, float]:
    """The slowest model within a latency with its fraction, if any; the fastest that was built.

    The table's times of layers do not add up to those of a model to the last few percent, so models
    are built by it (without a repair, which changes no time) and measured whole beside the one
    that they are made of, and the budget is corrected until the result is within it and not far
    below. Where by the table no plan is fast enough, what it says is the fastest is built: what it
    counts as time between the layers gets shorter too where they get narrower.

    Raises:
        BudgetError: if there is no plan to build, as another limit of the budget cannot be met.
    """
    assert budget.latency is not None
    goal, asked = budget.latency, budget.latency
    best: tuple[Source, Plan, float] | None = None
    fastest = math.inf
    highest, lowest = 1.0, 0.0
    refused: BudgetError | None = None
    for _ in range(_LATENCY_TRIALS):
        trial = _with_latency(budget, asked)
        try:
            found, plan = planned(source, trial, settings)
        except BudgetError as error:
            refused = refused or error
            lowest = asked
            nearest = _nearest(error, trial) if best is None else None
            if nearest is not None and nearest < highest:
                asked = lowest = nearest
            elif math.isinf(fastest):
                raise refused from None
            else:
                asked = (asked + highest) / 2
            continue
        source = found
        fraction = _fraction(source, plan, settings, timing, _LATENCY_ROUNDS)
        fastest = min(fastest, fraction)
        if fraction <= goal:
            if best is None or fraction > best[2]:
                best = source, plan, fraction
            lowest = max(lowest, asked)
            if fraction >= _LATENCY_BELOW * goal:
                break
        else:
            highest = min(highest, asked)
        # Exact where time is a fixed part and one in proportion to what was asked for.
        middle = 0.5 * (1 + _LATENCY_BELOW) * goal
        wanted = asked - (fraction - middle) * (1 - asked) / max(1 - fraction, 1e-9)
        asked = wanted if lowest < wanted < highest else (lowest + highest) / 2
        if highest - lowest < _LATENCY_CLOSE:
            break
    return best, fastest


def _fraction(source: Source, plan: Plan, settings: Settings, timing: Timing, rounds: int) -> float:
    """The measured time of what a plan makes of a model, as a fraction of that model's."""
    with settings.clock.stage("latency"):
        cut = apply_plan(source.model, plan, source.curvature)
        before, after = _times([source.model, cut], timing, rounds)
    return after.median / before.median


def _nearest(error: BudgetError, budget: Budget) -> float | None:
    """The least latency that can be planned; None where something else stands in the way."""
    least = error.least
    beyond = [unit for unit, fraction in budget.given.items() if least.get(unit, 0.0) > fraction]
    if beyond != ["latency"] or least["latency"] >= 1 - _PLANNABLE:
        return None
    return least["latency"] + _PLANNABLE


def _times(models: list[nn.Module], timing: Timing, rounds: int) -> list[Latency]:
    """What models take a call; the first of several processes measures while the others wait."""
    return decided(lambda: latency(models, timing.data, batch=timing.batch, rounds=rounds))


def _with_latency(budget: Budget, fraction: float) -> Budget:
    return Budget(**{**budget.given, "latency": min(1.0, fraction)})


def _within_loss(original: nn.Module, source: Source, loss: float, settings: Settings) -> Built:
    """The model of fewest MACs whose measured divergence on held-out inputs stays below ``loss``.

    Raises:
        BudgetError: if none of those that were built does.
    """
    if settings.parts is None:
        raise BudgetError("a budget of loss needs held-out data; leave repair or calibrate on")
    low, high = 0.0, 1.0  # too small, large enough
    best: Built | None = None
    nearest = math.inf
    ratio = 1.0
    for _ in range(_LOSS_TRIALS):
        asked = _asked(source, loss / ratio, low, high, settings)
        try:
            source, plan = planned(source, Budget(macs=asked), settings)
            if not plan.changed:
                break
            trial = built(original, source, plan, settings)
        except BudgetError:
            low = asked
            continue
        found = divergence(original, trial.model, settings)
        if found is None:
            raise BudgetError(
                "a budget of loss needs a loss with a divergence: cross_entropy, causal_lm, mse or "
                "bce"
            )
        nearest = min(nearest, found)
        predicted = plan.calibrated or plan.price
        if predicted and found > 0:
            ratio = found / predicted
        if found <= loss:
            high = asked
            if best is None or trial.plan.macs[1] < best.plan.macs[1]:
                best = trial
        else:
            low = asked
        if high - low < _LOSS_CLOSE:
            break
    if best is None:
        raise BudgetError(
            f"a budget of loss {loss:g} cannot be met: the nearest model that was built diverges "
            f"by {nearest:.4g} on held-out inputs; give a larger loss, or more data to repair with"
        )
    return best


def _asked(source: Source, price: float, low: float, high: float, settings: Settings) -> float:
    """The fraction of MACs at which a plan has this price; within the bracket, off its ends."""
    below, above = low, high
    for _ in range(8):
        middle = (below + above) / 2
        try:
            plan = settings.planning.plan(source, Budget(macs=middle), refine=0)
        except BudgetError:
            below = middle
            continue
        predicted = plan.calibrated or plan.price or 0.0
        if predicted > price:
            below = middle
        else:
            above = middle
    margin = 0.15 * (high - low)
    return min(max((below + above) / 2, low + margin), high - margin)


def in_shots(
    original: nn.Module,
    source: Source,
    budget: Budget,
    settings: Settings,
    timing: Timing,
    refresh: Refresh,
    *,
    shots: int,
    go_back: bool,
) -> list[Built]:
    """The model after several shots, each with curvature, plan and repair of its own.

    Sizes shrink by the same factor in every shot.

    Args:
        original: what every shot is repaired towards.
        source: the original with what is known of it.
        budget: of the whole.
        settings: of the steps.
        timing: of latencies.
        refresh: curvature and menus of a model.
        shots: how many.
        go_back: build each shot but the first also from one shot earlier, and take that where its
            divergence on held-out inputs is lower.

    Returns:
        The shots that led to the result.
    """
    chain: list[Built] = []
    sources = [source]
    for index in range(shots):
        goal = (index + 1) / shots
        part = _step(budget, goal, chain)
        if part is None:
            continue
        step = smaller(original, sources[-1], part, settings, timing)
        taken = [*chain, step]
        earlier = chain[:-1]
        again = _step(budget, goal, earlier) if go_back and chain else None
        if again is not None:
            other = smaller(original, sources[-2], again, settings, timing)
            if _worse(original, step, other, settings):
                taken = [*earlier, other]
                sources.pop()
        chain = taken
        if index + 1 < shots:
            fresh = refresh(chain[-1].model)
            sources.append(replace(fresh, outputs=chain[-1].outputs, root=source.curvature))
    return chain


def _worse(original: nn.Module, step: Built, other: Built, settings: Settings) -> bool:
    mine = divergence(original, step.model, settings)
    its = divergence(original, other.model, settings)
    return mine is not None and its is not None and its < mine


def _step(budget: Budget, goal: float, chain: list[Built]) -> Budget | None:
    """What a shot has to leave of the model that it starts from; None if that is small enough.

    A shot may leave less than it was asked to, as ranks and channels are whole numbers.
    """
    left: dict[str, float] = {
        unit: math.prod((shot.plan.left(unit) for shot in chain), start=1.0)
        for unit in budget.limits
    }
    left["latency"] = math.prod((shot.latency or 1.0 for shot in chain), start=1.0)
    part = budget.step(goal, left)
    enough = chain and budget.loss is None and all(v >= 1.0 for v in part.given.values())
    return None if enough else part
