"""Models of timm by their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from eigendamage.errors import EigenDamageError
from eigendamage.integrations._extras import required

_SUGGESTED = 5


def timm_model(name: str, *, pretrained: bool = False) -> nn.Module:
    """A model of timm, in eval mode.

    Args:
        name: as timm has it, such as ``resnet18`` or ``resnet18.a1_in1k``.
        pretrained: whether to fetch timm's weights (network); random ones otherwise.

    Raises:
        ExtraError: if timm is not installed.
        EigenDamageError: if it has no such model, or no weights for it.
    """
    timm: Any = required("timm", "timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0]}*")[:_SUGGESTED]
        hint = f"; it has {', '.join(near)}" if near else "; timm.list_models() lists what it has"
        raise EigenDamageError(f"timm has no model '{name}'{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained).eval()
    except RuntimeError as error:
        raise EigenDamageError(f"timm cannot make '{name}': {error}") from error
