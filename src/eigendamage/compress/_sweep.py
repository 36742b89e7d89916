"""sweep: one curvature, many budgets; predicted everywhere and measured where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import nn

from eigendamage.batches import Data, kept
from eigendamage.calls import device_of
from eigendamage.columns import fitted
from eigendamage.compress._once import check, with_statistics_anew
from eigendamage.compress._planned import planned
from eigendamage.compress._prepare import Preparation, prepared, require_loss
from eigendamage.compress._result import Options
from eigendamage.compress._search import smaller
from eigendamage.compress._steps import Source
from eigendamage.curvature import Curvature, Fisher, Loss
from eigendamage.distributed import one_fate
from eigendamage.errors import BudgetError, EigenDamageError
from eigendamage.layers import preserved_random_state
from eigendamage.measure import Evaluation, evaluate
from eigendamage.plan import ACTIONS, ActionKind, Budget
from eigendamage.report import Environment, Measured, Sweep, SweepRow

BUDGETS: tuple[Budget, ...] = tuple(Budget(macs=tenths / 10) for tenths in range(9, 1, -1))
"""What `sweep` goes through by default: 0.9 to 0.2 of the MACs."""


@one_fate
@torch.inference_mode(False)
@preserved_random_state()
def sweep(
    model: nn.Module,
    data: Data,
    *,
    budgets: Sequence[Budget] | Budget = BUDGETS,
    measure: Sequence[Budget] | Literal["none", "all"] = "none",
    eval_data: Data | None = None,
    curvature: Curvature | None = None,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    max_ratio: float = 0.95,
    damping: float = 1e-3,
    ignore: Iterable[str] = (),
    actions: Iterable[ActionKind] = ACTIONS,
    multiple: int | None = None,
    floors: Mapping[str, float] | None = None,
    refine: int = 12,
    calibrate: bool | None = None,
    repair: bool = True,
    latency_batch: int = 1,
    max_examples: int | None = None,
    max_memory: int | str | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
    on_row: Callable[[SweepRow], None] | None = None,
) -> Sweep:
    """What a model would lose at each of many budgets, by ``method="auto"``. It is not changed.

    All budgets share one curvature and one set of menus. They are planned in the order given, and
    what a calibration measures for one is known to those after it: their plans may differ a little
    from what `compress` makes of the same budget alone.

    Args:
        model: the trained network.
        data: some of its inputs, as for `compress`.
        budgets: of any kind but a ratio. One of loss or latency is found by building and
            measuring, whether or not it is among those to measure.
        measure: for which of them to build the model, repair it and measure it.
        eval_data: held-out batches to measure on; by default the part of ``data`` that is held out
            from curvature and repair. Nothing is chosen by it.
        curvature: of this model, if it was estimated before.
        loss: see `compress`; likewise all other options.
        fisher: which labels.
        max_ratio: the most of one side of a layer that may go.
        damping: of S and A where they are inverted.
        ignore: shell patterns over dotted paths of layers to leave alone.
        actions: what may be done to a layer.
        multiple: ranks and channels left are multiples of this; by default 1, and if there is a
            budget of latency 8, beside which any number of channels is tried in narrow groups.
        floors: by shell pattern the fraction of a layer's MACs that has to stay.
        refine: the most L-BFGS steps on an input basis; fewer than `compress` takes, as it is done
            for every budget.
        calibrate: whether prices are corrected by what layers are measured to cost alone.
        repair: whether models that are built are repaired. If not, the statistics of their batch
            norms are measured again.
        latency_batch: examples a call where latency is measured.
        max_examples: the most examples of ``data`` to use.
        max_memory: what the sums of the curvature's passes may take.
        reduction: what a loss function that returns one number has done over the batch.
        seed: of the draws of labels and positions.
        progress: whether to show progress.
        on_row: called with every row that is done.

    Returns:
        A row for every budget; where it cannot be met, with the reason.

    Raises:
        BudgetError: if there is no budget, one is a ratio, or one is to be measured that is not
            among them.
        EigenDamageError: another of its subclasses, as `compress` says.
    """
    budgets = (budgets,) if isinstance(budgets, Budget) else tuple(budgets)
    for budget in budgets:
        if not isinstance(budget, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BudgetError(f"a budget is {budget!r}; give eigendamage.Budget(macs=0.5), say")
    to_measure = _to_measure(budgets, measure)
    options = Options(
        budget=budgets[0],
        loss=loss,
        fisher=fisher,
        max_ratio=max_ratio,
        damping=damping,
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        actions=tuple(actions),
        multiple=multiple,
        floors=floors,
        refine=refine,
        calibrate=calibrate,
        repair=repair,
        latency_batch=latency_batch,
        max_examples=max_examples,
        max_memory=max_memory,
        reduction=reduction,
        seed=seed,
        progress=progress,
    )
    check(options)
    data, eval_data = fitted(data, model), fitted(eval_data, model)
    eval_data = kept(eval_data)
    ready = prepared(model, data, options, budgets)
    ignored = options.ignore
    if curvature is None:
        curvature, ignored = ready.curvature(model, ignored), ()
    require_loss(curvature, loss)
    source = ready.source(model, curvature, ignored)
    judge = _Judge(ready, eval_data)
    original = judge.of(model, None)
    shared = dict(ready.settings.clock.seconds)
    rows: list[SweepRow] = []
    for budget in budgets:
        source, row = _row(model, source, budget, judge, built=budget in to_measure)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return Sweep(
        model=type(model).__name__,
        examples=curvature.examples,
        measured_on=judge.where,
        measured_examples=original.examples,
        original=Measured.of(original),
        rows=tuple(rows),
        left_alone={**curvature.left_alone, **(source.menus.left_alone if source.menus else {})},
        seconds=shared,
        environment=Environment.here(device_of(model), seed),
        notes=(*(source.menus.notes if source.menus else ()), *ready.notes),
    )


def _to_measure(
    budgets: Sequence[Budget], measure: Sequence[Budget] | Literal["none", "all"]
) -> Sequence[Budget]:
    """Which budgets are to be built and measured.

    Raises:
        BudgetError: if there is no budget, one is a ratio, or ``measure`` names another.
    """
    if not budgets:
        raise BudgetError("a sweep needs at least one budget")
    for budget in budgets:
        if budget.ratio is not None:
            raise BudgetError(
                f"a sweep is by method='auto', which takes no budget of {budget}; give macs, "
                f"params, bytes, latency or loss"
            )
    if isinstance(measure, str):
        if measure not in ("none", "all"):
            raise EigenDamageError(
                f"measure '{measure}' is unknown; give 'none', 'all', or some of the budgets"
            )
        return budgets if measure == "all" else ()
    for budget in measure:
        if budget not in budgets:
            known = "; ".join(str(b) for b in budgets)
            raise BudgetError(
                f"measure: a budget of {budget} is not in the sweep; its budgets are {known}"
            )
    return measure


@dataclass(frozen=True, eq=False)
class _Judge:
    """Measures models on the best data at hand."""

    ready: Preparation
    eval_data: Data | None

    @property
    def where(self) -> Literal["eval_data", "held_out", "data"]:
        if self.eval_data is not None:
            return "eval_data"
        return "data" if self.ready.settings.parts is None else "held_out"

    def of(self, model: nn.Module, original: nn.Module | None) -> Evaluation:
        """A model, and its divergence from the original where that is given."""
        settings, parts = self.ready.settings, self.ready.settings.parts
        data = self.ready.data if parts is None else parts.held_out
        with settings.clock.stage("measurement"):
            return evaluate(
                model,
                data if self.eval_data is None else self.eval_data,
                loss=settings.loss,
                reference=original,
                max_examples=self.ready.options.max_examples if self.where == "data" else None,
                reduction=settings.reduction,
                progress=settings.progress,
            )


def _row(
    model: nn.Module, source: Source, budget: Budget, judge: _Judge, *, built: bool
) -> tuple[Source, SweepRow]:
    """The row of a budget, and what is known of the model after it."""
    start = perf_counter()
    latency: float | None = None
    notes: tuple[str, ...] = ()
    measured: Evaluation | None = None
    try:
        if built or budget.loss is not None or budget.latency is not None:
            found = smaller(model, source, budget, judge.ready.settings, judge.ready.timing)
            source, plan = found.source, found.plan
            latency, notes = found.latency, found.notes
            if built:
                anew = None
                if not judge.ready.settings.repair:
                    anew = with_statistics_anew(found, judge.ready)
                measured = judge.of(anew or found.model, model)
        else:
            source, plan = planned(source, budget, judge.ready.settings)
    except BudgetError as error:
        return source, SweepRow(
            budget=str(budget), seconds=perf_counter() - start, error=str(error)
        )
    return source, SweepRow(
        budget=str(budget),
        macs=plan.left("macs"),
        parameters=plan.left("params"),
        latency=latency,
        priced=plan.price,
        calibrated=plan.calibrated,
        gap=plan.gap,
        measured=None if measured is None else Measured.of(measured),
        seconds=perf_counter() - start,
        notes=notes,
    )
