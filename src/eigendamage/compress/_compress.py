"""compress: curvature, plan, surgery, repair, report, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from eigendamage.batches import Data
from eigendamage.compress._prepare import Preparation, prepared, require_loss
from eigendamage.compress._report import report_of
from eigendamage.compress._search import in_shots
from eigendamage.compress._steps import Built, Source, built
from eigendamage.curvature import Curvature, EigenvalueKind, Fisher, Loss
from eigendamage.distributed import one_fate
from eigendamage.errors import EigenDamageError
from eigendamage.layers import copy_model
from eigendamage.plan import (
    ACTIONS,
    ActionKind,
    AutoMethod,
    Budget,
    FormChoice,
    Plan,
    RankBy,
    check_options,
    make_plan,
    method_named,
)
from eigendamage.report import (
    Report,
)
from eigendamage.surgery import Repairs, recalibrate_batchnorm


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: the smaller model, a plain module.
        plan: what was done to each layer; of several shots the last, made of the shot before.
        curvature: what it was decided by; another budget needs no new one.
        report: what was expected and what was measured.
        earlier: the plans of earlier shots.
        repairs: what the repair did to each layer; None if there was none.
    """

    model: nn.Module
    plan: Plan
    curvature: Curvature
    report: Report
    earlier: tuple[Plan, ...] = ()
    repairs: Repairs | None = None


