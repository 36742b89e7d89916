"""A curvature on disk: one safetensors file, its header the rest as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eigendamage.curvature._curvature import Curvature, Extra
from eigendamage.curvature._head import Fisher
from eigendamage.curvature._layer import EigenvalueKind, LayerCurvature
from eigendamage.documents import parsed
from eigendamage.errors import FileFormatError, MissingFileError
from eigendamage.files import save_tensors, written_beside
from eigendamage.layers import ChannelGraph, LayerShape, Sketch

_FORMAT = "eigendamage.curvature"
_VERSION = 1
_ORTHONORMAL_TO = 1e-3
_NOT_NEGATIVE = (
    *("S_eigenvalues", "A_eigenvalues", "eigenvalues"),
    *("diagonal", "bias_diagonal", "gates"),
)
_TENSORS = ("S", "A", "mean", "Q_S", "Q_A", "S_eigenvalues", "A_eigenvalues", "eigenvalues")
_OPTIONAL = ("patches", "patch_mean", "diagonal", "bias_diagonal", "gates")


class _LayerRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")

    examples: int = Field(ge=1)
    positions: int = Field(ge=1)
    outputs: int
    inputs: int
    offsets: int
    bias: bool
    positions_in: float
    positions_out: float
    itemsize: int = 4
    ranks: tuple[int, int]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: str
    version: int
    layers: dict[str, _LayerRecord]
    left_alone: dict[str, str]
    classifier: tuple[str, ...]
    macs: float = Field(ge=0, allow_inf_nan=False)
    parameters: int = Field(ge=0)
    examples: int = Field(ge=1)
    loss: str
    fisher: Fisher
    kind: EigenvalueKind
    extras: tuple[Extra, ...]
    channels: ChannelGraph | None
    sketches: dict[str, Sketch | None] = {}


def save_curvature(curvature: Curvature, path: str | Path) -> None:
    """Write a curvature to a ``.safetensors`` file, beside it first and then renamed."""
    tensors = {
        f"{name}:{what}": getattr(layer, what).detach().cpu().contiguous()
        for name, layer in curvature.items()
        for what in (*_TENSORS, *_OPTIONAL)
        if getattr(layer, what) is not None
    }
    header = _Header(
        format=_FORMAT,
        version=_VERSION,
        layers={
            name: _LayerRecord(
                examples=layer.examples,
                positions=layer.positions,
                ranks=layer.ranks,
                **asdict(layer.shape),
            )
            for name, layer in curvature.items()
        },
        left_alone=dict(curvature.left_alone),
        classifier=curvature.classifier,
        macs=curvature.macs,
        parameters=curvature.parameters,
        examples=curvature.examples,
        loss=curvature.loss,
        fisher=curvature.fisher,
        kind=curvature.kind,
        extras=curvature.extras,
        channels=curvature.channels,
        sketches=dict(curvature.sketches),
    )
    with written_beside(path) as beside:
        save_tensors(tensors, beside, metadata={"curvature": header.model_dump_json()})


def load_curvature(path: str | Path, device: str | torch.device = "cpu") -> Curvature:
    """Read a curvature. Nothing in the file is executed.

    Raises:
        FileFormatError: if the file is not a curvature, of a later version, cut short, or if its
            tensors do not have the shapes that its header says.
        MissingFileError: if there is no such file.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"no curvature file at {path}")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            header = _read_header(path, file.metadata())
            layers = {
                name: _read_layer(path, name, record, file)
                for name, record in header.layers.items()
            }
    except SafetensorError as error:
        raise FileFormatError(f"{path} is not a whole safetensors file: {error}") from error
    _refuse_missing(path, header, layers)
    rest = header.model_dump(exclude={"format", "version", "layers", "channels"})
    return Curvature(layers=layers, channels=header.channels, **rest)


def _refuse_missing(
    path: str | Path, header: _Header, layers: Mapping[str, LayerCurvature]
) -> None:
    """Refuse a file that has not what its header says was estimated."""
    for extra in header.extras:
        lacking = extra == "channels" and header.channels is None
        for name, layer in layers.items():
            tensors: list[Tensor | None] = []
            if extra == "gradients":
                tensors = [layer.diagonal, layer.bias_diagonal, layer.gates]
            elif extra == "patches" and layer.shape.offsets > 1:
                tensors = [layer.patches, layer.patch_mean]
            if lacking or any(tensor is None for tensor in tensors):
                raise FileFormatError(
                    f"{path}: the header says that {extra} were estimated, but those of layer "
                    f"'{name}' are not in the file"
                )


def _read_header(path: str | Path, metadata: dict[str, str] | None) -> _Header:
    text = (metadata or {}).get("curvature")
    if text is None:
        raise FileFormatError(f"{path} is a safetensors file, but not a saved curvature")
    try:
        raw = parsed(text)
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != _VERSION:
            raise FileFormatError(
                f"{path} has curvature version {version}; this library reads version {_VERSION}"
            )
        return _Header.model_validate(raw)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} has a broken curvature header: {error}") from error


def _refuse_broken(path: str | Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    for what, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise FileFormatError(
                f"{path}: '{what}' of layer '{name}' is {tensor.dtype} or holds NaN or infinite "
                f"values; finite floating-point numbers were expected"
            )
        if what in _NOT_NEGATIVE and bool((tensor < 0).any()):
            raise FileFormatError(f"{path}: '{what}' of layer '{name}' has negative values")
        if what.startswith("Q_"):
            wide = tensor.double()
            off = wide.T @ wide - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
            if float(off.abs().max()) > _ORTHONORMAL_TO:
                raise FileFormatError(f"{path}: '{what}' of layer '{name}' is not orthonormal")


def _read_layer(path: str | Path, name: str, record: _LayerRecord, file: Any) -> LayerCurvature:
    o, i, k = record.outputs, record.inputs, record.offsets
    shapes = {
        "S": (o, o),
        "A": (i, i),
        "mean": (i,),
        "Q_S": (o, o),
        "Q_A": (i, i),
        "S_eigenvalues": (o,),
        "A_eigenvalues": (i,),
        "eigenvalues": (o, i, k),
        "patches": (i * k, i * k),
        "patch_mean": (i * k,),
        "diagonal": (o, i, k),
        "bias_diagonal": (o,),
        "gates": (o,),
    }
    there = set(file.keys())
    optional = [what for what in _OPTIONAL if f"{name}:{what}" in there]
    tensors = {what: file.get_tensor(f"{name}:{what}") for what in (*_TENSORS, *optional)}
    for what, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[what]:
            raise FileFormatError(
                f"{path}: '{what}' of layer '{name}' has shape {tuple(tensor.shape)}, the header "
                f"says {shapes[what]}"
            )
    if not (0 < record.ranks[0] <= o and 0 < record.ranks[1] <= i):
        raise FileFormatError(f"{path}: layer '{name}' of {o} × {i} has ranks {record.ranks}")
    shape = LayerShape(**record.model_dump(exclude={"examples", "positions", "ranks"}))
    _refuse_broken(path, name, tensors)
    return LayerCurvature(
        **tensors,
        examples=record.examples,
        positions=record.positions,
        shape=shape,
        ranks=record.ranks,
    )
