"""A plan and a report held against the model that they are said to be of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from eigendamage.layers import join
from eigendamage.plan import (
    Action,
    Channels,
    DepthwiseBlock,
    EigenBlock,
    LayerPlan,
    LowRank,
    Mask,
    Plan,
)
from eigendamage.report import Report, layer_reports
from eigendamage.saving._structure import ModuleForm, Stages, Structure


def contradiction(plan: Plan, structure: Structure) -> str | None:
    """What a structure has otherwise than the plan that came last left it, in words.

    None if nothing speaks against the plan. Earlier plans may have changed layers that this one
    keeps, and layers of which the structure notes no change may have been factored and multiplied
    out again, masked for good, or put there by hand, as a new classifier: of those only sizes tell
    something, and only where they are others in most layers of the plan.
    """
    unlike: list[str] = []
    for name, planned in plan.layers.items():
        if not any(tensor.startswith(join(name, "")) for tensor in structure.original):
            return f"layer '{name}' of the plan is not in {structure.model}"
        form = structure.modules.get(name)
        if form is None:
            unlike += _unlike(name, planned, structure)
            continue
        found = _sizes(name, form, structure)
        left = _left(planned)
        if found is not None and found != left:
            return (
                f"the plan leaves {left[0]} outputs and {left[1]} inputs of layer '{name}', the "
                f"model has {found[0]} and {found[1]}"
            )
        if odd := _other_form(planned.action, form):
            return f"layer '{name}' is {odd} in the model, the plan has it as {_said(planned)}"
    return unlike[0] if 2 * len(unlike) > len(plan.layers) else None


def disagreement(report: Report, plan: Plan) -> str | None:
    """What a report says of layers otherwise than the plan that it came with, in words.

    None if nothing does. Sizes before may be those of an earlier plan, and tell nothing.
    """
    told = layer_reports(plan)
    if odd := sorted(told.keys() ^ report.layers.keys()):
        there, missing = ("plan", "report") if odd[0] in told else ("report", "plan")
        return f"layer '{odd[0]}' of the {there} is not in the {missing}"
    for name, ours in told.items():
        its = report.layers[name]
        for what, said, meant in (
            ("parameters left", its.parameters[1], ours.parameters[1]),
            ("MACs left", its.macs[1], ours.macs[1]),
            ("ranks", its.ranks, ours.ranks),
            ("a price", its.price, ours.price),
        ):
            if said != meant:
                return f"of layer '{name}' the report says {what} of {said}, the plan {meant}"
    return None


def _unlike(name: str, planned: LayerPlan, structure: Structure) -> list[str]:
    """What a layer that the model has as it was has otherwise than the plan left it."""
    shape = structure.original.get(join(name, "weight"))
    if shape is None or len(shape) < 2:
        return []
    found = (*shape[:2], prod(shape[2:]))
    left = _left(planned)
    if found == planned.shape and found[:2] == left:
        return []
    return [
        f"the plan leaves {left[0]} outputs and {left[1]} inputs of layer '{name}' of shape "
        f"{planned.shape}, the model has it unchanged, of shape {found}"
    ]


def _left(planned: LayerPlan) -> tuple[int, int]:
    action = planned.action
    if isinstance(action, Channels):
        return len(action.outputs), len(action.inputs)
    return planned.shape[0], planned.shape[1]


def _sizes(name: str, form: ModuleForm, structure: Structure) -> tuple[int, int] | None:
    """Outputs and inputs that are left; None where the original was no plain layer."""
    shape = structure.original.get(join(name, "weight"))
    if shape is None or len(shape) < 2:
        return None
    return shape[0] - len(form.dropped_outputs), shape[1] - len(form.dropped_inputs)


def _other_form(action: Action, form: ModuleForm) -> str | None:
    """What a layer is that it cannot be by an action; None if nothing speaks against it."""
    factors = isinstance(action, EigenBlock | DepthwiseBlock | LowRank)
    if factors and form.masked:
        return "masked"
    if form.stages is None or len(form.stages.layers) == 1:
        return None
    if isinstance(action, Mask):
        return "factored"
    widths = _widths(form.stages)
    planned = _planned_widths(action)
    if planned is None:
        return None
    fits = len(widths) == len(planned) and all(
        want in (None, have) for have, want in zip(widths, planned, strict=True)
    )
    return None if fits else f"factored by ranks {', '.join(map(str, widths))}"


def _widths(stages: Stages) -> Sequence[int]:
    return [stage.outputs for stage in stages.layers[:-1]]


def _planned_widths(action: Action) -> Sequence[int | None] | None:
    """Outputs of all stages but the last; None for those that only its packed basis tells."""
    match action:
        case EigenBlock(form=form, rows=rows, columns=columns):
            by_form = {
                "three": (len(columns), len(rows)),
                "merge_in": (len(rows),),
                "merge_out": (len(columns),),
            }
            return by_form[form]
        case DepthwiseBlock(rank=rank):
            return rank, rank
        case LowRank(form=form, rank=rank):
            return {"three": (None, rank), "merge_in": (rank,), "merge_out": (None,)}[form]
        case _:
            return None


def _said(planned: LayerPlan) -> str:
    widths = _planned_widths(planned.action)
    if widths is None:
        return planned.action.kind
    ranks = ("any" if width is None else str(width) for width in widths)
    return f"{planned.action.kind} of ranks {', '.join(ranks)}"
