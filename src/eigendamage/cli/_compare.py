"""eigendamage compare: several methods at equal budgets, as a table, a plot and JSON."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from eigendamage import zoo
from eigendamage.batches import iterable_of
from eigendamage.cli._completion import MODEL_HELP, model_names
from eigendamage.cli._parsing import budgets as budgets_of
from eigendamage.cli._parsing import checked_seed
from eigendamage.cli._parsing import methods as methods_of
from eigendamage.cli._sources import Images, load_data, load_model
from eigendamage.compare import ALL, compare
from eigendamage.curvature import Fisher
from eigendamage.errors import DataError
from eigendamage.plan import Unit
from eigendamage.report import Row, number, percent, plot_comparison, print_comparison

_BATCH = 125


def compare_command(
    methods: str = typer.Option(
        "all", help="METHOD[:VARIANT][@ROUNDS], by commas, or all: " + ", ".join(ALL)
    ),
    budgets: str = typer.Option("0.5,0.35", help="Fractions of the model to leave, by commas."),
    unit: Unit = typer.Option("macs", help="What budgets are fractions of."),
    epochs: int = typer.Option(1, min=0, help="Training after each compression."),
    model: str = typer.Option("zoo:demo_network", help=MODEL_HELP, autocompletion=model_names),
    weights: Path | None = typer.Option(None, help="Trained weights, .safetensors or .pt."),
    pretrained: bool = typer.Option(
        False, "--pretrained", help="For timm: and torchvision:, fetch the weights they have."
    ),
    data: str | None = typer.Option(
        None,
        help="Folder, .zip, .npz or module:callable, as for compress; the bundled images if none.",
    ),
    out: Path = typer.Option(Path("eigendamage-compare"), help="Folder for the results."),
    examples: int = typer.Option(2000, min=1, help="The most images to take the curvature on."),
    train_examples: int = typer.Option(2000, min=1, help="The most labelled images of an epoch."),
    test_examples: int | None = typer.Option(None, min=1, help="The most images to measure on."),
    batch_size: int = typer.Option(_BATCH, min=1, help="Images a batch."),
    learning_rate: float = typer.Option(0.02, help="Peak of the one-cycle schedule."),
    fisher: Fisher = typer.Option("mc", help="Labels of the curvature."),
    seed: int = typer.Option(
        0, callback=checked_seed, help="Of the choice of images, label draws and shuffling."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
    quiet: bool = typer.Option(False, help="No progress, no tables."),
) -> None:
    """Compress one model by several methods to equal budgets, train each alike, and measure.

    The folder OUT gets comparison.json, after every row, and comparison.png. Run again with the
    same settings, it does only what is missing. Without --model and --data it compares on the
    bundled network and images.
    """
    competitors = methods_of(methods)
    goals = [goal.given[unit] for goal in budgets_of(budgets, unit, "--budgets")]
    network = load_model(model, weights, pretrained=pretrained)
    images = _images(data, max(examples, train_examples), batch_size, seed, test_examples)
    if images.eval_data is None:
        raise DataError(f"--data {data}: there is nothing to measure on; return (data, eval_data)")
    console = Console(quiet=quiet or as_json)

    def tell(row: Row) -> None:
        final = row.final
        said = f"refused: {row.refused}" if final is None else percent(final.accuracy)
        loss = "" if final is None else f", loss {number(final.loss)}"
        console.print(f"{row.method} at {row.budget:g}: {said}{loss}", highlight=False)

    result = compare(
        network,
        images.data,
        eval_data=images.eval_data,
        methods=competitors,
        budgets=goals,
        unit=unit,
        train_data=_training(images, train_examples, batch_size, seed) if epochs else None,
        epochs=epochs,
        learning_rate=learning_rate,
        fisher=fisher,
        max_examples=examples,
        measured_on=images.where,
        out=out,
        command=shlex.join(["eigendamage", *sys.argv[1:]]),
        seed=seed,
        progress=not quiet,
        on_row=tell,
    )
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    print_comparison(result, console)
    plot_comparison(result, out / "comparison.png")
    console.print(f"Written to {out}.")


def _images(
    source: str | None, examples: int, batch_size: int, seed: int, test_examples: int | None
) -> Images:
    if source is not None:
        return load_data(
            source,
            examples=examples,
            batch_size=batch_size,
            seed=seed,
            test_examples=test_examples,
        )
    test = zoo.fashion_mnist("test").take(slice(0, test_examples))
    train = zoo.fashion_mnist("train").take(slice(0, examples))
    return Images(train.batches(batch_size), test.batches(batch_size), "the bundled test images")


def _training(
    images: Images, examples: int, batch_size: int, seed: int
) -> Callable[[], Iterable[Any]]:
    """Batches to train on, the same for every call; images are shuffled and augmented."""
    data = images.data
    if isinstance(data, zoo.ImageBatches):
        source = data.source.take(slice(0, examples))
        return lambda: source.batches(batch_size, shuffle_seed=seed, augment=True)
    return lambda: iterable_of(data)
