"""Latency on the device at hand of layers in every form that a plan can give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eigendamage.batch import Batch
from eigendamage.batches import Data
from eigendamage.calls import call, device_of
from eigendamage.layers import Layer
from eigendamage.measure._latency_cache import cache_file, store, stored
from eigendamage.measure._sites import FORMATS, MemoryFormat, Site, conditions_of, sites_of
from eigendamage.measure._timing import (
    Call,
    as_deployed,
    at_least_one,
    examples_of,
    samples_of,
)
from eigendamage.plan import LatencyTable
from eigendamage.plan._latency import (
    Conditions,
    FormTimes,
    Grids,
    TimedForm,
    TimedLayer,
    TimeGrid,
    grids_to_measure,
)
from eigendamage.progress import track
from eigendamage.surgery._factor import factored_module

_GROUP_SECONDS = 1.5  # a group of layers that takes longer gets fewer rounds
_TABLE_SECONDS = 4.0  # the same for the whole model and its layers


def measure_latency_table(
    model: nn.Module,
    data: Data,
    *,
    layers: Mapping[str, Layer] | None = None,
    batch: int = 1,
    multiple: int = 8,
    cache: Path | None = None,
    rounds: int = 25,
    progress: bool = True,
) -> LatencyTable:
    """Time every layer of a model in every form, on a grid of ranks, with random weights.

    All forms of layers of one shape take turns, so their ratios hold whatever else the machine
    does. In the end the dense layers take turns with the whole model, and each grid is scaled to
    what its layer took then, so that the sum of layers and rest holds too. What runs between the
    layers (batch norm, activations, sums) belongs to the rest.

    The machine should do nothing else meanwhile: long calls are interrupted more often than short
    ones, and then neither ratios nor rest are what they are on a quiet machine.

    Args:
        model: on the device that is asked about. It runs in eval mode and is left as it was.
        data: its first batch gives the inputs, which have to be tensors.
        layers: of the model, as `find_layers` lists them, of one dtype; by default all that run on
            the data.
        batch: examples a call.
        multiple: what the ranks to measure are multiples of.
        cache: folder in which times of layers outlive the process, a file for each device, torch
            version, number of threads, dtype, memory format and batch; by default
            ``EIGENDAMAGE_CACHE``, else ``eigendamage`` in the user's cache folder. Where it cannot
            be written, nothing is kept; a file there that is not what it should be is not read.
        rounds: samples of each point; slow layers get fewer, but not below 5.
        progress: whether to show progress.

    Raises:
        LayerError: if a layer does not run on the data, or is of another dtype than the others.
        DataError: if the data has no such batch, or the model cannot run on it.
        EigenDamageError: if ``rounds`` or ``multiple`` is less than 1.
    """
    at_least_one("multiple", multiple)
    device = device_of(model)
    examples = examples_of(data, batch, device)
    with as_deployed([model]):
        sites = sites_of(model, layers, examples)
        every = [site for found in sites.values() for site in found]
        conditions = conditions_of(device, every, batch)
        distinct = {site.key: site for site in every}
        file = cache_file(cache, conditions)
        entries: dict[str, FormTimes] = {}
        for key, site in track(
            distinct.items(), "timing layers", total=len(distinct), enabled=progress
        ):
            grids = grids_to_measure(
                site.layer.outputs, site.layer.inputs, site.layer.offsets, multiple
            )
            times = stored(file, conditions).get(key, {})
            if not _covers(times, grids):
                times = _measured(site, grids, rounds, conditions.memory_format)
                store(file, conditions, key, times)
            entries[key] = times
        return _table(model, examples, sites, entries, conditions, rounds)


def _variant(
    layer: Layer, form: TimedForm, rank_out: int, rank_in: int, memory_format: MemoryFormat
) -> nn.Module:
    """What a plan would put in the place of a layer, with random weights."""
    if form == "dense":
        return _dense(layer, rank_out, rank_in, memory_format)
    o, i, K = layer.outputs, layer.inputs, layer.offsets
    shapes: dict[TimedForm, list[tuple[int, ...]]] = {
        "three": [(rank_in, i), (rank_out, rank_in, K), (o, rank_out)],
        "merge_in": [(rank_out, i, K), (o, rank_out)],
        "merge_out": [(rank_in, i), (o, rank_in, K)],
    }
    dense = replace(layer, module=_dense(layer, o, i, memory_format))
    return factored_module(dense, [torch.randn(shape) for shape in shapes[form]])


def _dense(layer: Layer, outputs: int, inputs: int, memory_format: MemoryFormat) -> nn.Module:
    """A layer of its kind with other numbers of outputs and inputs."""
    bias, geometry = layer.bias() is not None, layer.geometry
    if geometry is None:
        new: nn.Module = nn.Linear(inputs, outputs, bias=bias)
    else:
        (top, bottom), (left, right) = geometry.padding
        new = nn.Conv2d(
            inputs,
            outputs,
            geometry.kernel,
            geometry.stride,
            padding=(top, left) if (top, left) == (bottom, right) else "same",
            dilation=geometry.dilation,
            padding_mode=geometry.padding_mode,  # pyright: ignore[reportArgumentType]
            bias=bias,
        )
    weight = next(layer.module.parameters())
    new.to(weight.device, weight.dtype)
    new.to(memory_format=FORMATS[memory_format])  # pyright: ignore[reportCallIssue]
    return new.eval()


def _covers(times: FormTimes, grids: Grids) -> bool:
    return all(form in times and times[form].covers(*grid) for form, grid in grids.items())


def _measured(site: Site, grids: Grids, rounds: int, memory_format: MemoryFormat) -> FormTimes:
    """Every form of a layer at every point of its grid, all taking turns."""
    points: list[tuple[TimedForm, int, int]] = [
        (form, out, into) for form, (o, i) in grids.items() for out in o for into in i
    ]
    inputs = {size: site.inputs(size, memory_format) for size in grids["dense"][1]}
    calls = [
        partial(
            _variant(site.layer, form, out, into, memory_format),
            inputs[into if form == "dense" else site.layer.inputs],
        )
        for form, out, into in points
    ]
    device = next(iter(inputs.values())).device
    times = np.median(samples_of(calls, device, rounds, max_seconds=_GROUP_SECONDS), axis=0)
    at = {point: float(ms) for point, ms in zip(points, times, strict=True)}
    return {
        form: TimeGrid(
            ranks_out=o,
            ranks_in=i,
            milliseconds=tuple(tuple(at[form, out, into] for into in i) for out in o),
        )
        for form, (o, i) in grids.items()
    }


def _table(
    model: nn.Module,
    examples: Batch,
    sites: Mapping[str, Sequence[Site]],
    entries: Mapping[str, FormTimes],
    conditions: Conditions,
    rounds: int,
) -> LatencyTable:
    """The table, with the times of all layers at the speed at which the whole model ran.

    The whole model, each dense layer and each layer that is factored already take turns.
    """
    memory_format = conditions.memory_format
    distinct = {site.key: site for found in sites.values() for site in found}
    factored = [
        site
        for found in sites.values()
        for site in found
        if not isinstance(site.layer.module, nn.Linear | nn.Conv2d)
    ]
    calls: list[Call] = [partial(call, model, examples)]
    for site in distinct.values():
        dense = _dense(site.layer, site.layer.outputs, site.layer.inputs, memory_format)
        calls.append(partial(dense, site.inputs(site.layer.inputs, memory_format)))
    for site in factored:
        x = site.inputs(site.layer.inputs, memory_format)
        calls.append(partial(site.layer.module, x))
    samples = samples_of(calls, device_of(model), rounds, max_seconds=_TABLE_SECONDS)
    whole, *times = (float(ms) for ms in np.median(samples, axis=0))
    now = dict(zip(distinct, times, strict=False))
    as_it_is = dict(zip(factored, times[len(distinct) :], strict=True))
    scaled: dict[str, FormTimes] = {}
    for key, forms in entries.items():
        dense_then = forms["dense"].milliseconds[-1][-1]
        scaled[key] = {form: grid.scaled(now[key] / dense_then) for form, grid in forms.items()}
    layers = {
        name: TimedLayer(
            milliseconds=sum(as_it_is.get(site, now[site.key]) for site in found),
            calls=tuple(site.key for site in found),
        )
        for name, found in sites.items()
    }
    return LatencyTable(conditions=conditions, whole=whole, layers=layers, entries=scaled)
