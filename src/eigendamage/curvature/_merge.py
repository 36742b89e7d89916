"""Two curvatures of one layer, on different data, as one."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature._layer import EigenvalueKind, LayerCurvature
from eigendamage.errors import MismatchError

_BY_POSITION = ("patches", "patch_mean")
_BY_EXAMPLE = ("diagonal", "bias_diagonal", "gates")


def merge_layers(
    name: str, a: LayerCurvature, b: LayerCurvature, kind: EigenvalueKind
) -> LayerCurvature:
    """One layer's curvature on two sets of data, as `Curvature.merge` says."""
    if a.eigenvalues.shape != b.eigenvalues.shape or a.ranks != b.ranks:
        raise MismatchError(
            f"layer '{name}': weights of shape {tuple(a.eigenvalues.shape)} and "
            f"{tuple(b.eigenvalues.shape)}, of ranks {a.ranks} and {b.ranks}, cannot merge"
        )
    b = _on(a.S.device, b)
    examples, positions = a.examples + b.examples, a.positions + b.positions
    by_example, by_position = a.examples / examples, a.positions / positions
    shape = replace(
        a.shape,
        positions_in=by_example * a.shape.positions_in + (1 - by_example) * b.shape.positions_in,
        positions_out=by_example * a.shape.positions_out + (1 - by_example) * b.shape.positions_out,
    )
    S = by_example * a.S + (1 - by_example) * b.S.to(a.S)
    A = by_position * a.A + (1 - by_position) * b.A.to(a.A)
    mean = by_position * a.mean + (1 - by_position) * b.mean.to(a.mean)
    extras = {w: _mixed(getattr(a, w), getattr(b, w), by_position) for w in _BY_POSITION}
    extras |= {w: _mixed(getattr(a, w), getattr(b, w), by_example) for w in _BY_EXAMPLE}
    if kind == "ekfac" and a.same_basis(b):
        lam = by_example * a.eigenvalues + (1 - by_example) * b.eigenvalues
        return replace(
            a,
            S=S,
            A=A,
            mean=mean,
            eigenvalues=lam,
            examples=examples,
            positions=positions,
            shape=shape,
            **extras,
        )
    merged = LayerCurvature.from_factors(S, A, mean, examples, positions, shape, a.spans())
    merged = replace(merged, **extras)
    if kind == "kfac":
        return merged
    lam = by_example * _carried(a, merged) + (1 - by_example) * _carried(b, merged)
    return replace(merged, eigenvalues=lam)


def _on(device: torch.device, layer: LayerCurvature) -> LayerCurvature:
    """The same with all of its tensors on a device."""
    known = {field.name: getattr(layer, field.name) for field in fields(layer) if field.init}
    return replace(layer, **{k: v.to(device) for k, v in known.items() if isinstance(v, Tensor)})


def _carried(source: LayerCurvature, target: LayerCurvature) -> Float[Tensor, "o i K"]:
    """λ of one basis as the diagonal of its matrix in another."""
    rows = (target.Q_S.T @ source.Q_S).square()
    columns = (target.Q_A.T @ source.Q_A).square()
    return torch.einsum("po,oik,qi->pqk", rows, source.eigenvalues, columns)


def _mixed(ours: Tensor | None, theirs: Tensor | None, share: float) -> Tensor | None:
    if ours is None or theirs is None:
        return None
    return share * ours + (1 - share) * theirs.to(ours)
