"""Plans by calibrated prices: planned, measured alone, planned again; the whole decides."""

from __future__ import annotations

from dataclasses import replace

from eigendamage.compress._steps import CALIBRATED_ON, Settings, Source, divergence
from eigendamage.distributed import from_first
from eigendamage.errors import BudgetError
from eigendamage.measure import calibrate
from eigendamage.plan import (
    ActionKind,
    Budget,
    Calibration,
    Plan,
    calibrated_plan,
    calibrated_price,
)
from eigendamage.surgery import apply_own_plan

_PLANNED = 3  # plans, until none holds a surprise
_SURPRISE = 2.0  # times its calibrated price
_SHARE = 0.1  # of the plan's price: what is less does not matter


def planned(source: Source, budget: Budget, settings: Settings) -> tuple[Source, Plan]:
    """The plan for a budget, by prices that are calibrated at what it chooses.

    Each layer is measured alone as the cheapest plan without channels would change it, each group
    of channels as one with channels alone would; then what the plan by those prices chooses is
    measured too, and it is made again, until no layer in it costs far more than it was chosen for.
    """
    with settings.clock.stage("plan"):
        if not settings.calibrated or settings.parts is None:
            return source, settings.planning.plan(source, budget)
        plain = replace(source, calibration=Calibration())
        probes = [
            probe
            for actions in _probing(settings.planning.actions)
            if (probe := _probe(plain, budget, actions, settings)) is not None
        ]
    found = _calibrated(source, probes, settings)
    with settings.clock.stage("plan"):
        plan = settings.planning.plan(found, budget, refine=0)
    for _ in range(_PLANNED):
        found = _calibrated(found, [plan], settings)
        with settings.clock.stage("plan"):
            plan = settings.planning.plan(found, budget)
        after = _calibrated(found, [plan], settings)
        surprising = _surprising(plan, after.calibration)
        found = after
        if not surprising:
            break
    return _rivalled(found, budget, plan, settings)


def _rivalled(
    source: Source, budget: Budget, plan: Plan, settings: Settings
) -> tuple[Source, Plan]:
    """The plan, or the one by bare prices without channels if it diverges less as surgery makes it.

    Calibration measures changes alone and on few inputs; the whole, measured on the held-out part,
    has the last word.
    """
    actions = _probing(settings.planning.actions)[0]
    with settings.clock.stage("plan"):
        try:
            rival = settings.planning.plan(
                replace(source, calibration=Calibration()), budget, actions=actions
            )
        except BudgetError:
            return source, plan
        models = [apply_own_plan(source.model, each, source.curvature) for each in (plan, rival)]
        mine, its = (divergence(source.model, model, settings) for model in models)
    if mine is None or its is None or mine <= its:
        return source, plan
    found = _calibrated(source, [rival], settings)
    return found, calibrated_plan(rival, found.calibration)


def _surprising(plan: Plan, calibration: Calibration) -> bool:
    """Whether a layer of the plan was measured to cost far more than it was chosen for."""
    for name, layer in plan.layers.items():
        if layer.price and layer.calibrated is not None:
            now = calibrated_price(calibration, name, layer)
            if now > _SURPRISE * layer.calibrated and now > _SHARE * (plan.calibrated or 0.0):
                return True
    return False


def _probing(actions: tuple[ActionKind, ...]) -> list[tuple[ActionKind, ...]]:
    alone: tuple[ActionKind, ...] = tuple(a for a in actions if a != "channels")
    channels: tuple[ActionKind, ...] = tuple(a for a in actions if a == "channels")
    return [kinds for kinds in (alone, channels) if kinds]


def _probe(
    source: Source, budget: Budget, actions: tuple[ActionKind, ...], settings: Settings
) -> Plan | None:
    """A plan of these actions, for the nearest milder budget that they can meet; None if none."""
    for _ in range(5):
        try:
            plan = settings.planning.plan(source, budget, refine=0, actions=actions)
        except BudgetError:
            budget = Budget(**{k: (1 + v) / 2 for k, v in budget.given.items()})
        else:
            return plan if plan.changed else None
    return None


def _calibrated(source: Source, plans: list[Plan], settings: Settings) -> Source:
    assert settings.parts is not None
    with settings.clock.stage("calibration"):
        calibration = calibrate(
            source.model,
            source.curvature,
            plans,
            settings.parts.held_out,
            known=source.calibration,
            loss=settings.loss,
            max_examples=CALIBRATED_ON,
            progress=settings.progress,
        )
    return replace(source, calibration=from_first(calibration))
