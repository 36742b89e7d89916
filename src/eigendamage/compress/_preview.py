"""preview: the plan that compress would follow, and nothing done about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from eigendamage.batches import Data
from eigendamage.columns import fitted
from eigendamage.compress._compress import check_steps, polish_config
from eigendamage.compress._once import check, plan_of
from eigendamage.compress._planned import planned
from eigendamage.compress._prepare import prepared, require_loss
from eigendamage.compress._result import Options
from eigendamage.compress._search import smaller
from eigendamage.curvature import Curvature, EigenvalueKind, Fisher, Loss
from eigendamage.distributed import one_fate
from eigendamage.layers import preserved_random_state
from eigendamage.plan import ACTIONS, ActionKind, Budget, FormChoice, Plan, RankBy
from eigendamage.training import PolishConfig


@one_fate
@torch.inference_mode(False)
@preserved_random_state()
def preview(
    model: nn.Module,
    data: Data,
    *,
    budget: Budget,
    method: str = "auto",
    variant: str | None = None,
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
    polish: int | PolishConfig = 0,
    shots: int = 1,
    rounds: int = 1,
    latency_batch: int = 1,
    max_examples: int | None = None,
    max_memory: int | str | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """The plan that `compress` makes of the same arguments. Nothing is changed, nothing is written.

    It costs the curvature and the planning, with the calibration that the prices take; models are
    built, and thrown away, for budgets of loss and of latency alone.

    Args:
        model: as for `compress`; likewise all that follows.
        data: some of its inputs.
        budget: of the whole.
        method: see `make_plan`.
        variant: the form of the method.
        curvature: of this model, if it was estimated before.
        loss: of the curvature.
        fisher: which labels.
        eigenvalues: λ, or the paper's Λ_S Λ_A.
        max_ratio: the most of one side of a layer, or of a group of channels, that may go.
        form: how factored layers are laid out.
        damping: of S and A where they are inverted.
        rank_by: by price, or by price for what is saved.
        ignore: shell patterns over dotted paths of layers to leave alone.
        actions: what may be done to a layer.
        multiple: ranks and channels left are multiples of this.
        floors: by shell pattern the fraction of a layer's MACs that has to stay.
        refine: the most L-BFGS steps on an input basis.
        calibrate: whether prices are corrected by what layers are measured to cost alone.
        repair: whether `compress` would repair: data is held out for it.
        polish: whether it would polish: likewise.
        shots: of several the plan is that of the first, which later ones start from.
        rounds: likewise.
        latency_batch: examples a call where latency is measured.
        max_examples: the most examples of ``data`` to use.
        max_memory: what the sums of the curvature's passes may take.
        reduction: what a loss function that returns one number has done over the batch.
        seed: of the draws of labels and positions, and of the method ``random``.
        progress: whether to show progress.

    Raises:
        EigenDamageError: as `compress` does.
    """
    options = Options(
        budget=budget,
        method=method,
        variant=variant,
        loss=loss,
        fisher=fisher,
        eigenvalues=eigenvalues,
        max_ratio=max_ratio,
        form=form,
        damping=damping,
        rank_by=rank_by,
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        actions=tuple(actions),
        multiple=multiple,
        floors=floors,
        refine=refine,
        calibrate=calibrate,
        repair=repair,
        polish=polish_config(polish),
        shots=shots,
        back=False,
        latency_batch=latency_batch,
        max_examples=max_examples,
        max_memory=max_memory,
        recalibrate=None,
        calibration_examples=None,
        reduction=reduction,
        seed=seed,
        progress=progress,
    )
    check(options)
    check_steps(shots, rounds, 0, auto=options.auto, budget=budget)
    options = replace(options, budget=budget.step(1 / max(shots, rounds), {}))
    ready = prepared(model, fitted(data, model), options)
    ignored = options.ignore
    if curvature is None:
        curvature, ignored = ready.curvature(model, ignored), ()
    require_loss(curvature, loss)
    if not options.auto:
        return plan_of(model, curvature, ignored, options)
    source = ready.source(model, curvature, ignored)
    if budget.loss is None and budget.latency is None:
        return planned(source, options.budget, ready.settings)[1]
    found = smaller(model, source, options.budget, ready.settings, ready.timing)
    return found.plan.model_copy(update={"notes": (*found.plan.notes, *found.notes)})
