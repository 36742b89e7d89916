"""Writing ONNX, and running it in onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from eigendamage.batch import Batch, tensors_in
from eigendamage.errors import ExportError
from eigendamage.export._compare import Run
from eigendamage.export._quiet import quiet

OLDEST_OPSET = 18
"""The opset that torch's exporter writes; it converts upwards only."""


def require_onnx(opset: int) -> None:
    """Raise `ExportError` unless this opset can be written and all is installed that it needs."""
    if opset < OLDEST_OPSET:
        raise ExportError(f"opset {opset} cannot be written; the oldest is {OLDEST_OPSET}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise ExportError(
                f"{package} is not installed; pip install 'eigendamage[export]'"
            ) from error


def write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str], opset: int) -> None:
    """Write a program as ONNX; weights of more than 2 GB go to ``{path}.data`` beside it.

    Raises:
        ExportError: if an operation of the program has no ONNX form, or none in this opset.
    """
    with quiet():
        try:
            onnx: Any = torch.onnx.export(
                program, output_names=list(outputs), opset_version=opset, dynamo=True, verbose=False
            )
        except Exception as error:  # the exporter has errors of many kinds
            raise ExportError(
                f"torch.onnx cannot export the model: {_first_line(_root(error))}. torch's whole "
                f"message is the cause of this error; format='torch.export' may do"
            ) from error
        found = onnx.model.opset_imports.get("")
        if found != opset:
            raise ExportError(
                f"torch.onnx wrote opset {found} where {opset} was asked for: an operation of the "
                f"model has no form in it. Give opset={found}"
            )
        first = [value.shape[0] for value in onnx.model.graph.inputs if len(value.shape)]
        onnx.rename_axes({axis: "batch" for axis in first if not isinstance(axis, int)})
        onnx.save(path)


def run_onnx(path: Path) -> Run:
    """What runs the file in onnxruntime, on the CPU.

    Raises:
        ExportError: if onnxruntime cannot load it.
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ExportError(
            f"onnxruntime cannot load the model: {_first_line(error)}. It has few operations for "
            f"other types than float32: if the model is of another, export model.float()"
        ) from error
    inputs = [i.name for i in session.get_inputs()]
    names = [o.name for o in session.get_outputs()]

    def run(batch: Batch) -> dict[str, Tensor]:
        tensors = tensors_in([*batch.args, *batch.kwargs.values()])
        try:
            feed = {name: t.numpy() for name, t in zip(inputs, tensors, strict=True)}
            values = session.run(names, feed)
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot run the model on inputs of shape {batch.shapes()}: "
                f"{_first_line(error)}"
            ) from error
        return {name: torch.as_tensor(v) for name, v in zip(names, values, strict=True)}

    return run


def _root(error: BaseException) -> BaseException:
    """What an error was raised from: the exporter's own say in which step of it, not why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    words = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((x.strip() for x in words.splitlines() if x.strip()), type(error).__name__)
