"""How much memory the layers of one pass take, and how many layers fit into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from eigendamage.curvature._sinks import accumulated_like, has_patches
from eigendamage.errors import EigenDamageError
from eigendamage.layers import Layer, LayerShape

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def bytes_of(amount: int | str) -> int:
    """A number of bytes, from such a number or ``"2GB"``, ``"512 MiB"`` and the like.

    Raises:
        EigenDamageError: if it is neither, or not above 0.
    """
    found = _parsed(amount) if isinstance(amount, str) else amount
    if isinstance(found, bool) or not isinstance(found, int):
        found = None
    if found is None or found <= 0:
        raise EigenDamageError(
            f"max_memory is {amount!r}; give a number of bytes above 0, or one with a unit such as "
            f"'2GB' or '512MiB'"
        )
    return found


def readable(count: int) -> str:
    """A number of bytes with three digits and a unit."""
    unit = next((u for u in ("GB", "MB", "KB") if count >= _UNITS[u]), "B")
    return f"{count / _UNITS[unit]:.3g} {unit}"


def layer_bytes(layer: Layer, shape: LayerShape, examples: int, *, patches: bool) -> int:
    """The most that one layer holds at a time while its pass is under way.

    In the pass for S and A these are their sums and, until its gradient arrives, the same of the
    input of one batch; in the others the eigenbasis, sums as large as the weight, and the input of
    one batch.

    Args:
        layer: the layer.
        shape: its sizes.
        examples: of a batch.
        patches: whether A over whole patches is wished for.
    """
    o, i, m = shape.outputs, shape.inputs, shape.inputs * shape.offsets
    itemsize = accumulated_like(layer).element_size()
    moments = i * i + (m * m if patches and has_patches(layer) else 0)
    first = (o * o + 2 * moments) * itemsize
    kept = round(examples * i * shape.positions_in) * shape.itemsize
    later = (o * o + i * i + o * m) * itemsize + kept
    return max(first, later)


def within_memory(
    layers: Sequence[Layer], needed: Callable[[Layer], int], limit: int
) -> list[list[Layer]]:
    """The layers in their order, in as few groups as are each within a limit of bytes.

    Raises:
        EigenDamageError: if a layer alone is above it.
    """
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        size = needed(layer)
        if size > limit:
            raise EigenDamageError(
                f"layer '{layer.name}' alone needs {readable(size)}, but max_memory is "
                f"{readable(limit)}; give at least {readable(size)} or smaller batches, or leave "
                f"it alone with ignore="
            )
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(layer)
        room -= size
    return groups


def _parsed(text: str) -> int | None:
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in {"", *units}:
        return None
    return int(float(match[1]) * units.get(match[2].lower(), 1))
