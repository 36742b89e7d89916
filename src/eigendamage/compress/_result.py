"""What `compress` returns, and what it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from eigendamage.curvature import Curvature, EigenvalueKind, Fisher, Loss
from eigendamage.plan import (
    ACTIONS,
    ActionKind,
    AutoMethod,
    Budget,
    FormChoice,
    Plan,
    RankBy,
    method_named,
)
from eigendamage.report import Report
from eigendamage.surgery import Made, Repairs, set_made
from eigendamage.training import PolishConfig


@dataclass(frozen=True, eq=False, repr=False)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: the smaller model, a plain module.
        plan: what was done to each layer; of several shots or rounds the last, made of the one
            before.
        curvature: what it was decided by; another budget needs no new one. Of several rounds that
            of the last.
        report: what was expected and what was measured.
        earlier: the plans of earlier shots or rounds.
        repairs: what the repair did to each layer; None if there was none, or if it is from a round
            that was finished in an earlier run.
    """

    model: nn.Module
    plan: Plan
    curvature: Curvature
    report: Report
    earlier: tuple[Plan, ...] = ()
    repairs: Repairs | None = None

    def __repr__(self) -> str:
        """One line: the tensors would fill pages."""
        (macs, left), (parameters, kept) = self.report.macs, self.report.parameters
        return (
            f"Compressed({type(self.model).__name__} by {self.report.method}: MACs {macs:,.0f} → "
            f"{left:,.0f}, parameters {parameters:,} → {kept:,})"
        )


def noted(result: Compressed) -> Compressed:
    """The same, with its plan and report noted on its model, for `save`."""
    set_made(result.model, Made(result.plan, result.report))
    return result


@dataclass(frozen=True)
class Options:
    """The arguments of `compress` that say how one round goes."""

    budget: Budget
    method: str = "auto"
    variant: str | None = None
    loss: Loss = "cross_entropy"
    fisher: Fisher = "mc"
    eigenvalues: EigenvalueKind = "ekfac"
    max_ratio: float = 0.95
    form: FormChoice = "cheapest"
    damping: float = 1e-3
    rank_by: RankBy | None = None
    ignore: tuple[str, ...] = ()
    actions: Iterable[ActionKind] = ACTIONS
    multiple: int | None = None
    floors: Mapping[str, float] | None = None
    refine: int = 30
    calibrate: bool | None = None
    repair: bool | None = None
    polish: PolishConfig | None = None
    shots: int = 1
    back: bool = False  # whether a shot that makes it worse is taken back
    latency_batch: int = 1
    max_examples: int | None = None
    max_memory: int | str | None = None
    recalibrate: bool | None = None
    calibration_examples: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    seed: int = 0
    progress: bool = True

    @property
    def auto(self) -> bool:
        """Whether plans are made from menus."""
        return isinstance(method_named(self.method), AutoMethod)
