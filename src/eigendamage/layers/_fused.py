"""Modules that may compute with their layers' weights in one call, past the layers' own forward.

torch's encoder layer does so where there are no gradients, no hooks and no training, and its
activation is ReLU or GELU. The stack of them packs what is not padding for that call, and reads the
first one's weights before. Of a factored layer either would read the product of the stages: the
result is the same, and nothing is saved.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoder: "use_nested_tensor",
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
}
PACKING = _SWITCHES[nn.TransformerEncoder]
"""The attribute that says whether batches with padding are packed, and unpacked with zeros."""
SWITCHES = tuple(_SWITCHES.values())
"""Names of the attributes that allow such a call; 0 or False for no."""


def fused_calls(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[str, str]]:
    """Dotted path and attribute of all that allows any of these layers to be read directly.

    A subclass with a ``forward`` of its own is taken to call its layers.
    """
    ids = {id(layer) for layer in layers}
    return [
        (path, attribute)
        for path, holder in model.named_modules()
        for kind, attribute in _SWITCHES.items()
        if type(holder).forward is kind.forward and getattr(holder, attribute, 0)
        if any(id(module) in ids for module in holder.modules())
    ]


def goes_past_its_block(module: nn.Module) -> bool:
    """Whether it is torch's encoder layer but for an inner block that its fused call goes past."""
    known = nn.TransformerEncoderLayer
    if not isinstance(module, known) or type(module).forward is not known.forward:
        return False
    return type(module)._ff_block is not known._ff_block  # pyright: ignore[reportPrivateUsage]


def set_following(module: nn.Module, attribute: str, value: int) -> None:
    """Set an attribute that follows what goes; it stays a bool or a whole number."""
    setattr(module, attribute, type(getattr(module, attribute))(value))
