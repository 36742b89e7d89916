"""repair_model: refitting a smaller network to the original, layer by layer, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendamage.batches import Batch
from eigendamage.curvature import Curvature, PositionDraws
from eigendamage.errors import DataError, EigenDamageError, MismatchError, NonFiniteError
from eigendamage.layers import (
    ConvGeometry,
    FactoredConv2d,
    FactoredLinear,
    Layer,
    Trace,
    balance,
    find_layers,
    preserved_random_state,
    trace,
)
from eigendamage.progress import track
from eigendamage.surgery._lockstep import Pair, Twins, lockstep
from eigendamage.surgery._regression import Fit, Moments, error, layer_moments, regress

# Sums of products err by about this many units in the last place of what was summed.
_ROUNDING_UNITS = 8
_FIT, _HELD_OUT = 0, 1


@dataclass(frozen=True)
class LayerRepair:
    """What the refit of one layer did, on held-out inputs.

    The error is E (y − ŷ)ᵀ S (y − ŷ) over examples and positions, with y the original's output and
    ŷ the smaller network's, relative to the spread of y, tr S cov(y); S is the identity if unknown.

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


@dataclass(frozen=True, eq=False)
class Repairs(Mapping[str, LayerRepair]):
    """What was repaired: a mapping from dotted path to `LayerRepair`.

    Attributes:
        layers: the layers that a refit was tried for, in the order in which they run.
        skipped: the reason for every other layer that was asked for.
    """

    layers: Mapping[str, LayerRepair]
    skipped: Mapping[str, str]

    def __getitem__(self, name: str) -> LayerRepair:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def repair_model(
    small: nn.Module,
    original: nn.Module,
    data: Iterable[Batch],
    *,
    held_out: Iterable[Batch],
    curvature: Curvature | None,
    layers: Sequence[str] | None = None,
    outputs: Mapping[str, Sequence[int]] = {},
    ridge: float = 1e-3,
    positions: int = 64,
    max_memory: int = 4 * 2**30,
    seed: int = 0,
    progress: bool = True,
) -> Repairs:
    """Refit the layers of a smaller network, in place, to return what the original's return.

    In the order in which they run, each layer becomes the least-squares solution from what the
    network, repaired up to there, feeds it to what the original's layer returned (response
    reconstruction, Zhang et al. 2015); factored layers by reduced-rank regression in the metric S,
    all their stages but a first 1×1, which stays. A refit is kept only if the error on held-out
    inputs falls. No labels and no gradients are needed. Batch norms keep their statistics. If
    anything fails, all weights are as they were.

    Args:
        small: the network to repair, made of the original by factoring layers and slicing channels.
        original: the network that it was made of. It is not touched.
        data: batches to fit on, on the networks' device; can be gone through several times.
        held_out: other batches, to judge by; likewise.
        curvature: of the original, for S. The identity takes its place where it has no layer.
        layers: dotted paths of the layers to repair; all compressible ones by default.
        outputs: for layers that lost outputs the indices of those that are left.
        ridge: how much a layer is drawn to the weights that it has, relative to the mean variance
            of its inputs.
        positions: the most output positions of an example that are read, drawn uniformly.
        max_memory: bytes of activations that may be in memory at once. If it is enough, each
            network runs once over the data; if not, once a layer.
        seed: of the draws of positions.
        progress: whether to show progress.

    Raises:
        DataError: if there is no batch to fit on, or none to judge by.
        MismatchError: if a layer is unknown, or its outputs are not those of the original.
        NonFiniteError: if a layer reads or returns a NaN or an infinity.
        LayerError: if a layer does not run, runs twice or out of turn on some batch.
    """
    if not (ridge >= 0 and positions >= 1):
        raise EigenDamageError(
            f"ridge is {ridge} and positions is {positions}; expected at least 0 and 1"
        )
    # What can be gone through only once is kept: its first batch is looked at beforehand.
    parts = [list(p) if isinstance(p, Iterator) else p for p in (data, held_out)]
    found, skipped = _selected(small, original, layers)
    with preserved_random_state():
        first = _first_batch(*parts)
        of_small = trace(small, {n: mine for n, (mine, _) in found.items()}, first, _nothing)
        of_original = trace(original, {n: its for n, (_, its) in found.items()}, first, _nothing)
    traces = {"small network": of_small, "original": of_original}
    skipped |= _not_once(found, traces)
    names = [name for name in of_small.layers if name not in skipped]
    tasks = {name: _task(*found[name], outputs.get(name), curvature) for name in names}
    twins = Twins(small, original, names, parts)
    draws = PositionDraws(positions, seed)
    done: dict[str, LayerRepair] = {}
    before = [(p, p.detach().clone()) for t in tasks.values() for p in t.parameters()]
    with closing(lockstep(twins, list(traces.values()), max_memory)) as steps, torch.no_grad():
        try:
            for name, pairs in track(steps, "repair", total=len(names), enabled=progress):
                repaired = _repair(tasks[name], pairs, draws, ridge)
                if isinstance(repaired, str):
                    skipped[name] = repaired
                else:
                    done[name] = repaired
        except BaseException:
            for parameter, value in before:
                parameter.copy_(value)
            raise
        finally:
            torch.clear_autocast_cache()  # it may hold weights as they were
    return Repairs(done, skipped)


