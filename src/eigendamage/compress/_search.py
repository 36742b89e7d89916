"""The best model within a budget of any kind; budgets of loss; several shots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from eigendamage.compress._latency_search import within_latency
from eigendamage.compress._planned import planned
from eigendamage.compress._steps import Built, Settings, Source, built, divergence
from eigendamage.compress._timed import Timing
from eigendamage.errors import BudgetError
from eigendamage.plan import Budget

_LOSS_TRIALS = 7
_LOSS_CLOSE = 0.01  # of the original's MACs between a model that is good enough and one that is not

Refresh = Callable[[nn.Module], Source]
"""Curvature and menus of a model."""


def smaller(
    original: nn.Module, source: Source, budget: Budget, settings: Settings, timing: Timing
) -> Built:
    """The best model within a budget of any kind but a ratio."""
    if budget.loss is not None:
        found = _within_loss(original, source, budget.loss, settings)
    elif budget.latency is not None:
        found = within_latency(original, source, budget, budget.latency, settings, timing)
    else:
        return built(original, *planned(source, budget, settings), settings)
    return replace(found, plan=found.plan.model_copy(update={"budget": budget}))


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
        predicted = plan.expected
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
        if (plan.expected or 0.0) > price:
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
