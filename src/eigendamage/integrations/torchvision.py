"""Models of torchvision by their names."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from eigendamage.errors import EigenDamageError
from eigendamage.integrations._extras import required

_SUGGESTED = 5


def torchvision_model(name: str, *, pretrained: bool = False) -> nn.Module:
    """A model of torchvision, in eval mode.

    Args:
        name: as ``torchvision.models.get_model`` takes it, such as ``resnet18``.
        pretrained: whether to fetch torchvision's default weights (network); random ones otherwise.

    Raises:
        ExtraError: if torchvision is not installed, or does not fit torch.
        EigenDamageError: if it has no such model.
    """
    models: Any = required("torchvision.models", "torchvision")
    known: list[str] = models.list_models()
    if name.lower() not in known:
        near = [each for each in known if name.lower() in each][:_SUGGESTED]
        hint = ", ".join(near) if near else "torchvision.models.list_models() lists what it has"
        raise EigenDamageError(f"torchvision has no model '{name}'; {hint}")
    options: dict[str, Any] = {"weights": "DEFAULT"} if pretrained else {"weights": None}
    if "weights_backbone" in signature(models.get_model_builder(name)).parameters:
        # Asked for, or else networks of segmentation and detection fetch those of their backbone.
        options["weights_backbone"] = None
    if name.lower() in ("googlenet", "inception_v3") and not pretrained:
        # Asked for, or else they draw weights for minutes and warn about it.
        options["init_weights"] = False
    return models.get_model(name, **options).eval()
