"""export: a model as one file that runs without this package, compared before it is written."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from eigendamage.batches import Batches, Data
from eigendamage.calls import as_passed, device_of
from eigendamage.errors import ExportError, MissingFileError
from eigendamage.export._compare import Run, largest_difference, references
from eigendamage.export._fold import batchnorms, fold_batchnorm
from eigendamage.export._onnx import require_onnx, run_onnx, write_onnx
from eigendamage.export._plain import unmasked
from eigendamage.export._program import traced, widths
from eigendamage.export._pt2 import require_pt2, run_pt2, write_pt2
from eigendamage.export._source import run_source, write_source
from eigendamage.files import refuse_special, writing
from eigendamage.layers import copy_model, preserved_random_state

Format = Literal["onnx", "torch.export", "plain"]
_BLOCK = 8  # channels that processors and their libraries take together


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the model.

    Attributes:
        path: the file; of ``plain`` the folder.
        format: ``"onnx"``, ``"torch.export"`` or ``"plain"``.
        opset: of ONNX; None of the others.
        batch: the only batch size that it takes, None if it takes any.
        folded: batch norms that were folded into the layer before them.
        batch_norms: batch norms that there were.
        outputs: names of the outputs, in their order.
        max_difference: the largest absolute difference from the model, over all outputs and sizes.
        compared: the batch sizes at which it was compared.
        bytes: size of all that was written.
        convolutions: those that run and whose output is not the model's.
        odd_widths: those of them that put out a number of channels that is no multiple of 8.
    """

    path: Path
    format: Format
    opset: int | None
    batch: int | None
    folded: int
    batch_norms: int
    outputs: tuple[str, ...]
    max_difference: float
    compared: tuple[int, ...]
    bytes: int
    convolutions: int
    odd_widths: int

    def __str__(self) -> str:
        """One line for people, and what may cost them time."""
        kind = self.format if self.opset is None else f"ONNX, opset {self.opset}"
        batch = "any batch size" if self.batch is None else f"batches of {self.batch} only"
        sizes = ", ".join(map(str, self.compared))
        return (
            f"{self.path}: {kind}, {batch}, {self.bytes:,} bytes, {self.folded} of "
            f"{self.batch_norms} batch norms folded; largest difference "
            f"{self.max_difference:.2g} at batches of {sizes}{self._odd}"
        )

    @property
    def _odd(self) -> str:
        if self.format != "onnx" or not self.odd_widths:
            return ""
        return (
            f"\n{self.odd_widths} of {self.convolutions} convolutions put out a number of channels "
            f"that is no multiple of 8, which onnxruntime may run slower than more channels: where "
            f"time counts, compress with multiple=8, and measure"
        )


