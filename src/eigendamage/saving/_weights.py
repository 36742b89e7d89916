"""Weights in safetensors files: written with their ties, read into a model that has none yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eigendamage.errors import EigenDamageError, FileFormatError
from eigendamage.files import save_tensors
from eigendamage.layers import saved_tensors
from eigendamage.saving._describe import is_dense, is_masked
from eigendamage.saving._structure import Structure


def write_weights(model: nn.Module, ties: Mapping[str, str], path: Path) -> None:
    """Every parameter and persistent buffer, each tensor once, row by row.

    Raises:
        EigenDamageError: if a tensor is of a kind that safetensors does not know.
        SafetensorError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in saved_tensors(model):
        if name not in ties:
            flat = tensor.detach().cpu().contiguous()
            # Two names may not share memory in the file: views of one storage are copied.
            at = flat.untyped_storage().data_ptr()
            tensors[name] = flat.clone() if at in storages else flat
            storages.add(at)
    try:
        save_tensors(tensors, path, metadata={"format": "pt"})
    except (KeyError, ValueError) as error:
        raise EigenDamageError(f"the weights cannot be saved as safetensors: {error}") from error


def read_weights(
    model: nn.Module,
    structure: Structure,
    files: Sequence[Path],
    places: Mapping[str, torch.device],
) -> None:
    """Give the tensors of a rebuilt model their values, in place; they take the files' dtypes.

    Every name and shape is compared before anything is read.

    Args:
        model: made by `rebuild`; changed.
        structure: of the saved model.
        files: safetensors files, which together hold every tensor once.
        places: the device of each tensor, by name.

    Raises:
        FileFormatError: if a file is no whole safetensors file, or the first tensor that is
            missing, left over, of another shape or of another kind of numbers, or that only the
            structure names.
    """
    _refuse_unknown([name for name, _ in saved_tensors(model)], structure)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in files:
            try:
                opened = stack.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise FileFormatError(f"{path} is not a whole safetensors file: {error}") from error
            where.update(dict.fromkeys(opened.keys(), opened))
        told = ", ".join(str(path) for path in files)
        keys = _keys([name for name, _ in saved_tensors(model)], structure.ties, where)
        _compare(told, model, keys, where)
        _fill(told, model, structure.layouts, keys, where, places)


def _refuse_unknown(names: Sequence[str], structure: Structure) -> None:
    ties, layouts = structure.ties, structure.layouts
    for what, named in (("ties", {*ties, *ties.values()}), ("layouts", {*layouts})):
        if odd := sorted(named.difference(names)):
            raise FileFormatError(f"{what} of the structure name '{odd[0]}', which no tensor has")


def _keys(
    names: Iterable[str], ties: Mapping[str, str], where: Mapping[str, Any]
) -> dict[str, str]:
    """Under which name each tensor is stored; other libraries choose others of its names."""
    tied: dict[str, list[str]] = {}
    for name, first in ties.items():
        tied.setdefault(first, [first]).append(name)
    stored = {first: next((n for n in group if n in where), first) for first, group in tied.items()}
    return {name: stored.get(ties.get(name, name), name) for name in names}


def _compare(
    told: str, model: nn.Module, keys: Mapping[str, str], where: Mapping[str, Any]
) -> None:
    stored: dict[int, str] = {}
    for name, tensor in saved_tensors(model):
        key = keys[name]
        if key not in where:
            raise FileFormatError(f"{told} has no '{key}', which the model has")
        shape = tuple(where[key].get_slice(key).get_shape())
        if shape != tuple(tensor.shape):
            raise FileFormatError(
                f"'{key}' in {told} has shape {shape}, the model that the structure describes has "
                f"{tuple(tensor.shape)}"
            )
        if stored.setdefault(id(tensor), key) != key:
            raise FileFormatError(
                f"'{name}' and '{stored[id(tensor)]}' are one tensor in the model, but two in "
                f"{told}"
            )
    left = sorted(where.keys() - set(stored.values()))
    if left:
        raise FileFormatError(f"{told} has '{left[0]}', which the model has not")


def _fill(
    told: str,
    model: nn.Module,
    layouts: Mapping[str, Sequence[int]],
    keys: Mapping[str, str],
    where: Mapping[str, Any],
    places: Mapping[str, torch.device],
) -> None:
    filled: dict[int, Tensor] = {}
    for name, tensor in list(saved_tensors(model)):
        if id(tensor) not in filled:
            key = keys[name]
            value = where[key].get_tensor(key)
            if _kind(value) != _kind(tensor):
                raise FileFormatError(
                    f"'{key}' in {told} is {value.dtype}, the model's is {tensor.dtype}"
                )
            value = _laid_out(name, value, layouts.get(name)).to(places[name])
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                vars(value).update(vars(tensor))
            filled[id(tensor)] = value
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, filled[id(tensor)])
    for module in model.modules():
        if is_masked(module):  # the product is made anew only when the module runs
            module.weight = module.weight_mask * module.weight_orig  # pyright: ignore


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _laid_out(name: str, value: Tensor, strides: Sequence[int] | None) -> Tensor:
    """The value in memory of its own: kernels round by alignment, which the file's has not."""
    if strides is None:
        return value.clone(memory_format=torch.contiguous_format)
    if len(strides) != value.ndim or not is_dense(value.shape, strides):
        raise FileFormatError(
            f"the layout of '{name}' is {tuple(strides)}, which are no strides of shape "
            f"{tuple(value.shape)}"
        )
    return torch.empty_strided(value.shape, tuple(strides), dtype=value.dtype).copy_(value)
