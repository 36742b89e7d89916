"""Proof at run time that groups of channels can be removed: some are, and outputs compared."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eigendamage.batch import Batch
from eigendamage.calls import call, output_tensors
from eigendamage.errors import EigenDamageError
from eigendamage.layers._channel_graph import ChannelGraph, ChannelGroup
from eigendamage.layers._copy import copy_model
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear
from eigendamage.layers._slicing import channels_of, remove_units, zero_inputs

_SEED = 0
_PERTURBATION = 0.1
_UNIT_TRIALS = 4
_PRECISIONS = ((torch.float64, 1e-10), (torch.float32, 1e-4))
"""Types to compare outputs in, and by how much of the largest they may differ."""

Groups = Mapping[str, ChannelGroup]
Units = dict[str, list[int]]


@dataclass(frozen=True)
class _Subject:
    """A model in eval mode, what it is run on, and how far outputs may differ, of the largest."""

    model: nn.Module
    batch: Batch
    tolerance: float


def proven(base: nn.Module, batch: Batch, groups: Groups) -> tuple[Groups, dict[str, str]]:
    """The groups that can be removed, in any number and together, and why the others cannot.

    With random units of the groups sliced away, a copy must give the outputs that another gives
    in which the columns that read those units are zero. The copies are in float64, in float32 where
    that does not run, and their weights are perturbed alike: a branch that is zero proves nothing.

    All groups are tried at once. If that fails they are halved until the faulty ones stand alone,
    and the rest is tried together; if that fails too, groups are added one at a time and those
    that do not fit are refused.

    Args:
        base: a model in eval mode without hooks; it is copied. Random states are not preserved.
        batch: what to run it on.
        groups: the candidates.
    """
    if not groups:
        return {}, {}
    subject = _subject(base, batch)
    if subject is None:
        unknown = "no finite outputs in float64 or float32 to compare, so that nothing is proven"
        return {}, dict.fromkeys(groups, unknown)
    refused = _silent(subject, groups)
    rest = {key: group for key, group in groups.items() if key not in refused}
    if _fault(subject, rest) is None:
        return rest, refused
    kept, faulty = _halved(subject, rest)
    refused.update(faulty)
    if _fault(subject, kept) is None:
        return kept, refused
    together: dict[str, ChannelGroup] = {}
    for key, group in kept.items():
        fault = _fault(subject, {**together, key: group})
        if fault is None:
            together[key] = group
        else:
            refused[key] = f"together with other groups, {fault}"
    return together, refused


def _halved(subject: _Subject, groups: Groups) -> tuple[Groups, dict[str, str]]:
    """Groups in sets that stand the proof, found by halving, and the fault of each other group."""
    fault = _fault(subject, groups)
    if fault is None:
        return groups, {}
    if len(groups) == 1:
        return {}, dict.fromkeys(groups, fault)
    keys = list(groups)
    middle = len(keys) // 2
    first, first_faults = _halved(subject, {key: groups[key] for key in keys[:middle]})
    second, second_faults = _halved(subject, {key: groups[key] for key in keys[middle:]})
    return {**first, **second}, {**first_faults, **second_faults}


def _subject(base: nn.Module, batch: Batch) -> _Subject | None:
    """The most telling form of the model that runs and gives finite outputs."""
    for (precision, tolerance), perturbed in itertools.product(_PRECISIONS, (True, False)):
        try:
            model = copy_model(base).requires_grad_(False).to(precision)
            inputs = _in_precision(batch, precision)
            if perturbed:
                _perturb(model)
            if all(bool(torch.isfinite(t).all()) for t in _outputs(model, inputs)):
                return _Subject(model, inputs, tolerance)
        except Exception:  # noqa: BLE001 - the next form may do
            continue
    return None


def _in_precision(batch: Batch, precision: torch.dtype) -> Batch:
    def convert(item: Any) -> Any:
        real = isinstance(item, Tensor) and item.is_floating_point()
        return item.to(precision) if real else item

    args, kwargs = tree_map(convert, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, batch.target, batch.size)


def _perturb(model: nn.Module) -> None:
    """Noise on every parameter, a tenth of its root mean square (of one, if it is all zero)."""
    generator = torch.Generator().manual_seed(_SEED)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            scale = float(parameter.double().square().mean().sqrt()) or 1.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((_PERTURBATION * scale * noise).to(parameter))


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    torch.manual_seed(_SEED)  # a model may draw random numbers in eval mode, too
    with torch.no_grad():
        return output_tensors(call(model, batch))


def _silent(subject: _Subject, groups: Groups) -> dict[str, str]:
    """Groups of which some reader does not act on the outputs: nothing is shown about them."""
    model = copy_model(subject.model)
    readers = {m.module for group in groups.values() for m in group.readers}
    weights = {path: _reading_stage(model.get_submodule(path)).weight for path in readers}
    for weight in weights.values():
        weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(_SEED)
    try:
        torch.manual_seed(_SEED)
        with torch.enable_grad():
            outputs = [t for t in output_tensors(call(model, subject.batch)) if t.requires_grad]
        directions = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        torch.autograd.backward(outputs, directions)
    except Exception as error:  # noqa: BLE001 - a user's model may raise anything
        return dict.fromkeys(groups, f"no gradient to prove them by: {_line(error)}")
    reasons: dict[str, str] = {}
    for key, group in groups.items():
        for member in group.readers:
            grad = weights[member.module].grad
            if grad is None or not bool(grad[:, channels_of(member, range(group.size))].any()):
                reasons[key] = (
                    f"what '{member.module}' reads of them does not act on the outputs for these "
                    f"examples, so that nothing is proven"
                )
    return reasons


def _reading_stage(module: nn.Module) -> nn.Linear | nn.Conv2d:
    stage = module[0] if isinstance(module, FactoredConv2d | FactoredLinear) else module
    assert isinstance(stage, nn.Linear | nn.Conv2d)
    return stage


def _fault(subject: _Subject, groups: Groups) -> str | None:
    """What goes wrong when units of these groups are removed; None if nothing does."""
    if not groups:
        return None
    graph = ChannelGraph(groups=groups, carriers={}, left_alone={})
    for number, units in enumerate(_trials(groups)):
        fault = _difference(subject, graph, units)
        if fault is None and number == 0:
            fault = _training_fault(subject, graph, units)
        if fault is not None:
            return fault
    return None


def _trials(groups: Groups) -> Iterator[Units]:
    """Units to remove: about half of every group, then random numbers of them from some groups.

    A trial ``b`` of the first kind takes the units whose random rank in their group has bit ``b``
    set, which tells any two of up to 16 apart. One of the second kind takes the groups whose
    number has bit ``b`` set, which tells any two groups apart: those that can only go in step, or
    only in equal numbers, do not pass.
    """
    generator = torch.Generator().manual_seed(_SEED)

    def shuffled(group: ChannelGroup) -> list[int]:
        return torch.randperm(group.size, generator=generator).tolist()

    def some(group: ChannelGroup) -> list[int]:
        count = int(torch.randint(1, group.size, (), generator=generator))
        return shuffled(group)[:count]

    ranked = {key: shuffled(group) for key, group in groups.items()}
    for bit in range(_UNIT_TRIALS):
        yield {
            key: [unit for rank, unit in enumerate(units) if rank >> bit & 1] or some(groups[key])
            for key, units in ranked.items()
        }
    for bit in range((len(groups) - 1).bit_length()):
        yield {
            key: some(group)
            for number, (key, group) in enumerate(groups.items())
            if number >> bit & 1
        }


def _variant(subject: _Subject) -> nn.Module:
    """A copy with the same parameters, to replace some of."""
    return copy_model(subject.model, {id(p): p for p in subject.model.parameters()})


def _difference(subject: _Subject, graph: ChannelGraph, units: Units) -> str | None:
    smaller, zeroed = _variant(subject), _variant(subject)
    unread: dict[str, list[int]] = defaultdict(list)
    for key, gone in units.items():
        for member in graph.groups[key].readers:
            unread[member.module] += channels_of(member, gone)
    for path, channels in unread.items():
        reader = zeroed.get_submodule(path)
        stage = _reading_stage(reader)
        stage.weight = nn.Parameter(stage.weight.clone(), requires_grad=False)
        zero_inputs(reader, channels, name=path)
    expected = _outputs(zeroed, subject.batch)
    try:
        remove_units(smaller, graph, units)
        found = _outputs(smaller, subject.batch)
    except Exception as error:  # noqa: BLE001 - a user's model may raise anything
        return f"the model does not run without some of them: {_line(error)}"
    if [t.shape for t in found] != [t.shape for t in expected]:
        return "the model's outputs change their shape without some of them"
    for have, want in zip(found, expected, strict=True):
        scale = float(want.abs().max()) if want.numel() else 0.0
        error = float((have - want).abs().max()) if want.numel() else 0.0
        if not error <= subject.tolerance * scale:
            return (
                f"removing them is not the same as not reading them: outputs differ by {error:.1e} "
                f"of {scale:.1e}, so that something else depends on them"
            )
    return None


def _training_fault(subject: _Subject, graph: ChannelGraph, units: Units) -> str | None:
    """Whether the smaller model fails in train mode, where the whole one runs.

    Parts that run in training only (auxiliary classifiers) are not in the graph.
    """
    whole, smaller = _variant(subject), _variant(subject)
    try:
        expected = _outputs(whole.train(), subject.batch)
    except Exception:  # noqa: BLE001 - two examples may be too few for batch norm
        return None
    try:
        remove_units(smaller, graph, units)
        found = _outputs(smaller.train(), subject.batch)
    except Exception as error:  # noqa: BLE001 - a user's model may raise anything
        return f"in train mode the model does not run without some of them: {_line(error)}"
    if [t.shape for t in found] != [t.shape for t in expected]:
        return "in train mode the model's outputs change their shape without some of them"
    return None


def _line(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, EigenDamageError) else f"{type(error).__name__}: {said}"
