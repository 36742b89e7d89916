"""The same model without this package's classes, and without masks."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from eigendamage.layers import FactoredConv2d, FactoredLinear, copy_model


def plain(model: nn.Module) -> nn.Module:
    """A copy whose factored layers are ``torch.nn.Sequential``, with masked weights for good.

    It computes the same, and its ``state_dict`` has the same names, except that of a masked layer
    ``weight_orig`` and ``weight_mask`` become ``weight``. It can be pickled, and loaded where this
    package is not installed; the model's own classes stay, also those of ``eigendamage.zoo``. A
    model whose code reads the ``weight`` of a layer needs the factored classes, which have it.
    """
    copy = unmasked(model)
    for module in copy.modules():
        if isinstance(module, FactoredConv2d | FactoredLinear):
            # They add properties to nn.Sequential and no state, so that the class alone differs.
            module.__class__ = nn.Sequential  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def unmasked(model: nn.Module) -> nn.Module:
    """A copy in which masked weights are plain ones."""
    copy = copy_model(model)
    for module in copy.modules():
        _unmask(module)
    return copy


def _unmask(module: nn.Module) -> None:
    hooks = list(module._forward_pre_hooks.values())  # pyright: ignore[reportPrivateUsage]
    for hook in hooks:
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[attr-defined]
