"""Where and how the layers of a model run: inputs, device, dtype and memory format."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.errors import LayerError
from eigendamage.layers import Layer, find_layers
from eigendamage.measure._timing import checked_call
from eigendamage.plan._latency import Conditions

MemoryFormat = Literal["contiguous", "channels_last"]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, eq=False)
class Site:
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
        return x.to(memory_format=FORMATS[memory_format]) if x.ndim == 4 else x


def sites_of(
    model: nn.Module, wanted: Mapping[str, Layer] | None, examples: Batch
) -> dict[str, list[Site]]:
    """The calls of each layer in one forward pass; None stands for all layers that run."""
    layers = find_layers(model).compressible if wanted is None else wanted
    found: dict[str, list[Site]] = {name: [] for name in layers}

    def watch(name: str, layer: Layer) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            last = any(map(_is_channels_last, (x, *layer.module.parameters())))
            found[name].append(Site(layer, tuple(x.shape), last))

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


def conditions_of(device: torch.device, sites: Sequence[Site], batch: int) -> Conditions:
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
