"""Writing torch.export's own format, and running it."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from eigendamage.batch import Batch
from eigendamage.errors import ExportError
from eigendamage.export._compare import Run
from eigendamage.export._quiet import quiet
from eigendamage.export._values import named_outputs, plain_output


def require_pt2(path: Path) -> None:
    """Raise `ExportError` if torch would not read a file of this name."""
    if path.suffix != ".pt2":
        raise ExportError(f"torch.export reads files ending in .pt2 only; found {path.name}")


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Write a program as ``torch.export.save`` does."""
    # By way of memory: torch's writer ends the process where a disk is full.
    content = io.BytesIO()
    with quiet():
        torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def run_pt2(path: Path) -> Run:
    """What runs the file, in torch."""
    with quiet():
        module = torch.export.load(path).module()

    def run(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return named_outputs(plain_output(module(*batch.args, **batch.kwargs)))

    return run
