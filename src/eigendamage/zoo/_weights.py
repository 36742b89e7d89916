"""Reading weights from a file into a model, with an error that names what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eigendamage.errors import FileFormatError, MismatchError
from eigendamage.files import load_tensors, opened

_WEIGHTS = "file of weights"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from ``path`` into ``model``, in place; every key and shape must fit.

    Nothing in the file is run: ``.safetensors``, or ``.pt`` / ``.pth`` read as weights alone, which
    may hold the state dict itself or a dict with a ``state_dict`` in it. The numbers are taken as
    they are, whatever they are.

    Raises:
        MissingFileError: if there is no such file.
        FileError: if it cannot be read.
        FileFormatError: if it holds no state dict.
        MismatchError: if a tensor is missing, left over or of another shape; the model is then as
            it was.
    """
    path = Path(path)
    found = _read(path)
    _check(model.state_dict(), found, path)
    model.load_state_dict(found)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path, _WEIGHTS)
    with opened(path, _WEIGHTS):  # what reads it has errors of its own for all else
        pass
    if path.suffix in (".pt", ".pth"):
        return _state_dict(_unpickle(path), path)
    raise FileFormatError(
        f"'{path}' ends in '{path.suffix}'; give a .safetensors, .pt or .pth file"
    )


# What a broken file makes the reader of weights raise: whatever its opcodes happen to ask for.
_UNPICKLING = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError),
    *(KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError),
)


def _unpickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING as error:
        raise FileFormatError(
            f"'{path}' cannot be read as weights alone ({type(error).__name__}): it is broken, or"
            " holds a whole model; save model.state_dict() to it, not the model"
        ) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise FileFormatError(
            f"'{path}' holds a {type(content).__name__}; a state dict was expected"
        )
    entries = cast("Mapping[Any, Any]", content)
    for key, value in entries.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise FileFormatError(
                f"'{path}' holds a {type(value).__name__} under {key!r}; a state dict of tensors,"
                " or a dict with one under 'state_dict', was expected"
            )
    return dict(entries)


def _check(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    for key, tensor in expected.items():
        if key not in found:
            raise MismatchError(
                f"'{path}' has no '{key}' of shape {tuple(tensor.shape)}, which the model needs;"
                f" the file's first names are {_names(found)}: take the model it was saved from"
            )
        if found[key].shape != tensor.shape:
            raise MismatchError(
                f"'{path}' has '{key}' of shape {tuple(found[key].shape)}, the model's is"
                f" {tuple(tensor.shape)}: build the model with the file's widths and classes"
            )
    for key in found:
        if key not in expected:
            raise MismatchError(
                f"'{path}' has '{key}', which the model has not; the model's first names are"
                f" {_names(expected)}: take the model it was saved from"
            )


def _names(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"'{key}'" for key in list(tensors)[:3]) or "none"
