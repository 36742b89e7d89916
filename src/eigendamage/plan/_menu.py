"""The menu: every way to shrink each layer, with its price and its cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import LayerCurvature
from eigendamage.errors import EigenDamageError, NonFiniteError
from eigendamage.layers import FORMS, Cost, DenseForm, Layer, LayerShape
from eigendamage.plan._options import (
    Kind,
    Options,
    Row,
    low_rank_row,
    rank_grid,
    row_of,
    smaller_than,
    stacked,
)
from eigendamage.plan._plan import Action, EigenBlock, Keep, LowRank, packed
from eigendamage.plan._threshold import kept_counts
from eigendamage.plan.prices.eigendamage import UnitPrices, layer_prices
from eigendamage.plan.prices.low_rank import (
    Metric,
    NestedBases,
    basis_prices,
    input_directions,
    svd_prices,
)

# Beyond so many, ranks and thresholds are thinned out evenly.
_RANKS_OUT, _RANKS_IN, _BLOCKS = 128, 48, 512


@dataclass(frozen=True, eq=False)
class LayerMenu:
    """Every way to shrink one layer.

    Attributes:
        name: its dotted path.
        options: the ways; the first keeps the layer.
        shape: the layer's sizes, with the bias that every low-rank form has.
        bases: input bases, (i, r) each; options use the leading columns of theirs.
        rows: the eigenbasis' rows, dearest first: `BLOCK` options keep the leading ones.
        columns: its columns, likewise.
        damping: of S and A, relative to their mean diagonal.
        has_bias: whether the layer has a bias now.
    """

    name: str
    options: Options
    shape: LayerShape
    bases: tuple[Float[Tensor, "i _"], ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    damping: float
    has_bias: bool

    def action(self, index: int) -> Action:
        """What an option does."""
        o = self.options
        form = FORMS[int(o.form[index])]
        rank_out, rank_in = int(o.rank_out[index]), int(o.rank_in[index])
        match Kind(int(o.kind[index])):
            case Kind.KEEP:
                return Keep(reason="the best use of the budget leaves it as it is")
            case Kind.BLOCK:
                return EigenBlock(
                    rows=tuple(sorted(self.rows[:rank_out])),
                    columns=tuple(sorted(self.columns[:rank_in])),
                    form=form,
                )
            case Kind.LOW_RANK:
                basis = self.basis(index)
                return LowRank(
                    rank=rank_out,
                    basis=None if basis is None else packed(torch.linalg.qr(basis).Q),
                    form=form,
                    damping=self.damping,
                )

    def cost(self, index: int) -> Cost:
        """What an option other than to keep the layer costs."""
        o = self.options
        ranks = int(o.rank_out[index]), int(o.rank_in[index])
        shape = self.shape
        if o.kind[index] == Kind.BLOCK:
            shape = replace(shape, bias=self.has_bias)
        return shape.factored(*ranks, FORMS[int(o.form[index])])

    def basis(self, index: int) -> Float[Tensor, "i r"] | None:
        """The input basis of an option."""
        which = int(self.options.basis[index])
        return None if which < 0 else self.bases[which][:, : int(self.options.rank_in[index])]

    def with_basis(self, metric: Metric, basis: Float[Tensor, "i r"], multiple: int) -> LayerMenu:
        """The same menu with the options of one more input basis."""
        rank_in = basis.shape[1]
        prices = basis_prices(metric, basis)
        index = len(self.bases)
        found = [
            low_rank_row(self.shape, rank_out, rank_in, index, float(prices[rank_out]))
            for rank_out in rank_grid(self.shape.outputs, len(prices) - 1, multiple, _RANKS_OUT)
        ]
        more = smaller_than(stacked(found), self.options)
        return replace(self, options=self.options + more, bases=(*self.bases, basis))


def metric_of(layer: Layer, curvature: LayerCurvature, damping: float) -> Metric:
    """What a layer's low-rank forms are priced by.

    Raises:
        EigenDamageError: if the second moment of whole patches was not estimated.
        NonFiniteError: if the weight or the curvature holds NaN or infinity.
    """
    A, mean = curvature.patch_moments(layer.name)
    weight, S = layer.weight().double().cpu(), curvature.S.double().cpu()
    for what, tensor in (("weight", weight), ("S", S), ("A", A), ("mean input", mean)):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"layer '{layer.name}': its {what} holds NaN or infinity")
    precision = float(torch.finfo(curvature.A.dtype).eps)
    return Metric.of(weight, S, A, mean, damping, precision)


def layer_menu(
    layer: Layer,
    curvature: LayerCurvature,
    actions: Collection[str],
    damping: float,
    max_ratio: float,
    multiple: int,
) -> LayerMenu:
    """Every way to shrink a layer that takes fewer MACs and fewer parameters.

    Low-rank forms without and with a basis of the inputs, and, unless it is factored already,
    blocks of the eigenbasis at every threshold.

    Args:
        layer: the layer.
        curvature: of it, with patches where low-rank forms are wished for.
        actions: ``low-rank``, ``blocks``; anything else is not for a layer alone.
        damping: of S and A, relative to their mean diagonal.
        max_ratio: the most of a side of the eigenbasis that may go.
        multiple: of which ranks are to be multiples.

    Raises:
        EigenDamageError: if S or A is not positive definite with this damping, or the patches are
            missing.
        NonFiniteError: if the weight or the curvature holds NaN or infinity.
    """
    rows: list[Row] = []
    bases: tuple[Tensor, ...] = ()
    try:
        if "low-rank" in actions:
            metric = metric_of(layer, curvature, damping)
            rows, bases = _low_rank_rows(metric, replace(curvature.shape, bias=True), multiple)
    except torch.linalg.LinAlgError as error:
        raise EigenDamageError(
            f"layer '{layer.name}': S or A with damping {damping:g} is not positive definite; use "
            f"a larger damping, such as 1e-2"
        ) from error
    known = curvature.shape
    kept = layer.cost(known)
    keep: Row = (
        Kind.KEEP,
        0,
        known.outputs,
        known.inputs,
        -1,
        0.0,
        kept.macs,
        float(kept.parameters),
    )
    order: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if "blocks" in actions and curvature.ranks == (known.outputs, known.inputs):
        prices = layer_prices(layer.weight(), curvature)
        order, blocks = _block_rows(prices, known, max_ratio, multiple)
        rows += blocks
    first = stacked([keep])
    return LayerMenu(
        name=layer.name,
        options=first + smaller_than(stacked(rows), first),
        shape=replace(known, bias=True),
        bases=bases,
        rows=order[0],
        columns=order[1],
        damping=damping,
        has_bias=known.bias,
    )


def _low_rank_rows(
    metric: Metric, shape: LayerShape, multiple: int
) -> tuple[list[Row], tuple[Tensor, ...]]:
    prices = svd_prices(metric)
    o, i, K = shape.outputs, shape.inputs, shape.offsets
    found = [
        low_rank_row(shape, rank, i, -1, float(prices[rank]))
        for rank in rank_grid(o, len(prices) - 1, multiple, _RANKS_OUT)
    ]
    if K == 1:
        return found, ()
    nested = NestedBases(metric, input_directions(metric))
    for rank_in in rank_grid(i, i - 1, multiple, _RANKS_IN):
        prices = nested.prices(rank_in)
        for rank_out in rank_grid(o, len(prices) - 1, multiple, _RANKS_OUT):
            found.append(low_rank_row(shape, rank_out, rank_in, 0, float(prices[rank_out])))
    return found, (nested.directions,)


def _block_rows(
    prices: UnitPrices, shape: LayerShape, max_ratio: float, multiple: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], list[Row]]:
    """EigenDamage's blocks of one layer at every threshold, in every form."""
    rows = prices.rows.argsort(descending=True, stable=True)
    columns = prices.columns.argsort(descending=True, stable=True)
    inside = prices.loss[rows][:, columns].cumsum(0).cumsum(1)
    total = float(inside[-1, -1])
    found: dict[tuple[int, int, DenseForm], Row] = {}
    thresholds = prices.units.unique()
    thresholds = thresholds[:: max(1, len(thresholds) // _BLOCKS)]
    sides = [kept_counts(side, thresholds, max_ratio) for side in (prices.rows, prices.columns)]
    sizes = shape.outputs, shape.inputs
    for counts in zip(*sides, strict=True):
        # Rounded up to a multiple: the dearest of those that would go stay.
        ranks = [
            min(n, -(-count // multiple) * multiple) for n, count in zip(sizes, counts, strict=True)
        ]
        for form in FORMS:
            r_o = shape.outputs if form == "merge_out" else ranks[0]
            r_i = shape.inputs if form == "merge_in" else ranks[1]
            if (r_o, r_i, form) in found:
                continue
            price = max(0.0, total - float(inside[r_o - 1, r_i - 1]))
            found[r_o, r_i, form] = row_of(shape, Kind.BLOCK, form, (r_o, r_i), -1, price)
    return (tuple(rows.tolist()), tuple(columns.tolist())), list(found.values())


def floors_of(floors: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The fraction of each layer's MACs that has to stay, by dotted path; the largest that fits."""
    found: dict[str, float] = {}
    for pattern, fraction in floors.items():
        if not 0 <= fraction <= 1:
            raise EigenDamageError(
                f"floors: '{pattern}' is {fraction}; it is a fraction of the MACs, from 0 to 1"
            )
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise EigenDamageError(
                f"floors: the pattern '{pattern}' matches no layer that may be changed; these are: "
                f"{', '.join(list(names)[:8])}, …"
            )
        for name in hits:
            found[name] = max(fraction, found.get(name, 0.0))
    return found
