"""Modules that may compute with their layers' weights in one call, past the layers' own forward."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

# torch's encoder layer computes in one call where there are no gradients, no hooks and no training,
# and its activation is ReLU or GELU. The stack of them packs what is not padding for that call, and
# reads the first one's weights before.
_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoder: "use_nested_tensor",
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
}
SWITCHES = tuple(_SWITCHES.values())
"""Names of the attributes that allow such a call; 0 or False for no."""


@dataclass(frozen=True)
class FusedCall:
    """What allows a module to compute with a layer's weight instead of calling the layer.

    Of a factored layer it would read the product of the stages: the result is the same, and nothing
    is saved.

    Attributes:
        holder: dotted path of the module.
        attribute: its name.
        value: what it is now, not 0.
    """

    holder: str
    attribute: str
    value: int


def fused_calls(model: nn.Module) -> dict[int, tuple[FusedCall, ...]]:
    """What allows each layer to be read directly, by the id of its module."""
    found: dict[int, list[FusedCall]] = defaultdict(list)
    for path, holder in model.named_modules():
        for kind, attribute in _SWITCHES.items():
            value = getattr(holder, attribute, 0) if isinstance(holder, kind) else 0
            if value:
                for block in holder.modules():
                    if isinstance(block, nn.TransformerEncoderLayer):
                        for child in block.children():
                            found[id(child)].append(FusedCall(path, attribute, int(value)))
    return {child: tuple(calls) for child, calls in found.items()}


def set_following(module: nn.Module, attribute: str, value: int) -> None:
    """Set an attribute that follows what goes; it stays a bool or a whole number."""
    setattr(module, attribute, type(getattr(module, attribute))(value))
