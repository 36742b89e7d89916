"""λ: the second moment of per-example weight gradients in a given eigenbasis, as pure functions.

λ[o', i', k] = Σ_n (Q_Sᵀ G[n] Q_A)²[o', i', k] with G[n] = Σ_t g[n,t] ⊗ a[n,t] (George et al. 2018).
The positions are summed before squaring, which is what makes Σ λ the trace of the Fisher block in
any orthonormal basis. There are several orders of doing it; they differ in cost alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.layers import ConvGeometry

Strategy = Literal["outer", "rotate_inputs", "rotate_gradients"]
Call = tuple[Tensor, Tensor]
"""Input (n, i, h, w) or (n, i, t), and output gradient (n, o, t), of one call of a layer."""

_BUFFER_BYTES = 16 * 2**20


def eigenvalue_sum(
    calls: Sequence[Call],
    Q_S: Float[Tensor, "o o"],
    Q_A: Float[Tensor, "i i"],
    geometry: ConvGeometry | None,
    strategy: Strategy | None = None,
) -> Float[Tensor, "o i K"]:
    """Σ_n of the squared rotated weight gradients over the examples of a batch.

    Args:
        calls: one (input, output gradient) pair for each time the layer ran; the gradients of one
            example add up over its calls.
        Q_S: eigenvectors of S in columns.
        Q_A: eigenvectors of A_c in columns.
        geometry: the convolution's, None for Linear.
        strategy: ``outer`` (one position only: the gradient is a rank-one matrix, its square is
            one too), ``rotate_inputs`` (rotate activations, then form gradients) or
            ``rotate_gradients`` (form gradients, then rotate); the cheapest by default.
    """
    chosen = strategy or cheapest(calls, geometry)
    if chosen == "outer":
        if len(calls) > 1 or calls[0][1].shape[2] != 1:
            raise ValueError("strategy 'outer' is only for one call with one position")
        a, g = calls[0]
        rotated = (g[:, :, 0] @ Q_S).square()
        return torch.stack(
            [rotated.T @ (tap[:, :, 0] @ Q_A).square() for tap in _taps(a, geometry)], dim=2
        )
    if chosen == "rotate_inputs":
        return _squared(calls, geometry, before=(Q_A, Q_S))
    return _squared(calls, geometry, after=(Q_A, Q_S))


def cheapest(calls: Sequence[Call], geometry: ConvGeometry | None) -> Strategy:
    """The strategy with the fewest multiplications; forming the gradients costs all the same."""
    if len(calls) == 1 and calls[0][1].shape[2] == 1:
        return "outer"
    a, g = calls[0]
    i, o, k = a.shape[1], g.shape[1], 1 if geometry is None else geometry.offsets
    positions_in = sum(math.prod(c[0].shape[2:]) for c in calls)
    positions_out = sum(c[1].shape[2] for c in calls)
    inputs = positions_in * i * i + positions_out * o * o
    gradients = k * (o * o * i + o * i * i)
    return "rotate_inputs" if inputs <= gradients else "rotate_gradients"


def gradient_norms(calls: Sequence[Call], geometry: ConvGeometry | None) -> Float[Tensor, ""]:
    """Σ_n ‖G[n]‖²: the trace of the Fisher block over the examples of a batch, times N."""
    return _squared(calls, geometry).sum()


def gradient_moments(
    calls: Sequence[Call],
    weight: Float[Tensor, "o i K"],
    bias: Float[Tensor, " o"] | None,
    geometry: ConvGeometry | None,
) -> tuple[Float[Tensor, "o i K"], Float[Tensor, " o"], Float[Tensor, " o"]]:
    """Σ_n of G[n]², of the squared bias gradient, and of (Σ_j w_rj G[n]_rj + b_r Σ_t g[n,t,r])².

    What is of a bias is 0 where there is none. The first two are N times the Fisher's exact
    diagonal. The third is, for each output r, the squared first-order change of the loss when its
    filter and bias go (Molchanov et al. 2019, eq. 8, for single examples).
    """
    g = calls[0][1]
    n, o = g.shape[0], g.shape[1]
    squares = torch.zeros_like(weight)
    bias_gradient = torch.stack([y.sum(2) for _, y in calls]).sum(0)
    along = bias_gradient * bias.to(g) if bias is not None else g.new_zeros(n, o)
    for part, k, grad in _gradients(calls, geometry):
        along[part] += torch.einsum("noi,oi->no", grad, weight[:, :, k])
        squares[:, :, k] += grad.square().sum(0)
    of_bias = g.new_zeros(o) if bias is None else bias_gradient.square().sum(0)
    return squares, of_bias, along.square().sum(0)


def _squared(
    calls: Sequence[Call],
    geometry: ConvGeometry | None,
    *,
    before: tuple[Tensor, Tensor] | None = None,
    after: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "o i K"]:
    """Σ_n G[n]², one slice of the batch and one kernel offset at a time.

    ``before`` are bases (Q_A, Q_S) to rotate inputs and output gradients into first, ``after``
    those to rotate each G[n] into.
    """
    a, g = calls[0]
    offsets = 1 if geometry is None else geometry.offsets
    result = g.new_zeros(g.shape[1], a.shape[1], offsets)
    for _, k, grad in _gradients(calls, geometry, before):
        rotated = grad if after is None else after[1].T @ grad @ after[0]
        result[:, :, k] += rotated.square_().sum(0)
    return result


def _gradients(
    calls: Sequence[Call],
    geometry: ConvGeometry | None,
    before: tuple[Tensor, Tensor] | None = None,
) -> Iterator[tuple[slice, int, Float[Tensor, "m o i"]]]:
    """Per-example gradients: which examples, which kernel offset, and their G[n][:, :, k].

    ``before`` are bases (Q_A, Q_S) to rotate inputs and output gradients into first.
    """
    a, g = calls[0]
    n, i, o = g.shape[0], a.shape[1], g.shape[1]
    # What one example takes: its gradient twice, and copies of its inputs and output gradients.
    size = 2 * o * i + 3 * sum(x[0].numel() + y[0].numel() for x, y in calls)
    step = max(1, _BUFFER_BYTES // (size * g.element_size()))
    for start in range(0, n, step):
        where = slice(start, start + step)
        part = [(x[where], y[where]) for x, y in calls]
        if before is not None:
            part = [(_rotate(x, before[0]), _rotate(y, before[1])) for x, y in part]
        taps = zip(*(_taps(x, geometry) for x, _ in part), strict=True)
        for k, inputs in enumerate(taps):
            grad = torch.bmm(part[0][1], inputs[0].transpose(1, 2))
            for (_, other), x in zip(part[1:], inputs[1:], strict=True):
                grad.baddbmm_(other, x.transpose(1, 2))
            yield where, k, grad


def _taps(a: Tensor, geometry: ConvGeometry | None) -> Iterator[Float[Tensor, "n i t"]]:
    if geometry is None:
        yield a
        return
    for tap in geometry.taps(a):
        yield tap.flatten(2)


def _rotate(x: Float[Tensor, "n c *size"], Q: Float[Tensor, "c c"]) -> Float[Tensor, "n c *size"]:
    """Qᵀ on the channel axis. It commutes with padding, whatever the padding's mode."""
    return torch.matmul(Q.T, x.flatten(2)).reshape(x.shape)
