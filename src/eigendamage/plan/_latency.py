"""Milliseconds of layers as they were measured in every form, and what lies between."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from eigendamage.documents import Document, Frozen
from eigendamage.errors import MismatchError
from eigendamage.layers import DenseForm

LATENCY_VERSION = 1

TimedForm = Literal["dense", DenseForm]
"""A layer with channels removed (``dense``), or one of its factored forms."""
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1)]

Grids = Mapping[TimedForm, tuple[tuple[int, ...], tuple[int, ...]]]
"""For each form the ranks (r_o, r_i) to measure it at."""

# Of a side, beside the whole of it: few ranks are of use where stages multiply.
_FRACTIONS: dict[TimedForm, tuple[float, ...]] = {
    "dense": (1 / 4, 1 / 2, 3 / 4),
    "three": (1 / 8, 1 / 4, 1 / 2),
    "merge_in": (1 / 8, 1 / 4, 1 / 2, 3 / 4),
    "merge_out": (1 / 8, 1 / 4, 1 / 2, 3 / 4),
}


class Conditions(Frozen):
    """What a time depends on beside the layer.

    Attributes:
        device: name of the processor.
        torch: version of torch.
        threads: of torch, on the CPU.
        dtype: of the weights.
        memory_format: of images within the model.
        batch: examples a call.
    """

    device: str
    torch: str
    threads: int
    dtype: str
    memory_format: Literal["contiguous", "channels_last"]
    batch: int


class TimeGrid(Frozen):
    """Times of one form of a layer on a grid of ranks.

    Attributes:
        ranks_out: rising; of ``dense`` the outputs left, of ``merge_out`` all outputs alone.
        ranks_in: rising; of ``dense`` the inputs left, of ``merge_in`` all inputs alone.
        milliseconds: of one call, a row for each of ``ranks_out``.
    """

    ranks_out: tuple[Rank, ...]
    ranks_in: tuple[Rank, ...]
    milliseconds: tuple[tuple[Milliseconds, ...], ...]

    @model_validator(mode="after")
    def _is_a_grid(self) -> TimeGrid:
        for ranks in (self.ranks_out, self.ranks_in):
            if not ranks or any(a >= b for a, b in pairwise(ranks)):
                raise ValueError(f"the ranks of a grid must rise, found {ranks}")
        rows = [len(row) for row in self.milliseconds]
        if rows != [len(self.ranks_in)] * len(self.ranks_out):
            raise ValueError(
                f"{len(self.ranks_out)} rows of {len(self.ranks_in)} times are needed, found rows "
                f"of {rows}"
            )
        return self

    def covers(self, ranks_out: tuple[int, ...], ranks_in: tuple[int, ...]) -> bool:
        """Whether every point of another grid was measured."""
        return set(ranks_out) <= set(self.ranks_out) and set(ranks_in) <= set(self.ranks_in)

    def scaled(self, factor: float) -> TimeGrid:
        """The same grid with every time multiplied by one number."""
        times = tuple(tuple(ms * factor for ms in row) for row in self.milliseconds)
        return TimeGrid(ranks_out=self.ranks_out, ranks_in=self.ranks_in, milliseconds=times)

    def at(
        self, ranks_out: NDArray[np.integer[Any]], ranks_in: NDArray[np.integer[Any]]
    ) -> NDArray[np.float64]:
        """Milliseconds at any ranks, of the shape that both broadcast to.

        What was measured at the points of the grid, bilinear between them, which is exact for a
        device whose time is a sum of MACs and a constant: the MACs of each form are bilinear in
        its ranks. Outside the grid its edge.
        """
        low_out, high_out, down = _between(self.ranks_out, ranks_out)
        low_in, high_in, across = _between(self.ranks_in, ranks_in)
        ms = np.asarray(self.milliseconds)
        upper = (1 - across) * ms[low_out, low_in] + across * ms[low_out, high_in]
        lower = (1 - across) * ms[high_out, low_in] + across * ms[high_out, high_in]
        return np.asarray((1 - down) * upper + down * lower)


FormTimes = Mapping[TimedForm, TimeGrid]
"""The grid of each form that one kind of layer was measured in."""


class TimedLayer(Frozen):
    """A layer of the model.

    Attributes:
        milliseconds: of the layer as it is, over all its calls in a forward pass.
        calls: for each of these calls the key of its times.
    """

    milliseconds: Milliseconds
    calls: Annotated[tuple[str, ...], Field(min_length=1)]


class LatencyTable(Document):
    """How long the layers of a model take in every form, on one device.

    Nothing is smoothed: where fewer ranks took longer, the table says so.

    Attributes:
        conditions: where and how it was measured.
        whole: milliseconds of a forward pass of the model as it is.
        layers: what is known of each layer, by dotted path.
        entries: times by a key that says all that a layer's time depends on; layers of the same
            sizes share one.
    """

    version: Literal[1] = LATENCY_VERSION
    conditions: Conditions
    whole: Milliseconds
    layers: Mapping[str, TimedLayer]
    entries: Mapping[str, FormTimes]

    @model_validator(mode="after")
    def _is_complete(self) -> LatencyTable:
        for name, layer in self.layers.items():
            missing = [key for key in layer.calls if key not in self.entries]
            if missing:
                raise ValueError(f"layer '{name}' has no times: '{missing[0]}' is missing")
        return self

    @property
    def rest(self) -> float:
        """Milliseconds that no plan can change: the whole without the layers as they are.

        At least 0: alone a layer can take longer than between the others.
        """
        return max(0.0, self.whole - sum(layer.milliseconds for layer in self.layers.values()))

    @property
    def summed(self) -> float:
        """The rest and all layers as they are: what times of plans are to be held against."""
        return self.rest + sum(layer.milliseconds for layer in self.layers.values())

    def as_it_is(self, name: str) -> float:
        """Time of a layer as it is, over all its calls in a forward pass.

        Raises:
            MismatchError: if the table has no such layer.
        """
        if name not in self.layers:
            raise MismatchError(f"layer '{name}' is not in the table of latencies; measure it anew")
        return self.layers[name].milliseconds

    def milliseconds(self, name: str, form: TimedForm, rank_out: int, rank_in: int) -> float:
        """Time of one layer in a form, over all its calls in a forward pass.

        Args:
            name: dotted path.
            form: ``dense`` for a layer with channels removed, or a factored form.
            rank_out: r_o, or outputs left; of no effect for ``merge_out``.
            rank_in: r_i, or inputs left; of no effect for ``merge_in``.

        Raises:
            MismatchError: if the layer, or the layer in that form, was not measured.
        """
        return float(self.milliseconds_at(name, form, np.array(rank_out), np.array(rank_in)))

    def milliseconds_at(
        self,
        name: str,
        form: TimedForm,
        ranks_out: NDArray[np.integer[Any]],
        ranks_in: NDArray[np.integer[Any]],
    ) -> NDArray[np.float64]:
        """`milliseconds` for many ranks, of the shape that both arrays broadcast to.

        Raises:
            MismatchError: if the layer, or the layer in that form, was not measured.
        """
        if name not in self.layers:
            known = ", ".join(list(self.layers)[:6])
            raise MismatchError(
                f"the latency table has no layer '{name}', it has {known or 'none'}; measure it "
                f"again with that layer"
            )
        grids: list[TimeGrid] = []
        for key in self.layers[name].calls:
            forms = self.entries[key]
            if form not in forms:
                raise MismatchError(
                    f"layer '{name}' was not measured in the form '{form}', but in "
                    f"{', '.join(forms)}; plan one of these"
                )
            grids.append(forms[form])
        return np.asarray(np.stack([grid.at(ranks_out, ranks_in) for grid in grids]).sum(axis=0))


def grids_to_measure(outputs: int, inputs: int, offsets: int, multiple: int) -> Grids:
    """Where to measure the forms of a layer.

    Without a kernel one factored form is as good as all, so only ``merge_in`` is named.

    Args:
        outputs: o.
        inputs: i.
        offsets: K.
        multiple: what ranks are a multiple of; a quarter of a side narrower than twice that.
    """

    def side(size: int, form: TimedForm) -> tuple[int, ...]:
        step = multiple if size >= 2 * multiple else max(1, size // 4)
        ranks = (max(1, round(part * size / step)) * step for part in _FRACTIONS[form])
        return (*sorted({rank for rank in ranks if rank < size}), size)

    grids: dict[TimedForm, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "dense": (side(outputs, "dense"), side(inputs, "dense")),
        "merge_in": (side(outputs, "merge_in"), (inputs,)),
    }
    if offsets > 1:
        grids["merge_out"] = ((outputs,), side(inputs, "merge_out"))
        grids["three"] = (side(outputs, "three"), side(inputs, "three"))
    return grids


def _between(
    points: tuple[int, ...], ranks: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """For each rank the points below and above it, and how far it is from the one to the other."""
    last = len(points) - 1
    where = np.interp(ranks, points, np.arange(last + 1))
    low = np.asarray(np.floor(where), dtype=np.intp)  # numpy makes scalars of arrays without axes
    return low, np.asarray(np.minimum(low + 1, last)), np.asarray(where - low)
