"""Second moments of a layer's inputs and output gradients, as pure functions of tensors.

All functions return sums over the examples given, not averages: the caller divides by the counts
once, at the end, so that any split of the data gives the same result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.errors import ShapeError
from eigendamage.layers import ConvGeometry


def gram(x: Float[Tensor, "n c t"]) -> Float[Tensor, "c c"]:
    """Σ_n x_n x_nᵀ. Cost: one (c × n·t) product; the smaller of two temporaries is chosen."""
    channels, positions = x.shape[1], x.shape[2]
    if positions == 1:
        flat = x[:, :, 0]
        return flat.T @ flat
    if channels <= positions:
        return torch.bmm(x, x.transpose(1, 2)).sum(0)
    flat = x.transpose(0, 1).reshape(channels, -1)
    return flat @ flat.T


def input_moments(
    x: Float[Tensor, "n i *size"], geometry: ConvGeometry | None, *, name: str = ""
) -> tuple[Float[Tensor, "i i"], Float[Tensor, " i"]]:
    """Channel second moment and mean of a layer's input over all its patches, as sums.

    The first is Σ_n Σ_t Σ_k a_k a_kᵀ and the second Σ_n Σ_t Σ_k a_k over examples, positions and
    kernel offsets; divided by N·T·K they are A_c and the mean (Grosse & Martens 2016, eq. 31
    under spatially uncorrelated inputs). No patches are built: a pixel counts as often as a patch
    covers it. Cost: one (i × n·h·w) product.

    Args:
        x: the input, (n, i, h, w) for a convolution and (n, i, t) for Linear.
        geometry: the convolution's, None for Linear.
        name: the layer's dotted path, for errors.

    Raises:
        ShapeError: if a convolution's input is not four-dimensional.
    """
    if geometry is None:
        return gram(x), x.sum((0, 2))
    if x.ndim != 4:
        raise ShapeError(name, f"got an input of shape {tuple(x.shape)}; expected (n, i, h, w)")
    if geometry.is_pointwise:
        seen = x[:, :, :: geometry.stride[0], :: geometry.stride[1]].flatten(2)
        return gram(seen), seen.sum((0, 2))
    plain = geometry
    if geometry.padding_mode != "zeros":
        x = geometry.pad(x)
        plain = ConvGeometry(geometry.kernel, geometry.stride, dilation=geometry.dilation)
    count = plain.coverage(x.shape[2], x.shape[3]).to(x)
    weighted = (x * count.sqrt()).flatten(2)
    # Σ m x, from √m x and √m: the weighted copy is at hand already.
    total = torch.einsum("nip,p->i", weighted, count.sqrt().flatten())
    return gram(weighted), total


def homogeneous(
    A: Float[Tensor, "i i"], mean: Float[Tensor, " i"], constant: float = 1.0
) -> Float[Tensor, "i1 i1"]:
    """A with a last coordinate for the bias: the moment of (a, constant).

    With the full moment over patches the constant is 1; over the channels of one kernel offset
    it is 1/K, since the bias is spread over K offsets.
    """
    column = (constant * mean).unsqueeze(1)
    corner = A.new_full((1, 1), constant**2)
    return torch.cat([torch.cat([A, column], 1), torch.cat([column.T, corner], 1)], 0)


class Eigenbasis(NamedTuple):
    """Eigenvalues, ascending, and eigenvectors in columns."""

    values: Float[Tensor, " c"]
    vectors: Float[Tensor, "c c"]


def eigenbasis(moment: Float[Tensor, "c c"]) -> Eigenbasis:
    """Eigenvalues (ascending, none below zero) and eigenvectors (columns), computed in float64.

    The sign of each eigenvector is fixed (its largest entry is positive), so that the same moment
    gives the same basis.
    """
    wide = moment.double()
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    at = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, at).sign()
    return Eigenbasis(values.clamp_min(0), vectors)


def eigenbasis_within(
    moment: Float[Tensor, "c c"], span: Float[Tensor, "c r"] | None
) -> Eigenbasis:
    """Like `eigenbasis`, but the last r columns are eigenvectors of the moment within a subspace.

    The first c − r are those within its orthogonal complement. Each part is ascending.

    Args:
        moment: a second moment.
        span: orthonormal columns; None for the whole space.
    """
    if span is None:
        return eigenbasis(moment)
    inside = span.double().to(moment.device)
    rank = inside.shape[1]
    # The complete QR of orthonormal columns: they themselves up to sign, then the complement.
    outside = torch.linalg.qr(inside, mode="complete").Q[:, rank:]
    parts = [(basis, eigenbasis(basis.T @ moment.double() @ basis)) for basis in (outside, inside)]
    return Eigenbasis(
        torch.cat([found.values for _, found in parts]),
        torch.cat([basis @ found.vectors for basis, found in parts], 1),
    )
