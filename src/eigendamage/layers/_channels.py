"""Which groups of channels of a model can be removed, and why the others cannot."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from eigendamage.batch import Batch
from eigendamage.calls import output_tensors, tried_call
from eigendamage.errors import ChannelError
from eigendamage.layers._channel_graph import Carrier, ChannelGraph, ChannelGroup
from eigendamage.layers._copy import copy_model
from eigendamage.layers._counters import with_counters
from eigendamage.layers._dependencies import Coupling, find_couplings
from eigendamage.layers._find import HOOKS
from eigendamage.layers._linear_groups import find_linear_groups
from eigendamage.layers._proof import proven
from eigendamage.layers._slicing import Norm, is_depthwise
from eigendamage.layers._staying import reasons_to_stay
from eigendamage.layers._trace import evaluating, preserved_random_state
from eigendamage.layers._traced_groups import traced_groups
from eigendamage.layers._unit_cost import with_unit_macs

_EXAMPLES = 2
_LIMIT_BESIDE_S = 20.0  # for the search in the graph where neurons are known already
_UNTRACED = "no output of the model depends on it in a way that can be traced"
_TIED = "what it returns goes into sums, into norms over channels or out of the model"


def find_channels(model: nn.Module, batch: Batch, *, limit_s: float = 120.0) -> ChannelGraph:
    """Find the channels that can be removed together, and prove that they can.

    The candidates come from two sources. `find_linear_groups` sees what lies between Linear
    layers, neurons and heads. torch-pruning's dependency graph (Fang et al. 2023, DepGraph) sees
    all else; it is not asked about networks of Linear layers with heads, where norms over channels
    tie the rest together. A group is in the result only if all its modules are such that
    `slice_channels` slices, and if removing random units of it, alone and with those of others,
    left the outputs of a copy as they are when the columns that read those units are zero instead.

    The model is neither changed nor run; copies of it are, without its hooks. Random states are
    preserved.

    Args:
        model: any module, on any device.
        batch: inputs that it takes. Two examples are used if they can be told apart, and if the
            same modules run on them as on all.
        limit_s: seconds after which the search in the graph is stopped.

    Returns:
        The groups, what their carriers cost, and for the other layers why their channels stay.
        There may be no group.

    Raises:
        DataError: if the model cannot run on the batch.
        ChannelError: if it cannot be copied, or if torch-pruning fails on it or takes too long and
            there is nothing between Linear layers either.
    """
    with preserved_random_state(), torch.inference_mode(False):
        base = _bare_copy(model)
        with evaluating(base):
            return _found(base, batch, reasons_to_stay(model), limit_s)


def _found(
    base: nn.Module, batch: Batch, reasons: Mapping[str, str], limit_s: float
) -> ChannelGraph:
    """The groups of a copy in eval mode that is free of hooks."""
    few = batch.few(_EXAMPLES)
    numbers = _numbers_an_example(base, few)
    if few.size < batch.size:
        whole = _numbers_an_example(base, batch)
        # A layer may run for large batches only; what it reads has to be seen, too.
        few, numbers = (few, numbers) if whole.keys() == numbers.keys() else (batch, whole)
    between, left_alone = _usable(find_linear_groups(base, few), reasons)
    couplings, untraced = _couplings(base, few, list(numbers), between, limit_s)
    traced, apart = traced_groups(base, couplings, list(numbers), reasons)
    candidates = _merged(between, traced)
    groups, unproven = proven(base, few, _in_order(candidates, numbers))
    blocks = [name for name in unproven if candidates[name].has_blocks]
    counted = {name: with_counters(base, candidates[name]) for name in blocks}
    counted = {name: group for name, group in counted.items() if group.counters}
    if counted:
        groups, still = proven(base, few, _in_order({**groups, **counted}, numbers))
        unproven = {**unproven, **still}
    groups = with_unit_macs(base, few, groups)
    placed = {path for group in groups.values() for path in group.makers}
    left_alone = {**apart, **left_alone, **unproven}
    left_alone = {path: why for path, why in left_alone.items() if path not in placed}
    covered = {place.path for coupling in couplings for place in coupling.places} | placed
    for path, module in base.named_modules():
        if _has_rows(module) and path not in covered:
            left_alone.setdefault(path, reasons.get(path, untraced))
    carriers = {
        member.module: _carrier(base.get_submodule(member.module), numbers[member.module])
        for group in groups.values()
        for member in group.carriers
    }
    return ChannelGraph(groups=groups, carriers=carriers, left_alone=left_alone)


def _usable(
    groups: Mapping[str, ChannelGroup], reasons: Mapping[str, str]
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """The groups of which every layer can be sliced, and by name why the others cannot go."""
    usable: dict[str, ChannelGroup] = {}
    refused: dict[str, str] = {}
    for name, group in groups.items():
        members = (m.module for m in (*group.producers, *group.readers))
        path = next((path for path in members if path in reasons), None)
        if path is None:
            usable[name] = group
        else:
            refused[name] = reasons[path] if path == name else f"'{path}': {reasons[path]}"
    return usable, refused


def _couplings(
    base: nn.Module,
    batch: Batch,
    order: Sequence[str],
    between: Mapping[str, ChannelGroup],
    limit_s: float,
) -> tuple[list[Coupling], str]:
    """What torch-pruning finds, and why what it does not find has to stay.

    Args:
        base: a copy of the model.
        batch: what to run it on.
        order: its modules, in order of execution.
        between: groups that are known to lie between Linear layers.
        limit_s: seconds after which the search is stopped.
    """
    heads = any(group.has_blocks for group in between.values())
    if heads and not any(isinstance(module, _ConvNd) for module in base.modules()):
        return [], _TIED
    roots = [path for path in order if _has_rows(base.get_submodule(path))]
    if between:
        limit_s = min(limit_s, _LIMIT_BESIDE_S)
    try:
        return find_couplings(_traceable(base), batch, roots, limit_s=limit_s), _UNTRACED
    except ChannelError as error:
        if not between:
            raise
        return [], str(error)


def _merged(
    between: Mapping[str, ChannelGroup], traced: Mapping[str, ChannelGroup]
) -> dict[str, ChannelGroup]:
    """Groups of both sources, no two with outputs of one layer from different ones.

    torch-pruning takes outputs for single channels, which in a head they are not: heads come
    before its groups. Neurons come after them: it also sees what is no Linear layer.
    """
    heads = {name: group for name, group in between.items() if group.has_blocks}
    taken = {path for group in heads.values() for path in group.makers}
    merged = {**heads}
    merged |= {n: group for n, group in traced.items() if taken.isdisjoint(group.makers)}
    taken = {path for group in merged.values() for path in group.makers}
    return merged | {n: group for n, group in between.items() if taken.isdisjoint(group.makers)}


def _in_order(groups: Mapping[str, ChannelGroup], order: Iterable[str]) -> dict[str, ChannelGroup]:
    """The groups by when the layers that name them run."""
    return {name: groups[name] for name in order if name in groups}


def _bare_copy(model: nn.Module) -> nn.Module:
    """A copy without hooks, but for torch's own that compute a weight."""
    hooks: dict[int, Any] = {}
    for module in model.modules():
        for kind in HOOKS:
            mine = getattr(module, kind)
            hooks[id(mine)] = OrderedDict(
                (key, hook)
                for key, hook in mine.items()
                if type(hook).__module__.startswith("torch.nn.utils.")
            )
    try:
        return copy_model(model, hooks)
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise ChannelError(
            f"{type(model).__name__} cannot be copied, and its channels are looked for on a copy: "
            f"{type(error).__name__}: {said}"
        ) from error


def _traceable(base: nn.Module) -> nn.Module:
    traced = copy_model(base)
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return traced


def _numbers_an_example(base: nn.Module, batch: Batch) -> dict[str, float]:
    """How many numbers each module puts out for one example, in order of execution."""
    numbers: dict[str, float] = defaultdict(float)

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                numbers[path] += output.numel() / batch.size

        return hook

    handles = [m.register_forward_hook(watch(path)) for path, m in base.named_modules()]
    try:
        with torch.no_grad():
            output_tensors(tried_call(base, batch))
    finally:
        for handle in handles:
            handle.remove()
    return dict(numbers)


def _has_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) and not is_depthwise(module)


def _carrier(module: nn.Module, numbers: float) -> Carrier:
    """Its cost by channel; ``numbers`` is how many it puts out for one example."""
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, nn.Conv2d):
        channels, taps = module.out_channels, module.weight[0].numel()
    elif isinstance(module, nn.PReLU):
        channels, taps = module.num_parameters, 0
    else:
        assert isinstance(module, Norm)
        channels, taps = module.num_features, 0
    return Carrier(
        channels=channels,
        parameters=sum(p.numel() for p in parameters) // channels,
        macs=taps * numbers / channels,
    )
