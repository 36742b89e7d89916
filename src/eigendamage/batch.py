"""One call of a model: what it is given, and what a user's item becomes to be that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from eigendamage.errors import DataError, NonFiniteError

LABEL_KEYS = ("labels", "label", "targets", "target")
TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids")
"""What language models call their inputs of shape (batch, tokens)."""


@dataclass(frozen=True)
class Batch:
    """One call of the model: its arguments, the targets if any, and how many examples it holds.

    Its index among the batches of the data is there for messages, where it is known.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor | None
    size: int
    index: int | None = None

    @property
    def divisible(self) -> bool:
        """Whether its input is one tensor, or one by tokens, which can be cut along the first axis.

        Among several other tensors there may be some without a batch axis (a mask, positions) whose
        first axis is as long by chance.
        """
        if not self.args and self.kwargs and all(name in TOKEN_KEYS for name in self.kwargs):
            shapes = {v.shape for v in self.kwargs.values() if isinstance(v, Tensor)}
            return len(shapes) == 1
        return len(tensors_in([*self.args, *self.kwargs.values()])) == 1

    @property
    def counted(self) -> Bool[Tensor, "n t"] | None:
        """Which tokens of each example count, by ``attention_mask``; None where all of them do."""
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != self.size:
            return None
        # One that is added to scores is 0 where there is something to see.
        added = mask.is_floating_point() and bool(mask.isneginf().any())
        counted = mask == 0 if added else mask != 0
        return None if bool(counted.all()) else counted

    def few(self, count: int) -> Batch:
        """Its first ``count`` examples if it is divisible, the whole batch otherwise."""
        if not self.divisible or count >= self.size:
            return self
        return self.part(0, count)

    def on(self, device: torch.device) -> Batch:
        """The same on a device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return Batch(
            tuple(map_tensors(a, move) for a in self.args),
            {k: map_tensors(v, move) for k, v in self.kwargs.items()},
            None if self.target is None else move(self.target),
            self.size,
            self.index,
        )

    def part(self, start: int, stop: int) -> Batch:
        """The examples from ``start`` to ``stop`` of a divisible batch."""

        def cut(x: Tensor) -> Tensor:
            return x[start:stop]

        return Batch(
            tuple(map_tensors(a, cut) for a in self.args),
            {k: map_tensors(v, cut) for k, v in self.kwargs.items()},
            None if self.target is None else self.target[start:stop],
            stop - start,
            self.index,
        )

    def shapes(self) -> str:
        """The shapes of its inputs, for messages."""
        found = tensors_in([*self.args, *self.kwargs.values()])
        return ", ".join(str(tuple(t.shape)) for t in found)

    def told(self) -> str:
        """Which it is, and the shapes of its inputs, for messages."""
        which = "" if self.index is None else f" (batch {self.index})"
        return f"inputs of shape {self.shapes()}{which}"


def as_batch(raw: object, index: int, device: torch.device) -> Batch:
    """One item of the user's data as a `Batch` on ``device``.

    Raises:
        DataError: if the item is neither a tensor, an (input, label) pair nor a dict of tensors.
        NonFiniteError: if an input holds a NaN or an infinity.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    target: object = None
    if isinstance(raw, Tensor):
        args = (raw,)
    elif isinstance(raw, Mapping):
        kwargs = {str(k): v for k, v in cast("Mapping[object, Any]", raw).items()}
        for key in LABEL_KEYS:
            if key in kwargs:
                target = kwargs.pop(key)
                break
    elif isinstance(raw, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", raw)
        if len(items) not in (1, 2):
            raise DataError(
                f"batch {index} is a {type(raw).__name__} of {len(items)} items; expected an "
                f"input or an (input, label) pair. For several inputs use a dict of keyword "
                f"arguments."
            )
        if isinstance(items[0], Mapping):
            kwargs = {str(k): v for k, v in cast("Mapping[object, Any]", items[0]).items()}
        else:
            args = (items[0],)
        target = items[1] if len(items) == 2 else None
    else:
        raise DataError(
            f"batch {index} is a {type(raw).__name__}; expected a tensor, an (input, label) pair "
            f"or a dict of tensors"
        )

    def move(x: Tensor) -> Tensor:
        moved = x.detach().to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved

    _refuse_without_values([*args, *kwargs.values(), target], index)
    args = tuple(map_tensors(a, move) for a in args)
    kwargs = {k: map_tensors(v, move) for k, v in kwargs.items()}
    if target is not None and not isinstance(target, Tensor):
        try:
            target = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the labels of batch {index} are {type(target).__name__}; expected a tensor"
            ) from error
    moved_target = None if target is None else move(target)
    size = _batch_size(args, kwargs, index)
    if moved_target is not None and (moved_target.ndim == 0 or moved_target.shape[0] != size):
        raise DataError(
            f"batch {index} has {size} inputs but labels of shape {tuple(moved_target.shape)}; "
            f"the first axis of both must be the batch"
        )
    _refuse_non_finite(args, kwargs, index)
    return Batch(args, kwargs, moved_target, size, index)


def map_tensors(item: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nested lists, tuples and mappings with a function done to each tensor."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", item)
        mapped = [map_tensors(x, function) for x in items]
        return mapped if isinstance(items, list) else tuple(mapped)
    if isinstance(item, Mapping):
        return {k: map_tensors(v, function) for k, v in cast("Mapping[Any, Any]", item).items()}
    return item


def tensors_in(item: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings, or a lone one."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(item, keep)
    return found


def _refuse_without_values(items: list[Any], index: int) -> None:
    for tensor in tensors_in(items):
        odd = {
            "on the meta device": tensor.is_meta,
            "nested": tensor.is_nested,
            f"sparse ({tensor.layout})": tensor.layout is not torch.strided,
        }
        what = next((words for words, found in odd.items() if found), None)
        if what is not None:
            raise DataError(
                f"batch {index} holds a tensor that is {what}; give dense tensors with values "
                f"(to_dense(), or padding and an attention_mask)"
            )


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> int:
    for tensor in tensors_in([*args, *kwargs.values()]):
        if tensor.ndim > 0:
            if tensor.shape[0] == 0:
                raise DataError(
                    f"batch {index} is empty: its input has shape {tuple(tensor.shape)}"
                )
            return tensor.shape[0]
    raise DataError(f"batch {index} holds no tensor with a batch axis")


def _refuse_non_finite(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> None:
    named = [("the input", a) for a in args] + [(f"the input '{k}'", v) for k, v in kwargs.items()]
    for name, item in named:
        for tensor in tensors_in(item):
            if not tensor.is_floating_point():
                continue
            fine = torch.isfinite(tensor)
            if "mask" in name:  # one that is added to scores is -inf where nothing is to be seen
                fine |= tensor.isneginf()
            if not bool(fine.all()):
                bad = int((~fine).sum())
                raise NonFiniteError(
                    f"{name} of batch {index} holds {bad} NaN or infinite values of "
                    f"{tensor.numel()}; clean the data first"
                )
