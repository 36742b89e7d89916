"""A plan held against the structure of the model that it is said to have made."""

from __future__ import annotations

from collections.abc import Sequence

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
from eigendamage.saving._structure import ModuleForm, Stages, Structure


def contradiction(plan: Plan, structure: Structure) -> str | None:
    """What a structure has otherwise than the plan that came last left it, in words.

    None if nothing speaks against the plan. Earlier plans may have changed layers that this one
    keeps, and layers of which the structure notes no change may have been factored and multiplied
    out again, or masked for good: those tell nothing.
    """
    for name, planned in plan.layers.items():
        if not any(tensor.startswith(join(name, "")) for tensor in structure.original):
            return f"layer '{name}' of the plan is not in {structure.model}"
        form = structure.modules.get(name)
        if form is None:
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
    return None


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
