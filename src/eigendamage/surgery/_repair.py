"""repair_model: refitting a smaller network to the original, layer by layer, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of
from eigendamage.curvature import Curvature, PositionDraws
from eigendamage.errors import DataError, EigenDamageError, MismatchError
from eigendamage.layers import (
    Layer,
    Sum,
    Trace,
    find_layers,
    find_sums,
    preserved_random_state,
    trace,
)
from eigendamage.progress import track
from eigendamage.seeds import check_seed
from eigendamage.surgery._lockstep import lockstep
from eigendamage.surgery._passes import Twins
from eigendamage.surgery._refit import LayerRepair, refit_of, refitted, stages_of


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


@torch.inference_mode(False)
def repair_model(
    small: nn.Module,
    original: nn.Module,
    data: Data,
    *,
    held_out: Data,
    curvature: Curvature | None = None,
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
    all their stages but a first 1×1, which stays. A layer whose output goes into a sum, as at the
    end of a residual block, also makes up for what the other summand has lost by then (He et al.
    2017, section 3.3). A refit is kept only if the error on held-out inputs falls. No labels and no
    gradients are needed. Batch norms keep their statistics. If anything fails, all weights are as
    they were.

    Args:
        small: the network to repair, made of the original by factoring layers and slicing channels.
        original: the network that it was made of. It is not touched.
        data: batches to fit on, in the same order in every pass.
        held_out: other batches, to judge by; likewise.
        curvature: of the original, for S. The identity takes its place where there is none, or
            where it has no layer.
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
        LayerError: if a layer does not run, fails, runs twice or out of turn on some batch.
    """
    check_seed(seed)
    if not (ridge >= 0 and positions >= 1):
        raise EigenDamageError(
            f"ridge is {ridge} and positions is {positions}; expected at least 0 and 1"
        )
    parts = [Batches(part, device_of(small)) for part in (data, held_out)]
    found, skipped = _selected(small, original, layers)
    with preserved_random_state():
        first = _first_batch(*parts)
        of_small = trace(small, {n: mine for n, (mine, _) in found.items()}, first, _nothing)
        of_original = trace(original, {n: its for n, (_, its) in found.items()}, first, _nothing)
    traces = {"small network": of_small, "original": of_original}
    skipped |= _not_once(found, traces)
    names = [name for name in of_small.layers if name not in skipped]
    sums = find_sums(original, names, first)
    tasks = {
        name: refit_of(
            *found[name], outputs.get(name), curvature, _scale(original, found[name][1], sums)
        )
        for name in names
    }
    twins = Twins(small, original, names, parts, sums)
    draws = PositionDraws(positions, seed)
    done: dict[str, LayerRepair] = {}
    before = [(p, p.detach().clone()) for t in tasks.values() for p in t.parameters()]
    with closing(lockstep(twins, list(traces.values()), max_memory)) as steps, torch.no_grad():
        try:
            for name, pairs in track(steps, "repair", total=len(names), enabled=progress):
                repaired = refitted(tasks[name], pairs, draws, ridge)
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
        elif any(getattr(stage, "groups", 1) > 1 for stage in stages_of(layer)):
            skipped[name] = "its depthwise stage is no regression of outputs on patches"
        else:
            found[name] = (layer, source)
    return found, skipped


def _scale(
    original: nn.Module, layer: Layer, sums: Mapping[str, Sum]
) -> Float[Tensor, " o"] | None:
    """What a layer's outputs are multiplied by on their way into a sum; None if there is none."""
    if layer.name not in sums:
        return None
    norm = sums[layer.name].norm
    weight = layer.dense_weight()
    scale = torch.ones(layer.outputs, dtype=torch.float64, device=weight.device)
    if norm is None:
        return scale
    module = original.get_submodule(norm)
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    assert module.running_var is not None
    scale = scale / (module.running_var.double() + module.eps).sqrt()
    return scale if module.affine is False else scale * module.weight.detach().double()


def _first_batch(data: Iterable[Batch], held_out: Iterable[Batch]) -> Batch:
    found: list[Batch] = []
    for what, part in (("data", data), ("held_out", held_out)):
        try:
            found.append(next(iter(part)))
        except DataError as error:
            raise DataError(
                f"{what} has no batch that a repair can take, which needs some to fit on and some "
                f"to judge by: {error}"
            ) from error
    return found[0]


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