def export(
    model: nn.Module,
    path: str | Path,
    example: Data,
    *,
    format: Format = "onnx",
    opset: int = 18,
    fold: bool = True,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    progress: bool = True,
) -> Export:
    """Write a model, in eval mode, to a file that runs without this package.

    What was written is loaded again and its outputs are compared with the model's, on the example
    and, where the batch size is open, at a batch of one and at one more than the example has.
    ONNX is run in onnxruntime. Only then it gets its name.

    Args:
        model: any model that ``torch.export`` can trace; as it was afterwards. Of one that
            ``torch.compile`` returned, or ``nn.DataParallel`` and the like wrap, the original is
            written.
        path: the file to write; of ``format="plain"`` a folder, made if it is not there.
        example: data as everywhere in this library; its first batch is run. Inputs keep its sizes
            but for the batch. What is not a tensor in it becomes a constant.
        format: ``"onnx"``, ``"torch.export"`` (a ``.pt2`` file), or ``"plain"``: weights as
            safetensors and a short ``model.py`` of ``torch.nn`` parts, with a function ``load``.
        opset: of ONNX, 18 or later.
        fold: whether batch norms are folded into the Linear layer or convolution before them
            wherever the graph proves that they can be.
        dynamic_batch: whether any batch size is taken; otherwise that of the example.
        tolerance: the largest difference that is allowed, absolute for outputs up to 1 and relative
            to the output's largest value beyond.
        progress: whether the result is printed.

    Raises:
        ExportError: if there is no such format, if the model cannot be traced or written, if a
            package is missing, or if an output differs by more than the tolerance. No file is left
            then.
        DataError: if the model cannot run on the example.
        FileError: if it cannot be written, because the disk is full, say; nothing is left then.
        MissingFileError: if the folder that is to hold the file does not exist.
    """
    if format not in get_args(Format):
        known = ", ".join(map(repr, get_args(Format)))
        raise ExportError(f"format is {format!r}; expected one of {known}")
    model = _unwrapped(model)
    final = Path(path)
    _require_place(final, is_folder=format == "plain")
    if format == "onnx":
        require_onnx(opset)
    if format == "torch.export":
        require_pt2(final)
    with preserved_random_state():
        batch = as_passed(model, Batches(example, device_of(model)).peek())
        sizes = tuple(sorted({1, batch.size, batch.size + 1})) if dynamic_batch else (batch.size,)
        # In a copy: a forward may count its calls in a buffer.
        expected = references(copy_model(model), batch, sizes)
        batch = batch.on(torch.device("cpu"))
        program = traced(unmasked(model).cpu(), batch, dynamic_batch=dynamic_batch)
        norms = len(batchnorms(program))
        channels = widths(program)
        folded = fold_batchnorm(program) if fold else 0
        outputs = tuple(expected[sizes[0]])
        with _staged(final, is_folder=format == "plain") as staged:
            run = _write(program, staged, format, outputs, opset)
            difference = largest_difference(run, batch, expected, tolerance)
            size = sum(f.stat().st_size for f in staged.parent.rglob("*") if f.is_file())
    result = Export(
        path=final,
        format=format,
        opset=opset if format == "onnx" else None,
        batch=None if dynamic_batch else batch.size,
        folded=folded,
        batch_norms=norms,
        outputs=outputs,
        max_difference=difference,
        compared=sizes,
        bytes=size,
        convolutions=len(channels),
        odd_widths=sum(count % _BLOCK != 0 for count in channels),
    )
    if progress:
        print(result, file=sys.stderr)
    return result


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that was compiled, or given to several devices.

    Raises:
        ExportError: if it is a program of TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError(
            "the model is a program of TorchScript, which torch.export cannot trace; give the "
            "module that it was made of"
        )
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return _unwrapped(compiled)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    return model


def _require_place(path: Path, *, is_folder: bool) -> None:
    if not path.parent.is_dir():
        raise MissingFileError(
            f"cannot write {path}: the folder {path.parent} does not exist; make it, or give "
            f"another path"
        )
    if path.exists() and path.is_dir() != is_folder:
        raise ExportError(f"cannot write {path}: it is a {'file' if is_folder else 'folder'}")
    if not is_folder:
        refuse_special(path)


def _write(
    program: ExportedProgram, path: Path, format: Format, outputs: Sequence[str], opset: int
) -> Run:
    """Write a program, and say how to run what was written."""
    if format == "onnx":
        write_onnx(program, path, outputs, opset)
        return run_onnx(path)
    if format == "torch.export":
        write_pt2(program, path)
        return run_pt2(path)
    write_source(program, path)
    return run_source(path)


@contextmanager
def _staged(final: Path, *, is_folder: bool) -> Generator[Path]:
    """A path in a folder of its own to write to; all files in it move to their place at the end.

    A file may need others beside it, which it knows by name: names stay.
    """
    with (
        writing(final),
        tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder,
    ):
        staged = Path(folder) / final.name
        if is_folder:
            staged.mkdir()
        yield staged
        if is_folder:
            final.mkdir(exist_ok=True)
        source, target = (staged, final) if is_folder else (staged.parent, final.parent)
        # What the others are needed by comes last, so that it is never there without them.
        for file in sorted(source.iterdir(), key=lambda f: (f.name == final.name, f.suffix)):
            file.replace(target / file.name)
