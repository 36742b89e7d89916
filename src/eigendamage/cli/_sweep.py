"""eigendamage sweep: one model at many budgets, predicted and measured, as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer
from rich.console import Console

from eigendamage.cli._completion import MODEL_HELP, model_names
from eigendamage.cli._parsing import SweepUnit, checked_seed, floors, kinds, refuse_unwritable
from eigendamage.cli._parsing import budgets as budgets_of
from eigendamage.cli._sources import load_data, load_model
from eigendamage.compress import sweep
from eigendamage.curvature import Fisher
from eigendamage.files import alone_in, make_folder
from eigendamage.plan import ACTIONS, Budget
from eigendamage.report import SweepRow, number, percent, plot_sweep, print_sweep

_BUDGETS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"


def sweep_command(
    model: str = typer.Option(..., help=MODEL_HELP, autocompletion=model_names),
    data: str = typer.Option(
        ...,
        help="Folder, .zip, .npz, module:callable or zoo:fashion-mnist, as for compress; labels "
        "optional.",
    ),
    out: Path = typer.Option(..., help="Folder for the results; made if it is not there."),
    weights: Path | None = typer.Option(None, help="Trained weights, .safetensors or .pt."),
    pretrained: bool = typer.Option(
        False, "--pretrained", help="For timm: and torchvision:, fetch the weights they have."
    ),
    budgets: str | None = typer.Option(
        None,
        help=f"What to leave of the model, in fractions by commas; {_BUDGETS} by default. With "
        "--unit loss the divergences to stay below, which have no default.",
    ),
    unit: SweepUnit = typer.Option(
        "macs",
        help="What budgets are of; latency as measured on this device, loss as a divergence from "
        "the original in nats.",
    ),
    measure: str = typer.Option(
        "none", help="Which of them to build, repair and measure: all, none or some by commas."
    ),
    multiple: int | None = typer.Option(
        None, min=1, help="Ranks and channels left are multiples of this; 8 for latency, else 1."
    ),
    latency_batch: int = typer.Option(1, min=1, help="Images a call where latency is measured."),
    floor: list[str] = typer.Option(
        [], help="PATTERN=FRACTION of its MACs that a layer has to keep; may be repeated."
    ),
    actions: str = typer.Option(",".join(ACTIONS), help="What may be done to layers, by commas."),
    repair: bool = typer.Option(True, help="Refit what is built on the data, without labels."),
    calibrate: bool = typer.Option(True, help="Correct prices by what layers cost alone."),
    fisher: Fisher = typer.Option("mc", help="Labels of the curvature."),
    ignore: list[str] = typer.Option([], help="Pattern of layers to leave alone; may be repeated."),
    examples: int = typer.Option(2000, min=1, help="The most images to take the curvature on."),
    test_examples: int | None = typer.Option(None, min=1, help="The most images to measure on."),
    batch_size: int = typer.Option(128, min=1, help="Images a batch."),
    seed: int = typer.Option(
        0, callback=checked_seed, help="Of the choice of images and of label draws."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the sweep as JSON."),
    quiet: bool = typer.Option(False, help="No progress, no tables."),
) -> None:
    """Predict what a model loses at many budgets, by one curvature, and measure it where asked.

    The folder OUT gets sweep.json, sweep.svg and sweep.png. Every budget is planned as compress
    plans it, those of latency and loss by building and measuring; one that cannot be met is a row
    that says why. If none can, there is no plot, and the exit code is 4.
    """
    refuse_unwritable(out)
    if budgets is None and unit == "loss":
        raise typer.BadParameter(
            "a sweep of losses needs them: divergences in nats, by commas", param_hint="--budgets"
        )
    goals = budgets_of(_BUDGETS if budgets is None else budgets, unit, "--budgets")
    floor_of, allowed = floors(floor), kinds(actions)
    to_measure = _to_measure(measure, unit)
    network = load_model(model, weights, pretrained=pretrained)
    images = load_data(
        data, examples=examples, batch_size=batch_size, seed=seed, test_examples=test_examples
    )
    console = Console(quiet=quiet or as_json)

    def tell(row: SweepRow) -> None:
        said = "cannot be met" if row.error else f"priced at {number(row.priced)}"
        if row.measured is not None:
            said += f", accuracy {percent(row.measured.accuracy)}"
            said += f", divergence {number(row.measured.divergence)}"
        console.print(f"{row.budget}: {said}", highlight=False)

    with alone_in(out):
        result = sweep(
            network,
            images.data,
            budgets=goals,
            measure=to_measure,
            eval_data=images.eval_data,
            fisher=fisher,
            ignore=ignore,
            actions=allowed,
            multiple=multiple,
            latency_batch=latency_batch,
            floors=floor_of,
            calibrate=calibrate,
            repair=repair,
            max_examples=examples,
            seed=seed,
            progress=not quiet,
            on_row=tell,
        )
        make_folder(out)
        result.save(out / "sweep.json")
        print_sweep(result, console)
        for kind in ("svg", "png"):
            plot_sweep(result, out / f"sweep.{kind}")
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    console.print(f"Written to {out}.")


def _to_measure(text: str, unit: SweepUnit) -> list[Budget] | Literal["none", "all"]:
    match text:
        case "all" | "none":
            return text
        case _:
            return budgets_of(text, unit, "--measure")
