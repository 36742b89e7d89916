"""save and load: a compressed model as a folder, without code in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from eigendamage.documents import Document
from eigendamage.errors import EigenDamageError, MismatchError, MissingFileError, warn
from eigendamage.files import written_together
from eigendamage.layers import saved_tensors
from eigendamage.plan import Plan
from eigendamage.report import Report, write_page
from eigendamage.saving._describe import describe
from eigendamage.saving._held import contradiction, disagreement
from eigendamage.saving._rebuild import rebuild
from eigendamage.saving._structure import Structure
from eigendamage.saving._weights import read_weights, write_weights
from eigendamage.surgery import Made, made_by, set_made

WEIGHTS = "model.safetensors"
PLAN = "plan.json"
REPORT = "report.json"
STRUCTURE = "structure.json"
PAGE = "report.html"
_FILES = (WEIGHTS, PLAN, REPORT, PAGE, STRUCTURE)  # the structure last: it says that all is there
D = TypeVar("D", bound=Document)


@runtime_checkable
class Result(Protocol):
    """A model with the plan and the report that came with it, as `compress` returns."""

    @property
    def model(self) -> nn.Module:
        """The smaller model."""
        ...

    @property
    def plan(self) -> Plan:
        """What was done to each layer."""
        ...

    @property
    def report(self) -> Report:
        """What was expected and what was measured."""
        ...


def save(what: nn.Module | Result, directory: str | Path) -> None:
    """Write a model to a folder from which `load` makes it again. Nothing is pickled.

    The folder gets ``model.safetensors`` (the weights, every tensor once), ``structure.json`` (what
    became of each module: forms, ranks, dropped channels), and ``plan.json``, ``report.json`` and
    ``report.html`` where they are known: a model that `compress` returned knows plan and report,
    also after training and in copies, one that `apply_plan` returned its plan. They tell how the
    model came about; `load` needs neither to rebuild it.

    A new folder appears whole or not at all. In one that is there these files are replaced, and
    others are left alone.

    Args:
        what: the model, as it is now, or the result of `compress`.
        directory: the folder; made if it is not there.

    Raises:
        EigenDamageError: if the model has state that is no tensor, or a tensor of a kind that
            safetensors does not know.
        LayerError: if a stage of a factored layer is no plain layer any more.
        NotAFolderError: if there is a file of that name.
    """
    if isinstance(what, nn.Module):
        # A compiled model wraps the one that it was made of, and shares its tensors.
        inner = getattr(what, "_orig_mod", what)
        model: nn.Module = inner if isinstance(inner, nn.Module) else what
        made = made_by(model)
    else:
        model, made = what.model, Made(what.plan, what.report)
    structure = describe(model)
    with written_together(directory, _FILES) as folder:
        write_weights(model, structure.ties, folder / WEIGHTS)
        structure.save(folder / STRUCTURE)
        if made is not None:
            made.plan.save(folder / PLAN)
            if isinstance(made.report, Report):
                made.report.save(folder / REPORT)
                write_page(made.report, folder / PAGE)


def load(
    model: nn.Module, directory: str | Path, *, device: str | torch.device | None = None
) -> nn.Module:
    """The model that `save` wrote, made of the original model and the folder.

    The structure is rebuilt without curvature or data, then the weights are read. The loaded
    model's state dict equals that of the saved one bit for bit, dtypes included. Its mode, its
    hooks and the buffers that are not in the state dict are those of ``model``, which is not
    changed.

    Args:
        model: the original, not compressed, as it was given to `compress`; its weights do not
            matter, it may be on the meta device if it has no buffer that is not saved.
        directory: what `save` wrote.
        device: where the loaded model is to be; by default each part where it is in ``model``,
            on the CPU for parts on the meta device.

    Raises:
        MismatchError: if ``model`` is not the original; the first name that does not fit is named,
            with both shapes.
        FileFormatError: if the structure or the weights are damaged, of another version, or do not
            fit one another.
        MissingFileError: if one of the two is missing.

    Warns:
        UserWarning: if the plan or the report cannot be read, if the plan is not what the
            structure came about by, or the report not of that plan. The model is loaded without
            it.
    """
    folder = Path(directory)
    structure = Structure.load(folder / STRUCTURE)
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(f"there is no {WEIGHTS} in {folder}")
    loaded = restore(model, structure, [folder / WEIGHTS], device=device)
    made, faults = _made(folder, structure)
    knows = "neither its plan nor its report" if made is None else "its plan and no report"
    for fault in faults:
        warn(
            f"{fault}. The model is whole without it, and is loaded as one that knows {knows}; "
            f"save it to another folder, as files here would be replaced"
        )
    if made is not None:
        set_made(loaded, made)
    return loaded


def restore(
    model: nn.Module,
    structure: Structure,
    weights: Sequence[Path],
    *,
    device: str | torch.device | None,
) -> nn.Module:
    """`load`, with the weights in one or several safetensors files."""
    smaller = rebuild(model, structure)
    for name, buffer in smaller.named_buffers():
        if buffer.is_meta and name not in {saved for saved, _ in saved_tensors(smaller)}:
            raise MismatchError(
                f"buffer '{name}' of the model is on the meta device and is not in the file, so "
                f"its values are unknown; build the model on the CPU"
            )
    names = [name for name, _ in saved_tensors(smaller)]
    places = _places(model, names) if device is None else dict.fromkeys(names, torch.device(device))
    read_weights(smaller, structure, weights, places)
    return smaller if device is None else smaller.to(device)


def _made(folder: Path, structure: Structure) -> tuple[Made | None, list[str]]:
    """What the folder tells of how the model was made, and what of it cannot be taken, and why."""
    faults: list[str] = []
    report = _told(Report, folder / REPORT, faults)
    plan = _told(Plan, folder / PLAN, faults)
    if plan is not None and (odd := contradiction(plan, structure)) is not None:
        faults.append(f"{folder / PLAN}, of method '{plan.method}', is of another model: {odd}")
        return None, faults
    if plan is not None and report is not None and (odd := disagreement(report, plan)) is not None:
        faults.append(f"{folder / REPORT} is not of the plan beside it: {odd}")
        report = None
    if plan is not None:
        return Made(plan, report), faults
    if report is not None and not faults:
        faults.append(f"{folder / REPORT} belongs to a plan, and there is no {PLAN} to be read")
    return None, faults


def _told(kind: type[D], path: Path, faults: list[str]) -> D | None:
    """A document; None where there is none, or where it cannot be read, which is a fault."""
    if not path.exists():
        return None
    try:
        return kind.load(path)
    except (EigenDamageError, OSError) as error:
        faults.append(str(error))
        return None


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, torch.device]:
    """The device of each of these tensors: its own, or that of the part of the model it is in."""
    known: dict[str, torch.device] = {}
    for name, tensor in saved_tensors(model):
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        parts = name.split(".")
        for depth in range(len(parts), -1, -1):
            known.setdefault(".".join(parts[:depth]), device)
    places: dict[str, torch.device] = {}
    for name in names:
        part = name
        while part not in known:
            part = part.rpartition(".")[0]
        places[name] = known[part]
    return places
