"""The curvature of a model: what it holds for each layer, and how two of them merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature._factors import eigenbasis
from eigendamage.curvature._head import Fisher
from eigendamage.errors import MismatchError
from eigendamage.layers import LayerShape

EigenvalueKind = Literal["ekfac", "kfac"]


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """K-FAC's factors of one layer's Fisher block, their eigenbasis, and the curvature in it.

    With N examples, T positions and K kernel offsets, and the loss of an example not divided by
    the batch:

    Attributes:
        S: second moment of the output gradients, 1/N Σ_n Σ_t g gᵀ, (o, o).
        A: channel second moment of the inputs, 1/(N T K) Σ_n Σ_t Σ_k a_k a_kᵀ, (i, i).
        mean: mean input of a channel over all patches, 1/(N T K) Σ a_k, (i,).
        Q_S: eigenvectors of S in columns, eigenvalues ascending, (o, o).
        Q_A: eigenvectors of A in columns, (i, i).
        S_eigenvalues: Λ_S, (o,).
        A_eigenvalues: Λ_A, (i,).
        eigenvalues: λ[o', i', k], the second moment of the per-example weight gradient in the
            eigenbasis (George et al. 2018), or the products Λ_S Λ_A; (o, i, K). Σ λ is the trace
            of the Fisher block in the first case.
        examples: N.
        positions: Σ_n T, over all examples.
        shape: the layer's sizes, from which its costs follow.
    """

    S: Float[Tensor, "o o"]
    A: Float[Tensor, "i i"]
    mean: Float[Tensor, " i"]
    Q_S: Float[Tensor, "o o"]
    Q_A: Float[Tensor, "i i"]
    S_eigenvalues: Float[Tensor, " o"]
    A_eigenvalues: Float[Tensor, " i"]
    eigenvalues: Float[Tensor, "o i K"]
    examples: int
    positions: int
    shape: LayerShape

    @classmethod
    def from_factors(
        cls, S: Tensor, A: Tensor, mean: Tensor, examples: int, positions: int, shape: LayerShape
    ) -> LayerCurvature:
        """Factors with their eigenbasis, and Λ_S Λ_A as eigenvalues."""
        of_S, of_A = eigenbasis(S), eigenbasis(A)
        products = torch.outer(of_S.values, of_A.values).to(S)
        return cls(
            S=S,
            A=A,
            mean=mean,
            Q_S=of_S.vectors.to(S),
            Q_A=of_A.vectors.to(A),
            S_eigenvalues=of_S.values.to(S),
            A_eigenvalues=of_A.values.to(A),
            eigenvalues=products.unsqueeze(2).repeat(1, 1, shape.offsets),
            examples=examples,
            positions=positions,
            shape=shape,
        )

    def kfac_eigenvalues(self) -> Float[Tensor, "o i K"]:
        """Λ_S Λ_A for every kernel offset: what K-FAC says λ is."""
        products = torch.outer(self.S_eigenvalues, self.A_eigenvalues)
        return products.unsqueeze(2).expand(-1, -1, self.shape.offsets)

    def same_basis(self, other: LayerCurvature) -> bool:
        """Whether the eigenvectors are the same, to the bit."""
        return torch.equal(self.Q_S, other.Q_S) and torch.equal(self.Q_A, other.Q_A)


@dataclass(frozen=True, eq=False)
class Curvature(Mapping[str, LayerCurvature]):
    """The curvature of a model's layers: a mapping from dotted path to `LayerCurvature`.

    Attributes:
        layers: the layers, in the order in which they run.
        left_alone: why every other module with parameters is not among them.
        classifier: the layers whose output is the model's; the last that runs, if no module with
            parameters returns it.
        macs: multiply-accumulates of one example in the whole model.
        parameters: number of parameters of the whole model.
        examples: N.
        loss: name of the loss.
        fisher: ``mc``, ``exact`` or ``empirical``.
        kind: ``ekfac`` if the eigenvalues are λ, ``kfac`` if they are Λ_S Λ_A.
    """

    layers: Mapping[str, LayerCurvature]
    left_alone: Mapping[str, str] = field(default_factory=dict[str, str])
    classifier: tuple[str, ...] = ()
    macs: float = 0.0
    parameters: int = 0
    examples: int = 0
    loss: str = "cross_entropy"
    fisher: Fisher = "mc"
    kind: EigenvalueKind = "ekfac"

    def __getitem__(self, name: str) -> LayerCurvature:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def merge(self, other: Curvature) -> Curvature:
        """The curvature of both sets of data together, each weighted by its examples.

        S, A and the mean are exact. So is λ if both were estimated in one basis (``basis=`` of
        `estimate_curvature`), which is then kept. If not, the eigenbasis is that of the
        merged factors, and each λ is carried into it as the diagonal of Q diag(λ) Qᵀ there: its
        sum, the trace, stays exact, its distribution is an approximation.

        Raises:
            MismatchError: if the two are not of the same model, loss, Fisher and kind.
        """
        if list(self) != list(other):
            mine, theirs = set(self), set(other)
            odd = sorted(mine ^ theirs) or ["the order of layers"]
            raise MismatchError(f"the curvatures are of different models: {odd[0]} differs")
        for what in ("loss", "fisher", "kind"):
            ours, its = getattr(self, what), getattr(other, what)
            if ours != its:
                raise MismatchError(f"the curvatures differ in {what}: '{ours}' and '{its}'")
        merged = {name: _merge(name, self[name], other[name], self.kind) for name in self}
        return replace(self, layers=merged, examples=self.examples + other.examples)


def _merge(name: str, a: LayerCurvature, b: LayerCurvature, kind: EigenvalueKind) -> LayerCurvature:
    if a.S.shape != b.S.shape or a.eigenvalues.shape != b.eigenvalues.shape:
        raise MismatchError(
            f"layer '{name}': weights of shape {tuple(a.eigenvalues.shape)} and "
            f"{tuple(b.eigenvalues.shape)} cannot merge"
        )
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
        )
    merged = LayerCurvature.from_factors(S, A, mean, examples, positions, shape)
    if kind == "kfac":
        return merged
    lam = by_example * _carried(a, merged) + (1 - by_example) * _carried(b, merged)
    return replace(merged, eigenvalues=lam)


def _carried(source: LayerCurvature, target: LayerCurvature) -> Float[Tensor, "o i K"]:
    """λ of one basis as the diagonal of its matrix in another."""
    rows = (target.Q_S.T @ source.Q_S).square()
    columns = (target.Q_A.T @ source.Q_A).square()
    return torch.einsum("po,oik,qi->pqk", rows, source.eigenvalues, columns)
