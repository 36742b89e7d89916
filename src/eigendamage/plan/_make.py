"""make_plan: from curvature and weights to what is done to each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from eigendamage.curvature import Curvature, EigenvalueKind
from eigendamage.distributed import from_first, one_fate
from eigendamage.errors import DataError, EigenDamageError, MismatchError
from eigendamage.layers import Sketch
from eigendamage.plan._auto import plan_auto
from eigendamage.plan._blocks import FormChoice, plan_blocks
from eigendamage.plan._budget import Budget, cost_of
from eigendamage.plan._calibrate import Calibration
from eigendamage.plan._channels import RankBy, plan_channels, ranked_per
from eigendamage.plan._checks import check_options, check_refine, refuse_options_of_auto
from eigendamage.plan._latency import LatencyTable
from eigendamage.plan._market import AutoOptions
from eigendamage.plan._matching import (
    ignored_layers,
    matching_layers,
    matching_sketches,
    notes_on_movement,
)
from eigendamage.plan._menus import (
    ACTIONS,
    ActionKind,
    Menus,
    make_menus,
    wanted_actions,
)
from eigendamage.plan._methods import (
    AutoMethod,
    BlockMethod,
    ChannelMethod,
    Method,
    WeightMethod,
    method_named,
)
from eigendamage.plan._plan import Keep, LayerPlan, Plan
from eigendamage.plan._task import Result, Task
from eigendamage.plan._weights import plan_weights
from eigendamage.seeds import check_seed


@one_fate
@torch.inference_mode(False)
def make_plan(
    model: nn.Module,
    curvature: Curvature,
    budget: Budget,
    *,
    method: str = "auto",
    variant: str | None = None,
    max_ratio: float = 0.95,
    form: FormChoice = "cheapest",
    eigenvalues: EigenvalueKind | None = None,
    damping: float = 1e-3,
    rank_by: RankBy | None = None,
    ignore: Iterable[str] = (),
    multiple: int = 1,
    floors: Mapping[str, float] | None = None,
    refine: int = 30,
    actions: Iterable[ActionKind] = ACTIONS,
    menus: Menus | None = None,
    calibration: Calibration | None = None,
    latency: LatencyTable | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Plan:
    """Decide what happens to each layer. Neither the model nor any data is run.

    ``auto`` gives every layer one action of its menu (see `make_menus`) so that the total price is
    least within the budget: a multiple-choice knapsack, solved exactly or with a stated gap. All
    other methods remove their units against one global threshold over all layers, as the paper
    does (Wang, Grosse, Fidler, Zhang 2019, section 4.2).

    Args:
        model: the network that the curvature is of; only its weights are read.
        curvature: from `estimate_curvature`, with ``also=`` what the method `needs`.
        budget: how small the result has to be. ``auto`` takes sizes, one or several, methods that
            mask single weights a ratio, the others either.
        method: what goes.

            - ``auto``: for each layer the best of low-rank forms, blocks of the eigenbasis and
              whole channels. The classifier is kept.
            - ``eigendamage``: rows and columns of the weights in the Kronecker-factored eigenbasis;
              ``eigendamage-dw`` makes the middle stage depthwise. The classifier is kept.
            - ``kron-obs``, ``kron-obd``, ``c-obs``, ``c-obd``: whole channels, by the curvature.
            - ``taylor``, ``slimming``, ``magnitude``, ``random``: whole channels, by baselines.
            - ``obs``, ``obd``: single weights, by masks; the model gets no smaller.
        variant: the form of the method. ``kron-obs``: ``readers`` (the default) prices and
            repairs the layers that read a channel, in backward elimination; ``paper`` the filters
            that make it; ``joint`` prices as the paper and repairs filters and readers by their
            joint optimum; ``official`` is what the paper's code computes. ``kron-obd``: ``paper``
            or ``official``.
        max_ratio: where more than this fraction of one side of a layer (or of a group of channels)
            would go, its ⌊max_ratio · n⌋ + 1 cheapest units go and no more (the
            prune_ratio_limit of the paper's code).
        form: for ``eigendamage``: ``cheapest`` multiplies neighbouring stages together where that
            costs less, ``three`` keeps the paper's three stages.
        eigenvalues: for ``eigendamage``: price by λ (``ekfac``) or by Λ_S Λ_A (``kfac``, the
            paper's); what the curvature was estimated with by default.
        damping: added to S and A by the methods that price or repair with them beside
            EigenDamage, relative to their mean diagonal.
        rank_by: for methods that remove channels: ``price`` compares prices, as the paper does,
            ``price_per_cost`` prices for each MAC or parameter saved. The latter is the default
            where the budget is in one of these and the prices of different layers are in one unit
            (not for ``slimming``, ``magnitude`` and ``random``).
        ignore: shell patterns over dotted paths of layers to leave alone.
        multiple: for ``auto``: ranks and channels left are multiples of this.
        floors: for ``auto``: by shell pattern over dotted paths, the fraction of a layer's MACs
            that has to stay.
        refine: for ``auto``: the most L-BFGS steps on each input basis that is chosen; 0 for none.
        actions: for ``auto``: which of ``low-rank``, ``blocks`` and ``channels`` may be taken.
        menus: for ``auto``: from `make_menus`, to plan several budgets at the price of one; they
            have their own ``damping``, ``max_ratio``, ``multiple`` and ``ignore``.
        calibration: for ``auto``: of the prices.
        latency: for ``auto`` and a budget of latency: measured times of the layers.
        seed: of the draws of ``random``.
        progress: whether to show progress.

    Raises:
        BudgetError: if the budget cannot be met; the message says what can.
        NothingToCompressError: if no layer would change although the budget asks for it.
        MismatchError: if the curvature is of another model.
        DataError: if the curvature of every layer is zero, so that a method other than ``auto``
            has nothing to choose by.
        EigenDamageError: if the curvature lacks what the method needs, or an option is unknown.
    """
    check_seed(seed)
    variant = check_options(
        budget,
        method=method,
        variant=variant,
        max_ratio=max_ratio,
        form=form,
        damping=damping,
        rank_by=rank_by,
        multiple=multiple,
    )
    known = method_named(method)
    allowed = wanted_actions(actions)
    check_refine(refine)
    refuse_options_of_auto(
        method,
        {
            "menus": menus,
            "calibration": calibration,
            "latency": latency,
            "floors": floors,
            "multiple": multiple != 1,
            "actions": allowed != ACTIONS,
        },
    )
    kind = eigenvalues or curvature.kind
    if kind == "ekfac" and curvature.kind == "kfac":
        raise EigenDamageError(
            "eigenvalues='ekfac' needs λ, but the curvature was estimated with eigenvalues='kfac'"
        )
    needed = ("patches",) if isinstance(known, AutoMethod) else known.needs
    missing = [extra for extra in needed if extra not in curvature.extras]
    if missing:
        raise EigenDamageError(
            f"method '{method}' needs {', '.join(missing)}, which the curvature has not; give "
            f"also={known.needs!r} to estimate_curvature"
        )
    _refuse_blind(curvature, method, known)
    layers = matching_layers(model, curvature)
    sketches = matching_sketches(layers, curvature)
    task = Task(
        model=model,
        curvature=curvature,
        layers=layers,
        total=cost_of(model, curvature.macs),
        budget=budget,
        max_ratio=max_ratio,
        damping=damping,
        ignored=ignored_layers(curvature, ignore),
    )
    match known:
        case AutoMethod():
            found = menus or make_menus(
                model,
                curvature,
                actions=allowed,
                damping=damping,
                max_ratio=max_ratio,
                multiple=multiple,
                ignore=ignore,
                progress=progress,
            )
            if found.curvature is not curvature:
                raise MismatchError("the menus were made from another curvature than the one given")
            options = AutoOptions(
                refine, calibration or Calibration(), latency, floors or {}, allowed
            )
            result = plan_auto(task, found, options)
        case BlockMethod():
            result = plan_blocks(task, "depthwise" if known.depthwise else form, kind)
        case ChannelMethod():
            rule = known.variants[variant or next(iter(known.variants))]
            per = ranked_per(rule, budget, rank_by, method)
            result = plan_channels(task, rule, per, torch.Generator().manual_seed(seed))
        case WeightMethod():
            result = plan_weights(task, known)
    return from_first(_plan(task, sketches, method, variant, result))


def _refuse_blind(curvature: Curvature, method: str, known: Method) -> None:
    """Refuse to rank by prices that are all zero; ``auto`` has a guess of its own, and says so."""
    by_loss = isinstance(known, BlockMethod) or {"patches", "gradients"} & {*known.needs}
    if isinstance(known, AutoMethod) or not by_loss:
        return
    if not any(bool(layer.S.any()) for layer in curvature.values()):
        raise DataError(
            f"the curvature of all {len(curvature)} layers is exactly zero: the predictions on the "
            f"data depend on none of them as far as numbers show, so '{method}' would choose at "
            f"random. Is the model trained, and the data what it was trained for? If so, take "
            f"method='auto', which goes by the change of outputs"
        )


def _plan(
    task: Task,
    sketches: Mapping[str, Sketch | None],
    method: str,
    variant: str | None,
    result: Result,
) -> Plan:
    planned: dict[str, LayerPlan] = {}
    for name, layer in task.layers.items():
        before = layer.cost(task.curvature[name].shape)
        after = result.costs.get(name, before)
        planned[name] = LayerPlan(
            action=result.actions.get(name) or Keep(reason=result.kept[name]),
            price=result.prices.get(name, 0.0),
            shape=(layer.outputs, layer.inputs, layer.offsets),
            sketch=sketches[name],
            macs=(before.macs, after.macs),
            parameters=(before.parameters, after.parameters),
            calibrated=result.calibrated.get(name),
        )
    nothing = f"the budget ({task.budget}) asks for no change: the model stays as is"
    return Plan(
        method=method,
        variant=variant,
        budget=task.budget,
        ratio=result.ratio,
        layers=planned,
        carriers=result.carriers,
        counters=result.counters,
        left_alone={**task.curvature.left_alone, **result.left_alone},
        macs=(task.total.macs, result.left.macs),
        parameters=(task.total.parameters, result.left.parameters),
        bytes=(task.total.bytes, result.left.bytes),
        gap=result.gap,
        notes=(
            *(result.notes if result.changes else (nothing,)),
            *notes_on_movement(sketches, task.curvature),
        ),
    )
