"""One layer of a smaller network, refitted to return what the original's layer returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendamage.curvature import Curvature, PositionDraws
from eigendamage.errors import MismatchError, NonFiniteError
from eigendamage.layers import ConvGeometry, FactoredConv2d, FactoredLinear, Layer, balance
from eigendamage.surgery._lockstep import Pair
from eigendamage.surgery._regression import Fit, Moments, error, layer_moments, regress

# Sums of products err by about this many units in the last place of what was summed.
_ROUNDING_UNITS = 8
# Of the largest scale of a batch norm. To make up for an error through a channel of a smaller one
# takes weights that dwarf all others, and what they do is undone by the first training step.
_VISIBLE = 1e-2
FIT, HELD_OUT = 0, 1
"""Which part of the data a batch is of."""


@dataclass(frozen=True)
class LayerRepair:
    """What the refit of one layer did, on held-out inputs.

    The error is E (y − ŷ)ᵀ S (y − ŷ) over examples and positions, with y what the layer should
    return, the original's output and what is missing elsewhere in the sum that it goes into, and ŷ
    what it returns, relative to the spread of y, tr S cov(y); S is the identity if unknown.

    Attributes:
        before: the error with the weights as they were, and all layers before repaired.
        after: the error with the refitted weights.
        accepted: whether the refitted weights were kept.
        reason: why not; None if they were.
    """

    before: float
    after: float
    accepted: bool
    reason: str | None


def stages_of(layer: Layer) -> tuple[nn.Conv2d | nn.Linear, ...]:
    module = layer.module
    factored = isinstance(module, FactoredConv2d | FactoredLinear)
    parts = list(module) if factored else [module]
    return tuple(cast("list[nn.Conv2d | nn.Linear]", parts))


@dataclass(frozen=True, eq=False)
class Refit:
    """One layer to refit.

    Attributes:
        name: its dotted path.
        stages: all its stages, first to last; itself if it is not factored.
        start: the first stage that is refitted, together with all after it, of which there is at
            most one.
        kept: indices of the original's outputs that it still has; None for all.
        S: the metric of those outputs; None for the identity.
        unscaled: (o,), what turns a change of the sum that the outputs go into to one of the
            outputs; None where they go into none.
    """

    name: str
    stages: tuple[nn.Conv2d | nn.Linear, ...]
    start: int
    kept: Int[Tensor, " o"] | None
    S: Float[Tensor, "o o"] | None
    unscaled: Float[Tensor, " o"] | None

    @property
    def geometry(self) -> ConvGeometry | None:
        core = self.stages[self.start]
        return ConvGeometry.of(core) if isinstance(core, nn.Conv2d) else None

    @property
    def rank(self) -> int | None:
        """What passes between two stages that are refitted; None if it is one."""
        refitted = self.stages[self.start :]
        return len(refitted[0].weight) if len(refitted) == 2 else None

    @property
    def bias(self) -> Tensor | None:
        return self.stages[-1].bias

    def parameters(self) -> Iterator[nn.Parameter]:
        for stage in self.stages:
            yield from stage.parameters()

    def V(self) -> Float[Tensor, "o m"]:
        """What the refitted stages do to a patch, in float64."""
        first, *rest = (s.weight.detach().double().flatten(1) for s in self.stages[self.start :])
        return rest[0] @ first if rest else first

    def write(self, fit: Fit) -> None:
        """Put a fit in place, all stages scaled to equal norms so that they train."""
        new = [fit.V] if fit.U is None or fit.core is None else [fit.core, fit.U]
        staying = [s.weight.detach().double() for s in self.stages[: self.start]]
        for stage, weight in zip(self.stages, balance([*staying, *new]), strict=True):
            stage.weight.copy_(weight.reshape(stage.weight.shape))
        if self.bias is not None and fit.bias is not None:
            self.bias.copy_(fit.bias)

    def moments(self, pair: Pair, draws: PositionDraws) -> Moments:
        """Of one batch, at no more positions than are to be drawn, none of them padded tokens."""
        x = pair.x
        for stage in self.stages[: self.start]:
            x = stage(x)
        x = _wide(x) if self.geometry is not None else self._rows(x)
        y = self._left(pair.y)
        if pair.others is not None and self.unscaled is not None:
            mine, theirs = self._rows(pair.others[0]), self._left(pair.others[1])
            y = y + self.unscaled.to(y)[:, None] * (theirs - mine)
        counted = pair.counted
        if counted is not None and self.geometry is None and counted.shape[1] == y.shape[2]:
            places = draws.draw_counted(self.name, counted)
            x, y = (v.transpose(1, 2).flatten(0, 1)[places].T.unsqueeze(0) for v in (x, y))
            return layer_moments(x, y, None, None, name=self.name)
        at = draws.draw(self.name, len(y), y.shape[2])
        return layer_moments(x, y, self.geometry, at, name=self.name)

    def _rows(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "n c t"]:
        return _wide(x).flatten(2) if self.geometry is not None else _tokens(_wide(x))

    def _left(self, y: Float[Tensor, "*shape"]) -> Float[Tensor, "n o t"]:
        """Of the original's channels those that are left."""
        return self._rows(y) if self.kept is None else self._rows(y).index_select(1, self.kept)


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype == torch.float64 else x.float()