@one_fate
def compress(
    model: nn.Module,
    data: Data,
    *,
    budget: Budget,
    method: str = "auto",
    variant: str | None = None,
    eval_data: Data | None = None,
    curvature: Curvature | None = None,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    eigenvalues: EigenvalueKind = "ekfac",
    max_ratio: float = 0.95,
    form: FormChoice = "cheapest",
    damping: float = 1e-3,
    rank_by: RankBy | None = None,
    ignore: Iterable[str] = (),
    actions: Iterable[ActionKind] = ACTIONS,
    multiple: int | None = None,
    floors: Mapping[str, float] | None = None,
    refine: int = 30,
    calibrate: bool | None = None,
    repair: bool | None = None,
    shots: int = 1,
    rounds: int = 1,
    latency_batch: int = 1,
    max_examples: int | None = None,
    recalibrate: bool | None = None,
    calibration_examples: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make a trained model smaller by its curvature. The model given is not changed.

    With ``method="auto"`` a tenth of ``data`` is held out from curvature and repair; on it prices
    are calibrated, repairs judged, and the divergence from the original measured.

    Args:
        model: the trained network.
        data: some of its inputs in batches, in the same order in every pass; labels are not needed
            unless ``fisher="empirical"``.
        budget: how small the result has to be.
        method: see `make_plan`; likewise ``variant``, ``max_ratio``, ``form``, ``damping``,
            ``rank_by``, ``actions``, ``floors`` and ``refine``.
        variant: the form of the method.
        eval_data: held-out batches to measure on; ``data`` itself if there is none, which the
            report then says. Nothing is chosen by it.
        curvature: of this model, if it was estimated before; saves the passes over the data.
        loss: see `estimate_curvature`; likewise ``fisher``, ``eigenvalues``,
            ``max_examples``, ``reduction`` and ``seed``.
        fisher: which labels.
        eigenvalues: λ, or the paper's Λ_S Λ_A.
        max_ratio: the most of one side of a layer, or of a group of channels, that may go.
        form: how factored layers are laid out.
        damping: of S and A where they are inverted.
        rank_by: by price, or by price for what is saved.
        ignore: shell patterns over dotted paths of layers to leave alone.
        actions: for ``auto``: what may be done to a layer.
        multiple: for ``auto``: ranks and channels left are multiples of this; 8 for a budget of
            latency and 1 otherwise by default.
        floors: for ``auto``: by shell pattern the fraction of a layer's MACs that has to stay.
        refine: for ``auto``: the most L-BFGS steps on an input basis.
        calibrate: for ``auto``: whether prices are corrected by what layers are measured to cost
            alone. By default where the loss has a divergence.
        repair: whether changed layers are refitted, without labels, to return what the original's
            return. By default for ``auto`` alone.
        shots: split the budget into so many steps, each with curvature and repair of its own.
        rounds: the same, but a step that makes the divergence on held-out inputs worse than doing
            without the one before it is taken back.
        latency_batch: examples a call where latency is measured.
        max_examples: the most examples of ``data`` to use.
        recalibrate: measure batch norm's statistics again on ``data``, without labels. By default
            where nothing is repaired; after a repair it makes most models worse.
        calibration_examples: how many examples the table of Fisher traces is made of; 0 for none,
            which is the default for ``auto``, 64 otherwise.
        reduction: what a loss function that returns one number has done over the batch.
        seed: of the label draws, of positions, and of the method ``random``.
        progress: whether to show progress.

    Returns:
        The smaller model with its plan, curvature and report. A budget that asks for no change
        returns a copy of the model, and the report's notes say so.

    Raises:
        BudgetError: if the budget cannot be met; the message says what can.
        EigenDamageError: another of its subclasses, as `estimate_curvature` and `make_plan` say.
    """
    check_options(
        budget,
        method=method,
        variant=variant,
        max_ratio=max_ratio,
        form=form,
        damping=damping,
        rank_by=rank_by,
    )
    auto = isinstance(method_named(method), AutoMethod)
    _check_steps(shots, rounds, auto, budget)
    eval_data = list(eval_data) if isinstance(eval_data, Iterator) else eval_data
    ready = prepared(
        model,
        data,
        [budget],
        method=method,
        loss=loss,
        fisher=fisher,
        eigenvalues=eigenvalues,
        max_ratio=max_ratio,
        damping=damping,
        actions=actions,
        multiple=multiple,
        floors=floors,
        refine=refine,
        calibrate=calibrate,
        repair=repair,
        latency_batch=latency_batch,
        max_examples=max_examples,
        reduction=reduction,
        seed=seed,
        progress=progress,
    )
    settings = ready.settings
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if curvature is None:
        curvature, ignored = ready.curvature(model, ignored), ()
    require_loss(curvature, loss)
    if auto:
        chain = in_shots(
            model,
            ready.source(model, curvature, ignored),
            budget,
            settings,
            ready.timing,
            partial(ready.source_like, curvature),
            shots=max(shots, rounds),
            go_back=rounds > 1,
        )
    else:
        with settings.clock.stage("plan"):
            plan = make_plan(
                model,
                curvature,
                budget,
                method=method,
                variant=variant,
                max_ratio=max_ratio,
                form=form,
                eigenvalues=eigenvalues if curvature.kind == "ekfac" else None,
                damping=damping,
                rank_by=rank_by,
                ignore=ignored,
                seed=seed,
            )
        chain = [built(model, Source(model, curvature, None), plan, settings)]
    last = chain[-1]
    recalibrate = not settings.repair if recalibrate is None else recalibrate
    anew = with_statistics_anew(last, ready) if recalibrate else None
    return Compressed(
        model=last.model if anew is None else anew,
        plan=last.plan,
        curvature=curvature,
        report=report_of(
            model,
            chain,
            anew,
            eval_data,
            curvature,
            ready,
            traces=(0 if auto else 64) if calibration_examples is None else calibration_examples,
            budget=budget,
        ),
        earlier=tuple(shot.plan for shot in chain[:-1]),
        repairs=last.repairs,
    )


def with_statistics_anew(built: Built, ready: Preparation) -> nn.Module | None:
    """What was built with its batch norms' statistics measured again; None if nothing changes."""
    if not built.plan.changed:
        return None
    with ready.settings.clock.stage("batch norm"):
        again = copy_model(built.model)
        norms = recalibrate_batchnorm(
            again, ready.data, max_examples=ready.max_examples, progress=ready.settings.progress
        )
    return again if norms else None


def _check_steps(shots: int, rounds: int, auto: bool, budget: Budget) -> None:
    for what, value in (("shots", shots), ("rounds", rounds)):
        if value < 1:
            raise EigenDamageError(f"{what} is {value}; it must be at least 1")
    if shots > 1 and rounds > 1:
        raise EigenDamageError("give shots or rounds, not both")
    if budget.loss is not None and max(shots, rounds) > 1:
        raise EigenDamageError(
            "a budget of loss is searched for in one shot; give shots or rounds with a size"
        )
    if not auto and max(shots, rounds) > 1:
        raise EigenDamageError(
            "shots and rounds are for method='auto'; for other methods see compress_in_rounds"
        )
