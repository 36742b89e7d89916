"""The networks of the zoo by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from eigendamage.errors import EigenDamageError
from eigendamage.zoo._demo import demo_network
from eigendamage.zoo._preresnet import preresnet29
from eigendamage.zoo._resnet import resnet20, resnet32, resnet44, resnet56, wide_resnet32
from eigendamage.zoo._vgg import vgg19

MODELS: dict[str, Callable[..., nn.Module]] = {
    "demo_network": demo_network,
    "preresnet29": preresnet29,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "vgg19": vgg19,
    "wide_resnet32": wide_resnet32,
}
"""Constructor by name; each can be called without arguments."""


def get(name: str) -> Callable[..., nn.Module]:
    """Return the constructor called ``name``.

    Raises:
        EigenDamageError: if the zoo has no such network; the message lists those it has.
    """
    if name not in MODELS:
        raise EigenDamageError(f"the zoo has no network '{name}'; it has {', '.join(MODELS)}")
    return MODELS[name]
