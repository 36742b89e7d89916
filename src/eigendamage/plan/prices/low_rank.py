"""Low-rank forms of a layer in the metric S ⊗ A, priced as what remains after the best refit.

The weight W (o, iK) becomes X = Y Pᵀ with P = B ⊗ I_K for a basis B (i, r_i) of the inputs, and Y
of rank r_o. Under F ≈ S ⊗ A (Grosse & Martens 2016), with A over whole patches and centred, as the
bias takes up the mean, the rise ½ tr S (W−X) A (W−X)ᵀ is least at Y = W A P (Pᵀ A P)⁻¹, cut to rank
r_o in the whitened space (Eckart & Young 1936). With G = Pᵀ A P and σ the singular values of
S^½ W A P G^{-½} the least is ½ (tr S W A Wᵀ − Σ_{j ≤ r_o} σ_j²). Without a basis that is the SVD
whitened on both sides (Chekalina et al. 2025 for Linear); with r_o = o only the inputs are cut.

Everything is in float64. S and A are damped relative to their mean diagonal, so that they may be
singular; a price is in the damped metric, which is never below the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.plan.prices._inverse import damped

# A direction of an input basis is worth a step while the price falls by this part of itself.
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Metric:
    """What a layer's low-rank forms are priced by.

    Attributes:
        W: the weight, (o, iK), the input slowest.
        S: the gradients' factor, damped, (o, o).
        C: the centred second moment of the layer's patches, damped, (iK, iK).
        A_c: the centred channel second moment, damped, (i, i).
        mean: the mean patch, (iK,).
    """

    W: Float[Tensor, "o m"]
    S: Float[Tensor, "o o"]
    C: Float[Tensor, "m m"]
    A_c: Float[Tensor, "i i"]
    mean: Float[Tensor, " m"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "o i K"],
        S: Float[Tensor, "o o"],
        A: Float[Tensor, "m m"],
        mean: Float[Tensor, " m"],
        damping: float,
        precision: float = 0.0,
    ) -> Metric:
        """From the second moment A of whole patches and the mean patch.

        ``precision`` is the relative rounding of these two. What is left of inputs that hardly
        vary when their mean is taken out is rounding, which the damping has to exceed.
        """
        o, i, K = weight.shape
        rounding = precision * float(A.diagonal().sum())
        centred = A.double() - torch.outer(mean.double(), mean.double())
        by_channel = centred.reshape(i, K, i, K).diagonal(dim1=1, dim2=3).mean(2)
        return cls(
            W=weight.double().reshape(o, i * K),
            S=damped(S, damping),
            C=damped(centred, damping, least=rounding),
            A_c=damped(by_channel, damping, least=rounding / K),
            mean=mean.double(),
        )

    @property
    def offsets(self) -> int:
        """K."""
        return self.W.shape[1] // len(self.A_c)

    @cached_property
    def S_root(self) -> Float[Tensor, "o o"]:
        """L_S with S = L_S L_Sᵀ."""
        return torch.linalg.cholesky(self.S)

    @cached_property
    def moved(self) -> Float[Tensor, "o m"]:
        """W C."""
        return self.W @ self.C

    @cached_property
    def total(self) -> float:
        """Tr S W C Wᵀ: twice the price of removing the whole weight."""
        return float(((self.S @ self.W) * self.moved).sum())

    def whitened_inputs(self) -> Float[Tensor, "i i"]:
        """L with A_c = L Lᵀ: input bases are searched for as L⁻ᵀ V."""
        return torch.linalg.cholesky(self.A_c)


def svd_prices(metric: Metric) -> Float[Tensor, " ranks"]:
    """The price of every rank from 0 to min(o, iK) with all inputs there.

    Cost: a (o × iK × iK) product and the eigenvalues of a matrix of the smaller side.
    """
    L, W = metric.S_root, metric.W
    if W.shape[0] <= W.shape[1]:
        gram = L.T @ (metric.moved @ W.T) @ L
    else:
        R = torch.linalg.cholesky(metric.C)
        inside = L.T @ (W @ R)
        gram = inside.T @ inside
    return _prices(metric.total, gram)


def _prices(total: float, gram: Float[Tensor, "n n"]) -> Float[Tensor, " ranks"]:
    """½ (total − Σ_{j ≤ r} σ_j²) for r = 0, 1, …; σ² are the eigenvalues of ``gram``."""
    squares = torch.linalg.eigvalsh((gram + gram.T) / 2).flip(0).clamp_min(0)
    explained = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return (0.5 * (total - explained)).clamp_min(0)


def input_directions(metric: Metric) -> Float[Tensor, "i i"]:
    """Input directions by what they are worth, best first: every leading part is a basis.

    Those of the Tucker-2 decomposition of S^½ W A_c^½ (Kim et al. 2016), un-whitened: A_c^{-½} V
    with V the eigenvectors of A_c^½ (Σ_k W_kᵀ S W_k) A_c^½.
    """
    i, K = len(metric.A_c), metric.offsets
    L = metric.whitened_inputs()
    inside = torch.einsum("qo,oik,ij->qjk", metric.S_root.T, metric.W.reshape(-1, i, K), L)
    gram = torch.einsum("qik,qjk->ij", inside, inside)
    V = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return torch.linalg.solve_triangular(L.T, V, upper=True)


def _spread(metric: Metric, basis: Float[Tensor, "i r"]) -> tuple[Tensor, Tensor]:
    """W C P, (o, rK), and Pᵀ C P, (rK, rK), for P = B ⊗ I_K."""
    i, K = len(metric.A_c), metric.offsets
    o, r = metric.W.shape[0], basis.shape[1]
    WCP = torch.einsum("oik,ir->ork", metric.moved.reshape(o, i, K), basis).reshape(o, r * K)
    CP = torch.einsum("mik,ir->mrk", metric.C.reshape(-1, i, K), basis).reshape(i, K, r * K)
    G = torch.einsum("ikn,ir->rkn", CP, basis).reshape(r * K, r * K)
    return WCP, (G + G.T) / 2


class NestedBases:
    """The prices of all leading parts of one sequence of input directions.

    The Cholesky factor of a leading block of G is the leading block of G's, so one factorisation
    and one solve serve every r_i; what is left of each is the eigenvalues of an (o, o) matrix.
    Cost: O((iK)³) once.

    Args:
        metric: of the layer.
        directions: (i, i), best first.
    """

    def __init__(self, metric: Metric, directions: Float[Tensor, "i i"]) -> None:
        self._metric = metric
        self.directions = directions
        WCP, G = _spread(metric, directions)
        R = torch.linalg.cholesky(G)
        self._explained = torch.linalg.solve_triangular(R, WCP.T @ metric.S_root, upper=False)

    def prices(self, rank_in: int) -> Float[Tensor, " ranks"]:
        """The price of every rank from 0 to min(o, r_i K) of the first ``rank_in`` directions."""
        rows = self._explained[: rank_in * self._metric.offsets]
        gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
        return _prices(self._metric.total, gram)


def basis_prices(metric: Metric, basis: Float[Tensor, "i r"]) -> Float[Tensor, " ranks"]:
    """The price of every rank from 0 to min(o, r_i K) of one input basis."""
    return _prices(metric.total, _gram(metric, basis))


def _gram(metric: Metric, basis: Float[Tensor, "i r"]) -> Float[Tensor, "n n"]:
    WCP, G = _spread(metric, basis)
    rows = torch.linalg.solve_triangular(
        torch.linalg.cholesky(G), WCP.T @ metric.S_root, upper=False
    )
    return rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T


def refined_basis(
    metric: Metric, basis: Float[Tensor, "i r"], rank_out: int, steps: int
) -> Float[Tensor, "i r"]:
    """An input basis with a lower price at this rank: L-BFGS on the price, from ``basis``.

    The price depends on the span alone and is searched over L⁻ᵀ V with A_c = L Lᵀ. The gradient
    goes through the Cholesky factor of G and the symmetric eigenvalues. The result is orthonormal;
    it is the start's span if no step lowers the price. Cost: about 5 times that of `basis_prices` a
    step.
    """
    L = metric.whitened_inputs()
    V = torch.linalg.qr((L.T @ basis).detach()).Q.contiguous().requires_grad_()
    scale = metric.total if metric.total > 0 else 1.0
    optimizer = torch.optim.LBFGS(
        [V],
        max_iter=steps,
        max_eval=steps * 5 // 4,
        history_size=10,
        tolerance_change=_TOLERANCE * 1e-3,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        B = torch.linalg.solve_triangular(L.T, V, upper=True)
        gram = _gram(metric, B)
        lost = 1 - torch.linalg.eigvalsh(gram)[-rank_out:].sum() / scale
        lost.backward()
        return lost

    with torch.enable_grad():
        optimizer.step(closure)
    found = torch.linalg.solve_triangular(L.T, V.detach(), upper=True)
    start = torch.linalg.qr(basis).Q
    if not bool(torch.isfinite(found).all()):
        return start
    found = torch.linalg.qr(found).Q
    better = basis_prices(metric, found)[rank_out] < basis_prices(metric, start)[rank_out]
    return found if bool(better) else start


@dataclass(frozen=True, eq=False)
class BestForm:
    """A layer's best form of given ranks.

    Attributes:
        basis: B, (i, r_i); None for all inputs.
        core: (r_o, r_i, K); (o, r_i, K) if the outputs are not cut.
        out: (o, r_o); None if the outputs are not cut.
        shift: what is to be added to the bias, (o,): (W − X) times the mean patch.
    """

    basis: Float[Tensor, "i ri"] | None
    core: Float[Tensor, "c ri K"]
    out: Float[Tensor, "o ro"] | None
    shift: Float[Tensor, " o"]


def best_form(metric: Metric, basis: Float[Tensor, "i r"] | None, rank_out: int | None) -> BestForm:
    """The X of least price with this input basis and this rank.

    Args:
        metric: of the layer.
        basis: of the inputs; None for all of them.
        rank_out: r_o; None does not cut the outputs.
    """
    i, K = len(metric.A_c), metric.offsets
    o = metric.W.shape[0]
    if basis is None:
        best, seen = metric.W, metric.C
    else:
        WCP, seen = _spread(metric, basis.double())
        best = torch.cholesky_solve(WCP.T, torch.linalg.cholesky(seen)).T
    width = i if basis is None else basis.shape[1]
    core, out, product = best, None, best
    if rank_out is not None:
        L = metric.S_root
        inside = L.T @ best
        # Left singular vectors of L_Sᵀ Y G^½ by the (o, o) Gram matrix.
        gram = inside @ seen @ inside.T
        u = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)[:, :rank_out]
        out = torch.linalg.solve_triangular(L.T, u, upper=True)
        core = u.T @ inside
        product = out @ core
    if basis is not None:
        wide = torch.einsum("ork,ir->oik", product.reshape(o, width, K), basis.double())
        product = wide.reshape(o, i * K)
    return BestForm(
        basis=basis,
        core=core.reshape(-1, width, K),
        out=out,
        shift=(metric.W - product) @ metric.mean,
    )
