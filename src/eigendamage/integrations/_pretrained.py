"""Compressed models of transformers in its own format: structure in config.json, its weights."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import nn

from eigendamage.documents import parsed
from eigendamage.errors import EigenDamageError, FileError, FileFormatError, MissingFileError
from eigendamage.integrations._conv1d import conv1d, plain_linears
from eigendamage.integrations._extras import required
from eigendamage.saving import Structure, describe, restore

_KEY = "eigendamage"


def save_pretrained(model: Any, directory: str | Path) -> None:
    """Write a compressed model of transformers as its own ``save_pretrained`` does.

    The weights and the configuration are written by transformers; ``config.json`` gets the
    structure under the key ``eigendamage``, by which `from_pretrained` rebuilds the model.

    Args:
        model: a ``PreTrainedModel`` that was compressed, with or without `plain_linears`.
        directory: a folder; made if it is not there.

    Raises:
        EigenDamageError: if the model is none of transformers, or has state that is no tensor.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise EigenDamageError(
            f"a {type(model).__name__} has no save_pretrained, so it is no model of transformers; "
            f"use eigendamage.save, or give the part of it that is one"
        )
    structure = describe(model)
    # Recent versions rename tensors to the names of older checkpoints, which the structure has not.
    renames = "save_original_format" in signature(model.save_pretrained).parameters
    options = {"save_original_format": False} if renames else {}
    setattr(model.config, _KEY, structure.model_dump(mode="json"))
    try:
        model.save_pretrained(directory, **options)
    finally:
        delattr(model.config, _KEY)


def from_pretrained(
    directory: str | Path,
    cls: type[Any] | None = None,
    *,
    device: str | torch.device | None = None,
) -> Any:
    """The model that `save_pretrained` wrote, in evaluation mode. No code of the folder is run.

    Args:
        directory: a local folder.
        cls: the model's class; by default the one of transformers that the configuration names.
        device: where the model is to be; the CPU by default.

    Raises:
        ExtraError: if transformers is not installed.
        FileFormatError: if the folder has no structure, or its files are damaged or do not fit
            one another, where the first name that does not fit is named; or if the configuration
            names no model of transformers.
        MissingFileError: if a file is missing.
        FileError: if its config.json cannot be read.
        MismatchError: if the configuration makes another model than the structure is for.
    """
    folder = Path(directory)
    structure = _structure(folder / "config.json")
    transformers = required("transformers", "huggingface")
    source = transformers.AutoConfig if cls is None else cls.config_class
    try:
        config = source.from_pretrained(folder)
        delattr(config, _KEY)
        fresh = (_class(transformers, config) if cls is None else cls)(config)
    except EigenDamageError:
        raise
    except Exception as error:  # of whatever kind: transformers checks little of what it reads
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileFormatError(f"{folder}: its config.json makes no model: {said}") from error
    if _was_plain(fresh, structure):
        fresh = plain_linears(fresh)
    model = restore(fresh, structure, _weights(folder), device=device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _structure(path: Path) -> Structure:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(
            f"there is no {path.name} in {path.parent}; give the folder that save_pretrained wrote"
        ) from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
    try:
        raw = parsed(content)
        if not isinstance(raw, dict) or _KEY not in raw:
            raise FileFormatError(
                f"{path} says nothing of '{_KEY}': this is no model that save_pretrained of "
                f"eigendamage wrote"
            )
        return Structure.model_validate_json(json.dumps(raw[_KEY]))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (_KEY, *first["loc"]))
        raise FileFormatError(f"{path}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no sound JSON: {error}") from error


def model_class(transformers: Any, config: Any) -> type[Any]:
    """The model of transformers that a configuration names; no other attribute of it is taken.

    Raises:
        FileFormatError: if it names none, or what it names is not there or is no model.
    """
    names = config.architectures
    if not isinstance(names, list) or not names:
        raise FileFormatError("the configuration names no architecture")
    name = str(cast("list[object]", names)[0])
    found = getattr(transformers, name, None)
    if found is None:
        raise FileFormatError(
            f"the configuration names '{name}', which transformers {transformers.__version__} has "
            f"not"
        )
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise FileFormatError(
            f"the configuration names '{name}', which is no model of transformers (no subclass of "
            f"PreTrainedModel)"
        )
    wanted = found.config_class
    if isinstance(wanted, type) and not isinstance(config, wanted):
        raise FileFormatError(
            f"the configuration names '{name}', which is made of a {wanted.__name__}, but is a "
            f"{type(config).__name__}"
        )
    return cast("type[Any]", found)


def _class(transformers: Any, config: Any) -> type[Any]:
    try:
        return model_class(transformers, config)
    except FileFormatError as error:
        raise FileFormatError(f"{error}; give cls=") from error


def _was_plain(fresh: nn.Module, structure: Structure) -> bool:
    """Whether the ``Conv1D`` layers were made Linear ones first: weights lie the other way then."""
    for path, module in fresh.named_modules():
        if isinstance(module, conv1d()) and module.nf != module.nx:
            return structure.original.get(f"{path}.weight") == (module.nf, module.nx)
    return False


def _weights(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [_there(folder / "model.safetensors")]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{index} is no index of weights: {error}") from error
    if any(name != Path(name).name for name in names):
        raise FileFormatError(f"{index} names files outside of its folder")
    return [_there(folder / name) for name in names]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise MissingFileError(
            f"there is no {path.name} in {path.parent}; give the folder that save_pretrained "
            f"wrote, whole"
        )
    return path
