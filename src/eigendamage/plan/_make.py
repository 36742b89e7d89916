"""make_plan: from curvature and weights to what is done to each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import nn

from eigendamage.curvature import Curvature, EigenvalueKind
from eigendamage.errors import (
    BudgetError,
    EigenDamageError,
    MismatchError,
    NonFiniteError,
    NothingToCompressError,
)
from eigendamage.layers import Cost, Layer, find_layers
from eigendamage.plan._budget import Budget
from eigendamage.plan._plan import Keep, LayerPlan, Plan
from eigendamage.plan._threshold import Candidate, FormChoice, GlobalThreshold
from eigendamage.plan.prices.eigendamage import layer_prices

METHODS = ("eigendamage",)


def make_plan(
    model: nn.Module,
    curvature: Curvature,
    budget: Budget,
    *,
    method: str = "eigendamage",
    max_ratio: float = 0.95,
    form: FormChoice = "cheapest",
    eigenvalues: EigenvalueKind | None = None,
    ignore: Iterable[str] = (),
) -> Plan:
    """Decide what happens to each layer. Neither the model nor any data is run.

    Args:
        model: the network that the curvature is of; only its weights are read.
        curvature: from `estimate_curvature`.
        budget: how small the result has to be.
        method: ``eigendamage``: rows and columns of the weights in the Kronecker-factored
            eigenbasis against one global threshold (Wang et al. 2019). The classifier is kept.
        max_ratio: where more than this fraction of one side of a layer would go, its
            ⌊max_ratio · n⌋ + 1 cheapest units go and no more (the prune_ratio_limit of the paper's
            code).
        form: ``cheapest`` multiplies neighbouring stages together where that costs less,
            ``three`` keeps the paper's three stages.
        eigenvalues: price by λ (``ekfac``) or by Λ_S Λ_A (``kfac``, the paper's); what the
            curvature was estimated with by default.
        ignore: shell patterns over dotted paths of layers to leave alone.

    Raises:
        BudgetError: if the budget cannot be met; the message says what can.
        NothingToCompressError: if no layer would change although the budget asks for it.
        MismatchError: if the curvature is of another model.
    """
    check_options(budget, method=method, max_ratio=max_ratio, form=form)
    kind = eigenvalues or curvature.kind
    if kind == "ekfac" and curvature.kind == "kfac":
        raise EigenDamageError(
            "eigenvalues='ekfac' needs λ, but the curvature was estimated with eigenvalues='kfac'"
        )
    layers = _matching(model, curvature)
    total = Cost(curvature.macs, sum(p.numel() for p in model.parameters()))
    kept = _kept_whole(curvature, ignore)
    candidates = {
        name: Candidate(
            layer_prices(
                layer.weight(),
                curvature[name]
                if kind == curvature.kind
                else replace(curvature[name], eigenvalues=curvature[name].kfac_eigenvalues()),
            ),
            curvature[name].shape,
            layer.cost(curvature[name].shape),
        )
        for name, layer in layers.items()
        if name not in kept
    }
    if not candidates:
        raise NothingToCompressError(
            "every compressible layer is kept: "
            + "; ".join(f"'{n}': {r}" for n, r in list(kept.items())[:6])
        )
    for name, candidate in candidates.items():
        if not bool(torch.isfinite(candidate.prices.loss).all()):
            raise NonFiniteError(
                f"layer '{name}': its prices are not finite; the weight or the curvature holds NaN "
                f"or overflows"
            )
    selection = GlobalThreshold(candidates, total, max_ratio, form).meet(budget)

    planned: dict[str, LayerPlan] = {}
    saved = Cost(0.0, 0)
    for name, layer in layers.items():
        before = layer.cost(curvature[name].shape)
        chosen = selection.choices.get(name)
        after = before if chosen is None else chosen.cost
        saved = saved + (before - after)
        planned[name] = LayerPlan(
            action=Keep(reason=kept[name]) if chosen is None else chosen.action,
            price=0.0 if chosen is None else chosen.price,
            shape=(layer.outputs, layer.inputs, layer.offsets),
            macs=(before.macs, after.macs),
            parameters=(before.parameters, after.parameters),
        )
    left = total - saved
    changed = any(layer.changes for layer in planned.values())
    notes = () if changed else (f"the budget ({budget}) asks for no change: the model stays as is",)
    return Plan(
        method=method,
        budget=budget,
        ratio=selection.ratio,
        layers=planned,
        left_alone=dict(curvature.left_alone),
        macs=(total.macs, left.macs),
        parameters=(total.parameters, left.parameters),
        notes=notes,
    )


def check_options(budget: Budget, *, method: str, max_ratio: float, form: FormChoice) -> None:
    """Refuse options that cannot be meant, before anything is computed.

    Raises:
        BudgetError: if the budget is no `Budget`.
        EigenDamageError: if the method or form is unknown, or the cap out of range.
    """
    if not isinstance(budget, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BudgetError(f"the budget is {budget!r}; give eigendamage.Budget(macs=0.5), say")
    if method not in METHODS:
        raise EigenDamageError(f"method '{method}' is unknown; known are {', '.join(METHODS)}")
    if not isinstance(max_ratio, int | float) or not 0 < max_ratio < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(f"max_ratio is {max_ratio!r}; it must be above 0 and below 1")
    if form not in get_args(FormChoice):
        known = ", ".join(get_args(FormChoice))
        raise EigenDamageError(f"form '{form}' is unknown; known are {known}")


def _matching(model: nn.Module, curvature: Curvature) -> dict[str, Layer]:
    """The model's layers that the curvature is of.

    Raises:
        MismatchError: if one is missing or has another shape.
    """
    found = find_layers(model)
    layers: dict[str, Layer] = {}
    for name, known in curvature.items():
        layer = found.compressible.get(name)
        if layer is None:
            why = found.left_alone.get(name, "there is no such layer")
            raise MismatchError(f"layer '{name}' of the curvature does not fit the model: {why}")
        expected, shape = known.eigenvalues.shape, (layer.outputs, layer.inputs, layer.offsets)
        if tuple(expected) != shape:
            raise MismatchError(
                f"layer '{name}' has a weight of shape {shape} (o, i, K), the curvature is for "
                f"{tuple(expected)}"
            )
        layers[name] = layer
    return layers


def _kept_whole(curvature: Curvature, ignore: Iterable[str]) -> dict[str, str]:
    kept = dict.fromkeys(curvature.classifier, "it is the classifier")
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        hits = [n for n in curvature if fnmatchcase(n, pattern)]
        if not hits and not any(fnmatchcase(n, pattern) for n in curvature.left_alone):
            raise EigenDamageError(
                f"ignore pattern '{pattern}' matches no layer of the curvature; layers are: "
                f"{', '.join(list(curvature)[:8])}, …"
            )
        kept.update(dict.fromkeys(hits, f"left alone on request (pattern '{pattern}')"))
    return kept
