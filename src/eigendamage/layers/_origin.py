"""What a module was before surgery, noted on the module itself as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field
from torch import Tensor, nn

from eigendamage.documents import Frozen
from eigendamage.layers._slicing import sides

_ATTRIBUTE = "_eigendamage_origin"

Shape = tuple[int, ...]


class Origin(Frozen):
    """What a module was before the first surgery, and which of its channels are left.

    It lies on the module, so it goes wherever the module goes: into copies, into a part of the
    model that is used alone, through training. It is no part of the state dict.

    Attributes:
        tensors: shapes of its parameters and persistent buffers, by name; None where only
            attributes were changed.
        channels: how many outputs and inputs it had; None with ``tensors``.
        outputs: which of the original's outputs are left, in order; None for all.
        inputs: which of the original's inputs are left, in order; None for all.
        counts: attributes that count heads or their channels, or allow a fused call, with the
            original's values.
    """

    tensors: Mapping[str, Shape] | None = None
    channels: tuple[int, int] | None = None
    outputs: Shape | None = None
    inputs: Shape | None = None
    counts: Mapping[str, int] = Field(default_factory=dict)


def origin_of(module: nn.Module) -> Origin | None:
    """What surgery noted on a module; None if there was none."""
    return vars(module).get(_ATTRIBUTE)


def set_origin(module: nn.Module, origin: Origin) -> None:
    """Note on a module what it was."""
    setattr(module, _ATTRIBUTE, origin)


def reshaped_origin(
    before: nn.Module,
    *,
    outputs: Sequence[int] | None = None,
    inputs: Sequence[int] | None = None,
) -> Origin:
    """What to note on what surgery makes of a module.

    Args:
        before: the module as it is before this surgery, which may not be the first.
        outputs: the outputs that are kept of those it has now; None for all.
        inputs: the inputs that are kept of those it has now; None for all.
    """
    known = origin_of(before) or Origin()
    shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(before)}
    return known.model_copy(
        update={
            "tensors": shapes if known.tensors is None else known.tensors,
            "channels": tuple(sides(before)) if known.channels is None else known.channels,
            "outputs": _composed(known.outputs, outputs),
            "inputs": _composed(known.inputs, inputs),
        }
    )


def recounted_origin(before: nn.Module, attribute: str, value: int) -> Origin:
    """What to note on a module of which an attribute that follows was ``value`` before."""
    known = origin_of(before) or Origin()
    return known.model_copy(update={"counts": {attribute: value, **known.counts}})


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module, without those of its children."""
    gone = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in gone:
            yield name, buffer


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers in the order of the state dict, under all their names."""
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(part):
            yield join(path, name), tensor


def join(path: str, name: str) -> str:
    """The dotted path of what has this name in the module at a path."""
    return f"{path}.{name}" if path else name


def _composed(before: Shape | None, kept: Sequence[int] | None) -> Shape | None:
    if kept is None:
        return before
    return tuple(kept) if before is None else tuple(before[index] for index in kept)
