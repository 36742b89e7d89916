"""A model called with a batch, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from traceback import walk_tb
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eigendamage.batch import Batch, tensors_in
from eigendamage.errors import DataError, EigenDamageError, LayerError, LossError, NonFiniteError


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's raw output on a batch, passed as `as_passed` says."""
    passed = as_passed(model, batch)
    return model(*passed.args, **passed.kwargs)


def as_passed(model: nn.Module, batch: Batch) -> Batch:
    """The batch by position and by name as the model takes it.

    A dict of which ``forward`` knows no name is passed by position: one tensor as it is, several as
    the dict where ``forward`` needs one argument.
    """
    if batch.args or not batch.kwargs:
        return batch
    parameters = inspect.signature(model.forward).parameters
    if any(name in parameters for name in batch.kwargs):
        return batch
    if len(batch.kwargs) > 1:
        needed = [p for p in parameters.values() if _needed(p)]
        alone = len(needed) == 1 and needed[0].kind is not inspect.Parameter.KEYWORD_ONLY
        return replace(batch, args=(dict(batch.kwargs),), kwargs={}) if alone else batch
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return batch
    return replace(batch, args=tuple(batch.kwargs.values()), kwargs={})


def _needed(parameter: inspect.Parameter) -> bool:
    """Whether a call has to give it."""
    packed = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in packed


def tried_call(model: nn.Module, batch: Batch) -> Any:
    """The model's raw output on a batch that it may not fit.

    Raises:
        DataError: if the model cannot run on it.
    """
    try:
        return call(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        if "can't allocate memory" in str(error):  # as torch says it of the CPU's
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, LookupError):  # which says no more than the key
            reason = f"{type(error).__name__}: {reason}"
        pair = "" if batch.target is None else " (the second of a pair is taken for labels)"
        raise DataError(
            f"the model cannot run on {batch.told()}: {reason}. Give batches of the form that the "
            f"model takes{pair}; several inputs as a dict by the names that its forward has"
        ) from error


def logits_of(output: Any) -> Tensor:
    """The tensor that the loss is taken of: the output, its ``.logits``, or its first item.

    Raises:
        LossError: if the output holds no floating-point tensor there.
    """
    found: Any = output
    if isinstance(output, Mapping):
        found = cast("Mapping[str, Any]", output).get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", output)
        found = items[0] if items else None
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise LossError(
            f"the model returned {type(output).__name__}; expected a floating-point tensor, an "
            f"object with .logits, or a tuple that starts with one. Wrap the model so that its "
            f"forward returns the logits."
        )
    return found


def output_tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, whatever holds them.

    Raises:
        LossError: if there is none.
    """
    found = [t for t in tensors_in(output) if t.is_floating_point()]
    return found or [logits_of(output)]


def require_finite(model: nn.Module, batch: Batch, found: Iterable[Tensor]) -> None:
    """Refuse what a model returned on a batch, whose inputs are finite, if it is not.

    Args:
        model: the model; run once more to find the place if it is to be refused.
        batch: what it was called with.
        found: the tensors that it returned.

    Raises:
        NonFiniteError: naming the parameter, the buffer or the module that it comes from.
    """
    if all(bool(torch.isfinite(t).all()) for t in found):
        return
    raise NonFiniteError(
        f"the model's output holds NaN or infinite values although its input is finite; "
        f"{_origin(model, batch)}"
    )


def _origin(model: nn.Module, batch: Batch) -> str:
    """Where in a model values first stop being finite, and what to do about it."""
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            if not _finite(tensor):
                return f"{kind} '{name}' holds some: mend it, or load the weights again"
    places: list[str] = []

    def look(name: str, module: nn.Module, args: object, output: object) -> None:
        if not places and _finite(args) and not _finite(output):
            places.append(f"layer '{name}' ({type(module).__name__})")

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [m.register_forward_hook(partial(look, name)) for name, m in leaves]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return (
        f"they first appear in the output of {places[0] if places else 'no module of its own'}: "
        f"check the weights and the size of the inputs, or run the model in float32"
    )


def _finite(item: object) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(item) if t.is_floating_point())


def require_module(model: object) -> None:
    """Refuse what is no model.

    Raises:
        EigenDamageError: if it is none.
    """
    if not isinstance(model, nn.Module):
        raise EigenDamageError(f"a torch.nn.Module was expected, found {type(model).__name__}")


def require_gradients_possible(model: nn.Module) -> None:
    """Refuse a model with tensors that autograd takes no part of.

    Raises:
        EigenDamageError: naming the first; or if it is no module.
    """
    require_module(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_lazy(tensor) and tensor.is_inference():
            raise EigenDamageError(
                f"the model's '{name}' was made under torch.inference_mode(), so no gradient can "
                f"be taken through it and it cannot be changed: build or load the model outside "
                f"of it, or give copy.deepcopy(model), made outside of it"
            )


def cannot_run(model: nn.Module, batch: Batch, error: RuntimeError) -> LayerError:
    """What to say of a forward pass that failed, by the layer that it was in."""
    names = {id(module): name for name, module in model.named_modules()}
    inside = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    name = next((names[id(m)] for m in reversed(inside) if id(m) in names), "")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return LayerError(
        name or type(model).__name__,
        f"it fails on {batch.told()}: {reason}. Either the "
        f"batch is not of the form that the model takes, or the layer runs for some batches only "
        f"(by their size, say): it may not have run on the first, where channels are looked for, "
        f"and those that it reads may be gone. Give batches of one form and size, or the data so "
        f"that such a layer runs on the first",
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer, the CPU if it has none.

    Raises:
        EigenDamageError: if it is no module, or any of them is on the meta device, where nothing
            has a value.
    """
    require_module(model)
    every = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in every:
        if tensor.is_meta:
            raise EigenDamageError(
                f"the model's '{name}' is on the meta device, where tensors have no values: load "
                f"the model with all of its weights on a device first"
            )
    for _, tensor in every:
        return tensor.device
    return torch.device("cpu")
