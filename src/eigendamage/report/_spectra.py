"""How the curvature of layers falls off, in a few numbers a layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import Curvature
from eigendamage.documents import Frozen

_POINTS = 17
_HELD = 0.9


class Spectrum(Frozen):
    """The eigenvalues of one factor, relative to the greatest.

    Attributes:
        size: how many there are.
        ranks: those that are told, the greatest being 0: all of a few, else they lie ever farther
            apart, since most of the fall is at the beginning.
        values: of these ranks, from 1 down; all zero where the factor is.
        ninety: how many of the greatest add up to 90 % of the sum; 0 where that is zero.
    """

    size: int
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    ninety: int

    @classmethod
    def of(cls, eigenvalues: Float[Tensor, " n"]) -> Spectrum:
        """The same of eigenvalues in any order; what rounding made negative counts as zero."""
        found = eigenvalues.detach().cpu().double().clamp(min=0).sort(descending=True).values
        last = len(found) - 1
        steps = torch.linspace(0, 1, _POINTS, dtype=torch.float64).square() * last
        ranks = torch.unique(steps.round().long())
        total = float(found.sum())
        if total == 0:
            values, ninety = torch.zeros(len(ranks)), 0
        else:
            values = found[ranks] / found[0]
            # The sum may round to just below its last partial sum's share, never past the end.
            ninety = min(1 + int((found.cumsum(0) < _HELD * total).sum()), len(found))
        return cls(
            size=len(found),
            ranks=tuple(ranks.tolist()),
            values=tuple(float(f"{value:.4g}") for value in values.tolist()),
            ninety=ninety,
        )


class Spectra(Frozen):
    """The spectra of a layer's factors.

    Attributes:
        outputs: of S, the second moment of the output gradients.
        inputs: of A, the second moment of the inputs, by channel.
    """

    outputs: Spectrum
    inputs: Spectrum


def spectra_by_layer(curvature: Curvature) -> dict[str, Spectra]:
    """The spectra of each layer of a curvature."""
    return {
        name: Spectra(
            outputs=Spectrum.of(layer.S_eigenvalues), inputs=Spectrum.of(layer.A_eigenvalues)
        )
        for name, layer in curvature.items()
    }
