"""Which modules cannot lose channels, and why."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm3d
from torch.nn.modules.instancenorm import InstanceNorm1d, InstanceNorm3d
from torch.nn.utils import parametrize

from eigendamage.layers._factored import FactoredConv2d, FactoredLinear
from eigendamage.layers._find import HOOKS, find_layers, overrides_forward
from eigendamage.layers._slicing import Norm, is_depthwise, slice_channels
from eigendamage.layers._trace import preserved_random_state


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
    own = f"{kind} has a forward of its own"
    if "forward" in vars(module) or not (_is_of_torch(module) or isinstance(module, Norm)):
        return own
    if parametrize.is_parametrized(module) or {"weight", "bias"} & vars(module).keys():
        return f"the weight of {kind} is computed from other parameters (parametrized or masked)"
    if any(_is_hooked(part) for part in module.modules()):
        return "it carries hooks, which may depend on its channels; remove them first"
    for parameter in module.parameters(recurse=False):
        if len(owners[id(parameter)]) > 1:
            return f"a parameter of it is shared by {' and '.join(owners[id(parameter)])}"
    if isinstance(module, Norm) and not _is_of_torch(module) and not _is_by_channel(module):
        return f"{own}, of which some channels alone do not compute what they did among all"
    return None


def _is_of_torch(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return not overrides_forward(module)
    return type(module).forward.__module__.startswith("torch.nn.")


def _is_by_channel(norm: Norm) -> bool:
    """Whether every other channel of a norm, sliced out of it, gives what it gave among all.

    That is so of batch norms with an activation and dropout behind them, as timm has. Tried on a
    copy in eval mode, on random numbers.
    """
    flat = isinstance(norm, BatchNorm1d | InstanceNorm1d)
    deep = isinstance(norm, BatchNorm3d | InstanceNorm3d)
    axes = 1 if flat else 3 if deep else 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, norm.num_features, *[3] * axes, generator=generator, dtype=torch.float64)
    kept = list(range(0, norm.num_features, 2))
    try:
        with preserved_random_state(), torch.no_grad():
            whole = copy.deepcopy(norm).to("cpu", torch.float64).eval()
            part = copy.deepcopy(whole)
            slice_channels(part, outputs=kept)
            # A copy of what is read: an activation may work in place.
            return torch.allclose(part(x[:, kept].clone()), whole(x.clone())[:, kept])
    except Exception:  # noqa: BLE001 - a user's forward may raise anything
        return False


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in HOOKS)
