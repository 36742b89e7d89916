"""Which modules cannot lose channels, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from eigendamage.layers._factored import FactoredConv2d, FactoredLinear
from eigendamage.layers._find import find_layers
from eigendamage.layers._slicing import Norm, is_depthwise

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def reasons_to_stay(model: nn.Module) -> dict[str, str]:
    """For each module that cannot be sliced, why; also for those of a factored layer."""
    found = dict(find_layers(model).left_alone)
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(path)
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            reason = _why_not(module, owners) or found.get(path)
        elif isinstance(module, nn.PReLU | Norm) or is_depthwise(module):
            reason = _why_not(module, owners)
        elif isinstance(module, FactoredConv2d | FactoredLinear):
            reason = "it carries hooks" if _is_hooked(module) else None
        else:
            reason = _foreign(module)
        if reason is not None:
            reasons[path] = reason
    return reasons


def _foreign(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return f"{kind} computes over several channels at once"
    if isinstance(module, nn.Conv2d):
        return f"grouped Conv2d (groups={module.groups}), whose groups would not stay equal"
    return f"{kind} is no layer whose channels can be removed"


def _why_not(module: nn.Module, owners: Mapping[int, Sequence[str]]) -> str | None:
    kind = type(module).__name__
    standard = type(module).forward.__module__.startswith("torch.nn.")
    if not standard or "forward" in vars(module):
        return f"{kind} has a forward of its own"
    if parametrize.is_parametrized(module) or {"weight", "bias"} & vars(module).keys():
        return f"the weight of {kind} is computed from other parameters (parametrized or masked)"
    if _is_hooked(module):
        return "it carries hooks, which may depend on its channels; remove them first"
    for parameter in module.parameters(recurse=False):
        if len(owners[id(parameter)]) > 1:
            return f"a parameter of it is shared by {' and '.join(owners[id(parameter)])}"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in _HOOKS)
