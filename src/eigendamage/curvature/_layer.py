"""The curvature of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature._factors import Eigenbasis, eigenbasis_within, homogeneous
from eigendamage.errors import EigenDamageError
from eigendamage.layers import LayerShape

EigenvalueKind = Literal["ekfac", "kfac"]


def factor_bases(
    S: Float[Tensor, "o o"],
    A: Float[Tensor, "i i"],
    spans: tuple[Tensor | None, Tensor | None],
) -> tuple[Eigenbasis, Eigenbasis]:
    """The eigenbases of S and A, in float64, as `LayerCurvature.ranks` lays them out."""
    return eigenbasis_within(S, spans[0]), eigenbasis_within(A, spans[1])


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
        ranks: (r_o, r_i), the dimensions that the weight's outputs and inputs span; (o, i) but for
            a factored layer. There the last r_o columns of Q_S and the last r_i of Q_A are the
            eigenvectors within what its outer stages span, so that a new cut merges with the old
            one (paper, section 4.3); the others come first and W' is zero in them.
        patches: second moment of whole patches, 1/(N T) Σ_n Σ_t vec(a) vec(a)ᵀ, (iK, iK), the
            input slowest. None where it was not wished for, and where K = 1 (it is A there).
        patch_mean: mean patch, (iK,).
        diagonal: the Fisher's exact diagonal, 1/N Σ_n G[n]², (o, i, K).
        bias_diagonal: the same of the bias, zero where there is none, (o,).
        gates: 1/N Σ_n (Σ_j w_rj G[n]_rj + b_r g_b[n]_r)², the mean squared first-order change of
            the loss when output r goes, (o,).
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
    ranks: tuple[int, int]
    patches: Float[Tensor, "iK iK"] | None = None
    patch_mean: Float[Tensor, " iK"] | None = None
    diagonal: Float[Tensor, "o i K"] | None = None
    bias_diagonal: Float[Tensor, " o"] | None = None
    gates: Float[Tensor, " o"] | None = None

    @classmethod
    def from_factors(
        cls,
        S: Tensor,
        A: Tensor,
        mean: Tensor,
        examples: int,
        positions: int,
        shape: LayerShape,
        spans: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> LayerCurvature:
        """Factors with their eigenbasis, and Λ_S Λ_A as eigenvalues.

        ``spans`` are orthonormal columns that the weight's outputs, (o, r_o), and inputs,
        (i, r_i), lie in; None for all.
        """
        bases = factor_bases(S, A, spans)
        return cls.from_bases(S, A, mean, examples, positions, shape, spans, bases)

    @classmethod
    def from_bases(
        cls,
        S: Tensor,
        A: Tensor,
        mean: Tensor,
        examples: int,
        positions: int,
        shape: LayerShape,
        spans: tuple[Tensor | None, Tensor | None],
        bases: tuple[Eigenbasis, Eigenbasis],
    ) -> LayerCurvature:
        """As `from_factors`, where their eigenbases, of `factor_bases`, are known already."""
        of_S, of_A = bases
        products = torch.outer(of_S.values, of_A.values).to(S)
        return cls(
            S=S,
            A=A,
            mean=mean,
            # Row by row, as they are on disk: what is made of them is the same to the bit.
            Q_S=of_S.vectors.to(S).contiguous(),
            Q_A=of_A.vectors.to(A).contiguous(),
            S_eigenvalues=of_S.values.to(S),
            A_eigenvalues=of_A.values.to(A),
            eigenvalues=products.unsqueeze(2).repeat(1, 1, shape.offsets),
            examples=examples,
            positions=positions,
            shape=shape,
            ranks=(
                shape.outputs if spans[0] is None else spans[0].shape[1],
                shape.inputs if spans[1] is None else spans[1].shape[1],
            ),
        )

    def spans(self) -> tuple[Tensor | None, Tensor | None]:
        """Orthonormal columns that the weight's outputs and inputs lie in; None for all."""
        out, into = self.ranks
        return (
            None if out == self.shape.outputs else self.Q_S[:, -out:],
            None if into == self.shape.inputs else self.Q_A[:, -into:],
        )

    def patch_factor(self, name: str) -> Float[Tensor, "m m"]:
        """A over whole patches, in float64, with a last coordinate of 1 if the layer has a bias.

        m is iK, or iK + 1: what the columns of the (o, iK) weight and the bias are multiplied by.

        Raises:
            EigenDamageError: if the patches were not estimated; ``name`` is the layer's path.
        """
        moment, mean = self.patch_moments(name)
        return homogeneous(moment, mean) if self.shape.bias else moment

    def patch_moments(self, name: str) -> tuple[Float[Tensor, "iK iK"], Float[Tensor, " iK"]]:
        """A over whole patches and the mean patch, in float64 on the CPU.

        Raises:
            EigenDamageError: if the patches were not estimated; ``name`` is the layer's path.
        """
        pointwise = self.shape.offsets == 1
        moment = self.A if pointwise else self.patches
        mean = self.mean if pointwise else self.patch_mean
        if moment is None or mean is None:
            raise EigenDamageError(
                f"layer '{name}': the second moment of whole patches is needed and was not "
                f"estimated; give also=('patches',) to estimate_curvature"
            )
        return moment.double().cpu(), mean.double().cpu()

    def kfac_eigenvalues(self) -> Float[Tensor, "o i K"]:
        """Λ_S Λ_A for every kernel offset: what K-FAC says λ is."""
        products = torch.outer(self.S_eigenvalues, self.A_eigenvalues)
        return products.unsqueeze(2).expand(-1, -1, self.shape.offsets)

    def same_basis(self, other: LayerCurvature) -> bool:
        """Whether the eigenvectors are the same, to the bit."""
        return torch.equal(self.Q_S, other.Q_S) and torch.equal(self.Q_A, other.Q_A)
