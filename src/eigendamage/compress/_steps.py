"""The steps of `compress` that need data: calibrated plans, building, repairing, comparing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from torch import nn

from eigendamage.compress._split import Parts
from eigendamage.curvature import Curvature, Loss
from eigendamage.distributed import from_first, with_first_state
from eigendamage.layers import ON_REQUEST, copy_model
from eigendamage.measure import evaluate
from eigendamage.plan import (
    ActionKind,
    Budget,
    Calibration,
    Channels,
    Keep,
    LatencyTable,
    Menus,
    Plan,
    make_plan,
)
from eigendamage.surgery import Repairs, apply_own_plan, repair_model

CALIBRATED_ON = 256
"""The most held-out examples that a calibration measures on."""


class Clock:
    """Adds up wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the time inside as this stage's."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


@dataclass(frozen=True, eq=False)
class Settings:
    """What the steps share.

    Attributes:
        parts: data to fit on and data to judge by; None where nothing is repaired or calibrated.
        loss: of the curvature.
        reduction: what a loss function that returns one number has done over the batch.
        repair: whether built models are repaired.
        calibrated: whether prices are corrected by measurements.
        planning: `make_plan` with all options that do not change, given model, curvature and
            budget and what varies.
        clock: of the stages.
        seed: of the draws of positions.
        progress: whether to show progress.
    """

    parts: Parts | None
    loss: Loss
    reduction: Literal["mean", "sum"]
    repair: bool
    calibrated: bool
    planning: Planning
    clock: Clock
    seed: int
    progress: bool


@dataclass(frozen=True)
class Planning:
    """Options of `make_plan` for method ``auto`` that stay the same."""

    damping: float
    refine: int
    floors: Mapping[str, float] | None
    actions: tuple[ActionKind, ...]

    def plan(
        self,
        source: Source,
        budget: Budget,
        *,
        refine: int | None = None,
        actions: tuple[ActionKind, ...] | None = None,
    ) -> Plan:
        """A plan for a budget."""
        return make_plan(
            source.model,
            source.curvature,
            budget,
            damping=self.damping,
            floors=self.floors,
            refine=self.refine if refine is None else refine,
            actions=self.actions if actions is None else actions,
            menus=source.menus,
            calibration=source.calibration,
            latency=source.latency,
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A model to be made smaller, with what is known of it.

    Attributes:
        model: the original, or what an earlier shot made of it.
        curvature: of it.
        menus: of it; None for other methods than ``auto``.
        finer: makes menus of channels alone, in any number, for a budget of latency; None where
            ``menus`` leave any number open, or few groups would have more to choose from.
        calibration: of the menus' prices.
        latency: of its layers, where the budget asks for it.
        outputs: for layers that lost outputs before, which of the original's are left.
        root: the curvature of the original, if that is another model.
    """

    model: nn.Module
    curvature: Curvature
    menus: Menus | None
    finer: Callable[[], Menus] | None = None
    calibration: Calibration = field(default_factory=Calibration)
    latency: LatencyTable | None = None
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    root: Curvature | None = None


@dataclass(frozen=True, eq=False)
class Built:
    """A smaller model.

    Attributes:
        source: what it was made of; its calibration knows the plan's changes.
        plan: how.
        cut: as surgery left it.
        model: the same after the repair; ``cut`` if there was none.
        repairs: of the layers; None if there was no repair.
        outputs: for layers that lost outputs, which of the original's are left.
        latency: the fraction of the source's that ``cut`` took, where it was measured.
        notes: what a user should know.
    """

    source: Source
    plan: Plan
    cut: nn.Module
    model: nn.Module
    repairs: Repairs | None
    outputs: Mapping[str, tuple[int, ...]]
    latency: float | None = None
    notes: tuple[str, ...] = ()


def built(original: nn.Module, source: Source, plan: Plan, settings: Settings) -> Built:
    """What a plan makes of a model, repaired towards the original."""
    with settings.clock.stage("surgery"):
        cut = apply_own_plan(source.model, plan, source.curvature)
        with_first_state(cut)
    outputs = left_outputs(source.outputs, plan)
    if not settings.repair or settings.parts is None or not plan.changed:
        return Built(source, plan, cut, cut, None, outputs)
    with settings.clock.stage("repair"):
        model = copy_model(cut)
        repairs = repair_model(
            model,
            original,
            settings.parts.fit,
            held_out=settings.parts.held_out,
            curvature=source.root or source.curvature,
            layers=repairable(plan),
            outputs=outputs,
            seed=settings.seed,
            progress=settings.progress,
        )
        with_first_state(model)
        before, after = (divergence(original, each, settings) for each in (cut, model))
    if before is not None and after is not None and after > before:
        note = (
            f"the repair was left out: on held-out inputs it raised the divergence from "
            f"{before:.3g} by {after - before:.2g}"
        )
        return Built(source, plan, cut, cut, None, outputs, notes=(note,))
    return Built(source, plan, cut, model, repairs, outputs)


def left_outputs(before: Mapping[str, tuple[int, ...]], plan: Plan) -> dict[str, tuple[int, ...]]:
    """For layers that lost outputs, which of the original's are left after a plan."""
    after = dict(before)
    for name, layer in plan.layers.items():
        action = layer.action
        if isinstance(action, Channels) and len(action.outputs) < layer.shape[0]:
            old = before.get(name, tuple(range(layer.shape[0])))
            after[name] = tuple(old[at] for at in action.outputs)
    return after


def repairable(plan: Plan) -> list[str]:
    """All layers but those that are left alone on request.

    A layer that is kept reads what changed layers before it return, and makes up for some of it.
    """
    return [
        name
        for name, layer in plan.layers.items()
        if not isinstance(layer.action, Keep) or not layer.action.reason.startswith(ON_REQUEST)
    ]


def divergence(original: nn.Module, model: nn.Module, settings: Settings) -> float | None:
    """KL(original ‖ model), or what takes its place, on the held-out part."""
    if settings.parts is None:
        return None
    found = evaluate(
        model,
        settings.parts.held_out,
        loss=settings.loss,
        reference=original,
        reduction=settings.reduction,
        progress=settings.progress,
    )
    return from_first(found.divergence)
