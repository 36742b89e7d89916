"""Latency on the device at hand of layers in every form that a plan can give them."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Data
from eigendamage.calls import call, device_of
from eigendamage.errors import LayerError
from eigendamage.layers import Layer, find_layers
from eigendamage.measure._latency_cache import cache_file, store, stored
from eigendamage.measure._timing import (
    Call,
    as_deployed,
    at_least_one,
    checked_call,
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

MemoryFormat = Literal["contiguous", "channels_last"]

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

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
        sites = _sites(model, layers, examples)
        every = [site for found in sites.values() for site in found]
        conditions = _conditions(device, every, batch)
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


@dataclass(frozen=True, eq=False)
class _Site:
    """One call of a layer in a forward pass.

    Attributes:
        layer: the layer.
        shape: of its input.
        channels_last: whether its input or its weight is.
    """

    layer: Layer
    shape: tuple[int, ...]
    channels_last: bool

    @property
    def key(self) -> str:
        """All that its time depends on beside the conditions."""
        one = self.layer
        return (
            f"outputs={one.outputs} inputs={one.inputs} bias={one.bias() is not None} "
            f"input={self.shape} {one.geometry or 'Linear'}"
        )

    def inputs(self, channels: int, memory_format: MemoryFormat) -> Tensor:
        """Random inputs with that many channels or features."""
        shape = list(self.shape)
        shape[-1 if self.layer.geometry is None else -3] = channels
        weight = next(self.layer.module.parameters())
        x = torch.randn(shape).to(weight)
        return x.to(memory_format=_FORMATS[memory_format]) if x.ndim == 4 else x


def _sites(
    model: nn.Module, wanted: Mapping[str, Layer] | None, examples: Batch
) -> dict[str, list[_Site]]:
    """The calls of each layer in one forward pass; None stands for all layers that run."""
    layers = find_layers(model).compressible if wanted is None else wanted
    found: dict[str, list[_Site]] = {name: [] for name in layers}

    def watch(name: str, layer: Layer) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            last = any(map(_is_channels_last, (x, *layer.module.parameters())))
            found[name].append(_Site(layer, tuple(x.shape), last))

        return hook

    handles = [
        layer.module.register_forward_pre_hook(watch(name, layer), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        checked_call(model, examples)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, sites in found.items() if not sites]
    if wanted is not None and silent:
        raise LayerError(silent[0], "it does not run on the data given; leave it out of `layers`")
    return {name: sites for name, sites in found.items() if sites}


def _is_channels_last(x: Tensor) -> bool:
    return (
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    )


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
    new.to(memory_format=_FORMATS[memory_format])  # pyright: ignore[reportCallIssue]
    return new.eval()


def _covers(times: FormTimes, grids: Grids) -> bool:
    return all(form in times and times[form].covers(*grid) for form, grid in grids.items())


def _measured(site: _Site, grids: Grids, rounds: int, memory_format: MemoryFormat) -> FormTimes:
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


def _conditions(device: torch.device, sites: Sequence[_Site], batch: int) -> Conditions:
    """Where and how the layers run.

    Raises:
        LayerError: if they are not all of one dtype.
    """
    dtypes = {site.layer.name: next(site.layer.module.parameters()).dtype for site in sites}
    first = next(iter(dtypes.values()), torch.get_default_dtype())
    for name, dtype in dtypes.items():
        if dtype != first:
            raise LayerError(
                name, f"it is of {dtype}, the first layer of {first}; measure one dtype at a time"
            )
    autocast = torch.is_autocast_enabled(device.type)
    return Conditions(
        device=_device_name(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        dtype=str(torch.get_autocast_dtype(device.type) if autocast else first).split(".")[-1],
        memory_format="channels_last" if any(s.channels_last for s in sites) else "contiguous",
        batch=batch,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = f"{device.type} {platform.processor() or platform.machine()}"
    if device.type != "cpu":
        return name
    with suppress(OSError):  # Linux alone has it
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            name = model[1].strip()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def _table(
    model: nn.Module,
    examples: Batch,
    sites: Mapping[str, Sequence[_Site]],
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