def _tokens(x: Float[Tensor, "*lead c"]) -> Float[Tensor, "n c t"]:
    """A Linear layer's input or output; every leading axis after the first is a position."""
    rows = x.unsqueeze(0) if x.ndim == 1 else x
    return rows.reshape(len(rows), -1, rows.shape[-1]).transpose(1, 2)


def refit_of(
    layer: Layer,
    source: Layer,
    kept: Sequence[int] | None,
    curvature: Curvature | None,
    scale: Float[Tensor, " o"] | None,
) -> Refit:
    """Check that a layer's outputs are the original's, and find what of it is refitted.

    Args:
        layer: of the small network.
        source: the original's.
        kept: indices of the original's outputs that are left; None for all.
        curvature: of the original, for S.
        scale: what the original's outputs are multiplied by on their way into a sum; None if they
            go into none.
    """
    name, device = layer.name, layer.dense_weight().device
    left = range(source.outputs) if kept is None else kept
    if len(left) != layer.outputs or not set(left) <= set(range(source.outputs)):
        raise MismatchError(
            f"layer '{name}' has {layer.outputs} outputs, the original's {source.outputs}, and "
            f"outputs= names {'all' if kept is None else len(left)} of them; give the indices "
            f"that were kept"
        )
    index = None if kept is None else torch.tensor(list(left), device=device)
    stages = stages_of(layer)
    last = stages[-1]
    geometry = ConvGeometry.of(last) if isinstance(last, nn.Conv2d) else None
    mixes = geometry is None or (geometry.is_pointwise and geometry.stride == (1, 1))
    start = max(0, len(stages) - (2 if mixes else 1))
    unscaled = None if scale is None else _inverse(scale)
    if unscaled is not None and index is not None:
        unscaled = unscaled[index]
    return Refit(name, stages, start, index, _metric(source, index, curvature), unscaled)


def _inverse(scale: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
    """One over each channel's scale, and zero for channels that hardly get through."""
    visible = scale.abs() > _VISIBLE * scale.abs().max()
    return torch.where(visible, 1 / scale, torch.zeros_like(scale))


def _metric(
    source: Layer, kept: Int[Tensor, " k"] | None, curvature: Curvature | None
) -> Float[Tensor, "k k"] | None:
    """S of the outputs that are left; None where it is unknown or sees nothing."""
    if curvature is None or source.name not in curvature:
        return None
    S = curvature[source.name].S
    if len(S) != source.outputs:
        raise MismatchError(
            f"layer '{source.name}' of the original has {source.outputs} outputs, the curvature "
            f"is for {len(S)}"
        )
    metric = S.to(source.dense_weight().device, torch.float64)
    metric = metric if kept is None else metric[kept][:, kept]
    return metric if bool(metric.any()) else None


def refitted(
    task: Refit, pairs: Iterable[Pair], draws: PositionDraws, ridge: float
) -> LayerRepair | str:
    """Refit one layer and keep it if that helps; why it cannot be judged otherwise."""
    sums: list[Moments | None] = [None, None]
    for pair in pairs:
        moments, known = task.moments(pair, draws), sums[pair.part]
        sums[pair.part] = moments if known is None else known + moments
    seen, held = sums[FIT], sums[HELD_OUT]
    assert seen is not None
    assert held is not None
    if not (seen.is_finite() and held.is_finite()):
        raise NonFiniteError(
            f"layer '{task.name}': its inputs or the original's outputs hold NaN or infinite "
            f"values; run both networks in float32, and check that they run well before a repair"
        )
    V0 = task.V()
    raw = error(held, torch.zeros_like(V0), None, task.S)
    spread = error(held, torch.zeros_like(V0), held.y / held.count, task.S)
    wide = torch.float64 if task.stages[0].weight.dtype == torch.float64 else torch.float32
    rounding = _ROUNDING_UNITS * torch.finfo(wide).eps * raw
    if spread <= rounding:
        return "the original's layer returns the same for all held-out inputs; give more of them"
    bias = task.bias
    before = error(held, V0, bias, task.S)
    if before <= rounding:
        same = "it returns what the original's layer does, to rounding"
        return LayerRepair(before / spread, before / spread, False, same)
    fit = regress(seen, V0, task.S, task.rank, ridge, bias is not None)
    after = error(held, fit.V, fit.bias, task.S)
    if not after < before:
        worse = "the error on held-out inputs would not fall"
        return LayerRepair(before / spread, after / spread, False, worse)
    task.write(fit)
    return LayerRepair(before / spread, after / spread, True, None)
