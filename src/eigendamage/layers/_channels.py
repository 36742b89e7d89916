"""Which groups of channels of a model can be removed, and why the others cannot."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from eigendamage.batches import Batch, first_call, output_tensors
from eigendamage.errors import ChannelError
from eigendamage.layers._channel_graph import Carrier, ChannelGraph, ChannelGroup, Member
from eigendamage.layers._copy import copy_model
from eigendamage.layers._dependencies import Coupling, Place, find_couplings
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear
from eigendamage.layers._linear_groups import find_linear_groups
from eigendamage.layers._proof import proven
from eigendamage.layers._slicing import Norm, is_depthwise, sides
from eigendamage.layers._staying import reasons_to_stay
from eigendamage.layers._trace import preserved_random_state
from eigendamage.layers._unit_cost import with_unit_macs

_EXAMPLES = 2
_UNTRACED = "no output of the model depends on it in a way that can be traced"
_TIED = "what it returns goes into sums, into norms over channels or out of the model"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Role = Literal["producer", "carrier", "reader"]


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
        batch: inputs that it takes. Two examples are used if they can be told apart.
        limit_s: seconds after which the search in the graph is stopped.

    Returns:
        The groups, what their carriers cost, and for the other layers why their channels stay.
        There may be no group.

    Raises:
        DataError: if the model cannot run on the batch.
        ChannelError: if it cannot be copied, or if torch-pruning fails on it or takes too long and
            there is nothing between Linear layers either.
    """
    few = batch.few(_EXAMPLES)
    reasons = reasons_to_stay(model)
    with preserved_random_state():
        base = _bare_copy(model)
        numbers = _numbers_an_example(base, few)
        between, left_alone = _usable(find_linear_groups(base, few), reasons)
        heads = {name: group for name, group in between.items() if group.has_blocks}
        rooted = [path for path in numbers if _has_rows(base.get_submodule(path))]
        couplings: list[Coupling] = []
        if heads and not any(isinstance(module, _ConvNd) for module in base.modules()):
            untraced = _TIED
        else:
            untraced = _UNTRACED
            try:
                couplings = find_couplings(_traceable(base), few, rooted, limit_s=limit_s)
            except ChannelError as error:
                if not between:
                    raise
                untraced = str(error)
        others = [coupling for coupling in couplings if not _meets(coupling, heads.values())]
        traced, apart = _sorted_out(base, others, list(numbers), reasons)
        taken = {m.module for group in traced.values() for m in group.producers}
        neurons = {
            name: group
            for name, group in between.items()
            if name not in heads and taken.isdisjoint(m.module for m in group.producers)
        }
        candidates = {**traced, **heads, **neurons}
        candidates = {name: candidates[name] for name in numbers if name in candidates}
        groups, unproven = proven(base, few, candidates)
        groups = with_unit_macs(base, few, groups)
    placed = {m.module for group in groups.values() for m in group.producers}
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


def _meets(coupling: Coupling, groups: Iterable[ChannelGroup]) -> bool:
    """Whether it is about channels of one of these groups."""
    makes = {m.module for group in groups for m in group.producers}
    reads = {m.module for group in groups for m in group.readers}
    return any(place.path in (makes if place.side == "out" else reads) for place in coupling.places)


def _bare_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without hooks, but for torch's own that compute a weight."""
    hooks: dict[int, Any] = {}
    for module in model.modules():
        for kind in _HOOKS:
            mine = getattr(module, kind)
            hooks[id(mine)] = OrderedDict(
                (key, hook)
                for key, hook in mine.items()
                if type(hook).__module__.startswith("torch.nn.utils.")
            )
    try:
        return copy_model(model, hooks).eval()
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise ChannelError(
            f"{type(model).__name__} cannot be copied, and its channels are looked for on a copy: "
            f"{type(error).__name__}: {said}"
        ) from error


def _traceable(base: nn.Module) -> nn.Module:
    traced = copy.deepcopy(base)
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
            output_tensors(first_call(base, batch))
    finally:
        for handle in handles:
            handle.remove()
    return dict(numbers)


def _has_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) and not is_depthwise(module)


def _sorted_out(
    base: nn.Module,
    couplings: Sequence[Coupling],
    order: Sequence[str],
    reasons: Mapping[str, str],
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """The couplings that make a group, by name, and by first producer why the others do not."""
    rank = {path: number for number, path in enumerate(order)}
    modules = dict(base.named_modules())
    stages = {
        f"{path}.{i}".lstrip("."): (path, i, len(module))
        for path, module in modules.items()
        if isinstance(module, FactoredConv2d | FactoredLinear)
        for i in range(len(module))
    }
    groups: dict[str, ChannelGroup] = {}
    left_alone: dict[str, str] = {}
    for coupling in couplings:
        reason = _refusal(modules.keys(), coupling, stages, reasons) or _misfit(modules, coupling)
        if reason is not None:
            left_alone.setdefault(coupling.root, reason)
            continue
        members: dict[Role, list[Member]] = {"producer": [], "carrier": [], "reader": []}
        for place in sorted(coupling.places, key=lambda p: rank[p.path]):
            role = _role(modules[place.path], place)
            if role is not None:
                path = stages[place.path][0] if place.path in stages else place.path
                members[role].append(Member(module=path, indices=coupling.places[place]))
        names = [m.module for m in members["producer"] if m.module not in groups]
        size = len(next(iter(coupling.places.values())))
        if not names:
            left_alone.setdefault(coupling.root, "its channels are divided among several readers")
        elif not members["reader"]:
            left_alone[names[0]] = "no layer reads its channels: they are an output of the model"
        elif size < 2:
            left_alone[names[0]] = "there is one channel only, and one has to stay"
        else:
            groups[names[0]] = ChannelGroup(
                size=size,
                producers=tuple(members["producer"]),
                carriers=tuple(members["carrier"]),
                readers=tuple(members["reader"]),
            )
    return groups, left_alone


def _role(module: nn.Module, place: Place) -> Role | None:
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return None  # one slope for all channels
    if isinstance(module, nn.Linear | nn.Conv2d) and not is_depthwise(module):
        return "producer" if place.side == "out" else "reader"
    return "carrier"


def _refusal(
    known: Collection[str],
    coupling: Coupling,
    stages: Mapping[str, tuple[str, int, int]],
    reasons: Mapping[str, str],
) -> str | None:
    """Why a coupling is no group, by what is in it."""
    for path, side in coupling.places:
        if path in stages:
            layer, stage, count = stages[path]
            outside = stage == count - 1 if side == "out" else stage == 0
            if not outside:
                return f"inside the factored layer '{layer}' there are ranks, which are no channels"
            if layer in reasons:
                return f"'{layer}': {reasons[layer]}"
        if path in reasons:
            return reasons[path] if path == coupling.root else f"'{path}': {reasons[path]}"
        if path not in known:
            return f"the parameter '{path}', outside of any known layer, goes with them"
    if coupling.is_output:
        return "they are an output of the model, whose shape would change"
    if not coupling.traceable:
        return "heads that are read several times lie between its channels and others"
    return None


def _misfit(modules: Mapping[str, nn.Module], coupling: Coupling) -> str | None:
    """Whether a place has not the channels that it is said to have: they were padded on the way."""
    for place, units in coupling.places.items():
        module = modules[place.path]
        if _role(module, place) is None:
            continue
        have = sides(module, name=place.path)
        size = have.inputs if place.side == "in" else have.outputs
        if any(not 0 <= channel < size for unit in units for channel in unit):
            return (
                f"they could not be followed to '{place.path}', which has {size} channels; "
                f"something without a layer of its own, such as padding, changes their number"
            )
    return None


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