def _selected(
    small: nn.Module, original: nn.Module, wanted: Sequence[str] | None
) -> tuple[dict[str, tuple[Layer, Layer]], dict[str, str]]:
    """The wanted layers of both networks, and why some of them cannot be repaired."""
    mine, theirs = find_layers(small), find_layers(original)
    found: dict[str, tuple[Layer, Layer]] = {}
    skipped: dict[str, str] = {}
    for name in mine.compressible if wanted is None else wanted:
        layer, source = mine.compressible.get(name), theirs.compressible.get(name)
        if layer is None and name not in mine.left_alone:
            raise MismatchError(f"layers= names '{name}', which the small network has not")
        if layer is None:
            skipped[name] = mine.left_alone[name]
        elif source is None:
            why = theirs.left_alone.get(name, "there is no such layer")
            skipped[name] = f"in the original: {why}"
        elif any(getattr(stage, "groups", 1) > 1 for stage in _stages(layer)):
            skipped[name] = "its depthwise stage is no regression of outputs on patches"
        else:
            found[name] = (layer, source)
    return found, skipped


def _stages(layer: Layer) -> tuple[nn.Conv2d | nn.Linear, ...]:
    module = layer.module
    factored = isinstance(module, FactoredConv2d | FactoredLinear)
    parts = list(module) if factored else [module]
    return tuple(cast("list[nn.Conv2d | nn.Linear]", parts))


def _first_batch(data: Iterable[Batch], held_out: Iterable[Batch]) -> Batch:
    first, other = next(iter(data), None), next(iter(held_out), None)
    if first is None or other is None:
        missing = "data" if first is None else "held_out"
        raise DataError(
            f"{missing} has no batch; a repair needs some to fit on and some to judge by"
        )
    return first


def _nothing(_output: object) -> list[Tensor]:
    """Of a model's output: it is not looked at."""
    return []


def _not_once(found: Iterable[str], traces: Mapping[str, Trace]) -> dict[str, str]:
    """Why layers cannot be repaired that do not run exactly once in both networks."""
    reasons: dict[str, str] = {}
    for name in found:
        for whose, traced in traces.items():
            calls = traced.layers[name].calls if name in traced.layers else 0
            if calls != 1:
                reasons[name] = f"it runs {calls} times in a forward pass of the {whose}, not once"
    return reasons


@dataclass(frozen=True, eq=False)
class _Task:
    """One layer to refit.

    Attributes:
        name: its dotted path.
        stages: all its stages, first to last; itself if it is not factored.
        start: the first stage that is refitted, together with all after it, of which there is at
            most one.
        kept: indices of the original's outputs that it still has; None for all.
        S: the metric of those outputs; None for the identity.
    """

    name: str
    stages: tuple[nn.Conv2d | nn.Linear, ...]
    start: int
    kept: Int[Tensor, " o"] | None
    S: Float[Tensor, "o o"] | None

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
        """Of one batch, at no more positions than are to be drawn."""
        x = pair.x
        for stage in self.stages[: self.start]:
            x = stage(x)
        x, y = (v if v.dtype == torch.float64 else v.float() for v in (x, pair.y))
        x, y = (x, y.flatten(2)) if self.geometry is not None else (_tokens(x), _tokens(y))
        y = y if self.kept is None else y.index_select(1, self.kept)
        at = draws.draw(self.name, len(y), y.shape[2])
        return layer_moments(x, y, self.geometry, at, name=self.name)


def _tokens(x: Float[Tensor, "*lead c"]) -> Float[Tensor, "n c t"]:
    """A Linear layer's input or output; every leading axis after the first is a position."""
    rows = x.unsqueeze(0) if x.ndim == 1 else x
    return rows.reshape(len(rows), -1, rows.shape[-1]).transpose(1, 2)


def _task(
    layer: Layer, source: Layer, kept: Sequence[int] | None, curvature: Curvature | None
) -> _Task:
    """Check that a layer's outputs are the original's, and find what of it is refitted."""
    name, device = layer.name, layer.dense_weight().device
    left = range(source.outputs) if kept is None else kept
    if len(left) != layer.outputs or not set(left) <= set(range(source.outputs)):
        raise MismatchError(
            f"layer '{name}' has {layer.outputs} outputs, the original's {source.outputs}, and "
            f"outputs= names {'all' if kept is None else len(left)} of them; give the indices "
            f"that were kept"
        )
    index = None if kept is None else torch.tensor(list(left), device=device)
    stages = _stages(layer)
    last = stages[-1]
    geometry = ConvGeometry.of(last) if isinstance(last, nn.Conv2d) else None
    mixes = geometry is None or (geometry.is_pointwise and geometry.stride == (1, 1))
    start = max(0, len(stages) - (2 if mixes else 1))
    return _Task(name, stages, start, index, _metric(source, index, curvature))


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


def _repair(
    task: _Task, pairs: Iterable[Pair], draws: PositionDraws, ridge: float
) -> LayerRepair | str:
    """Refit one layer and keep it if that helps; why it cannot be judged otherwise."""
    sums: list[Moments | None] = [None, None]
    for pair in pairs:
        moments, known = task.moments(pair, draws), sums[pair.part]
        sums[pair.part] = moments if known is None else known + moments
    seen, held = sums[_FIT], sums[_HELD_OUT]
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
