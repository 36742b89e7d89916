"""eigendamage export: a saved folder as one file that runs without this package."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import typer

from eigendamage.cli._completion import MODEL_HELP, model_names
from eigendamage.cli._parsing import checked_seed
from eigendamage.cli._sources import load_data, load_model
from eigendamage.export import Format, export
from eigendamage.saving import load

_EXAMPLES = 4


def export_command(
    folder: Path = typer.Argument(help="What compress wrote to --out, or eigendamage.save."),
    model: str = typer.Option(..., help=MODEL_HELP, autocompletion=model_names),
    out: Path = typer.Option(..., help="File to write; of --format plain a folder."),
    data: str | None = typer.Option(None, help="Inputs to compare on, as for compress."),
    shape: str | None = typer.Option(
        None, help="Sizes of one input without the batch, as 3x32x32: random inputs, no --data."
    ),
    format: Format = typer.Option("onnx", help="onnx, torch.export or plain."),
    opset: int = typer.Option(18, help="Of ONNX."),
    fold: bool = typer.Option(True, help="Fold batch norms into the layers before them."),
    dynamic_batch: bool = typer.Option(True, help="Take any batch size, not the example's alone."),
    tolerance: float = typer.Option(1e-4, help="The largest difference of outputs allowed."),
    seed: int = typer.Option(0, callback=checked_seed, help="Of the choice of inputs."),
    as_json: bool = typer.Option(False, "--json", help="Print what was written as JSON."),
) -> None:
    """Write a compressed model as ONNX, for torch.export, or as plain torch.nn code.

    The file gets its name only after its outputs were compared with the model's. MODEL is the
    original that was compressed; its weights do not matter.
    """
    if (data is None) == (shape is None):
        raise typer.BadParameter("give --data or --shape, one of them")
    sizes = [] if shape is None else _sizes(shape)
    original = load_model(model, None, quiet=True)
    small = load(original, folder)
    if shape is not None:
        draws = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(_EXAMPLES, *sizes, generator=draws)]
    else:
        assert data is not None
        inputs = load_data(
            data, examples=_EXAMPLES, batch_size=_EXAMPLES, seed=seed, test_examples=1
        ).data
    done = export(
        small,
        out,
        inputs,
        format=format,
        opset=opset,
        fold=fold,
        dynamic_batch=dynamic_batch,
        tolerance=tolerance,
        progress=False,
    )
    if as_json:
        typer.echo(json.dumps(asdict(done), default=str, indent=1))
    else:
        typer.echo(str(done))


def _sizes(text: str) -> list[int]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"it is '{text}'; expected sizes like 3x224x224", param_hint="--shape"
        )
    return [int(size) for size in sizes]
