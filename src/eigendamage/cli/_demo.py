"""eigendamage demo: the bundled network on the bundled images, at three budgets, in two ways."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from eigendamage import zoo
from eigendamage.cli._parsing import checked_seed
from eigendamage.compress import compress
from eigendamage.curvature import Curvature
from eigendamage.errors import MissingFileError
from eigendamage.files import written_beside
from eigendamage.measure import evaluate
from eigendamage.plan import Budget
from eigendamage.report import Report, Sweep, SweepRow, write_page
from eigendamage.training import FinetuneConfig, finetune

BUDGETS = (0.7, 0.5, 0.35)
_METHODS = {"auto": "auto", "eigendamage": "paper"}  # and their names in the table
_IMAGES = 2000
_TRACED = 64
_BATCH = 125


def demo_command(
    out: Path = typer.Option(
        Path("eigendamage-demo.json"),
        help="Where the reports go, as JSON; beside it one as a page.",
    ),
    seed: int = typer.Option(
        0, callback=checked_seed, help="Of label draws, shuffling and augmentation."
    ),
    finetuning: bool = typer.Option(False, help="Fine-tune each for one epoch, with labels."),
    as_json: bool = typer.Option(False, "--json", help="Print the report instead of the table."),
    quiet: bool = typer.Option(False, help="No progress."),
) -> None:
    """Compress the bundled network at three budgets and show what that cost.

    A residual network of 0.7 M parameters, trained on 12,000 images of Fashion-MNIST, and the 2,000
    test images beside them. At each budget the default method, and the paper's to compare, take
    2,000 training images without their labels; nothing is trained unless asked for.
    """
    if not out.parent.is_dir():
        raise MissingFileError(
            f"--out {out}: the folder {out.parent} does not exist; make it, or give another path"
        )
    console = Console(quiet=as_json)
    model = zoo.demo_network()
    train, test = zoo.fashion_mnist("train"), zoo.fashion_mnist("test")
    unlabeled = zoo.ImageSet(train.images[:_IMAGES]).batches(_BATCH)
    held_out = test.batches(_BATCH)

    table = _empty_table(finetuning)
    curvature: Curvature | None = None
    entries: list[dict[str, Any]] = []
    reports: list[Report] = []
    for fraction in BUDGETS:
        entry: dict[str, Any] = {}
        for method, label in _METHODS.items():
            start = time.perf_counter()
            result = compress(
                model,
                unlabeled,
                budget=Budget(macs=fraction),
                method=method,
                eval_data=held_out,
                curvature=curvature,
                calibration_examples=_TRACED if curvature is None else 0,
                seed=seed,
                progress=not quiet,
            )
            seconds = time.perf_counter() - start
            report = result.report
            if method == "auto":
                reports.append(report)
            if curvature is None:
                before = _percent(report.original.accuracy)
                table.add_row("100%", "100%", "as it is", before)
            curvature = result.curvature
            tuned = None
            if finetuning:
                tuned = _tuned(result.model, train, held_out, seed=seed, progress=not quiet)
            table.add_row(*_row(label, report, tuned, seconds))
            entry[method] = {
                "report": report.model_dump(mode="json"),
                "finetuned": tuned,
                "seconds": seconds,
            }
        entries.append(entry)

    console.print(table)
    console.print(
        "auto: the default method. paper: --method eigendamage, one threshold and no repair; * is "
        "with batch norm's statistics measured again instead. Divergence is that from the "
        "original's predictions, in nats. Predicted: for auto by prices that were calibrated on "
        "images held out of the 2,000, for paper by bare prices, which stand for the network right "
        "after the cut. Measured: on the test images, without their labels. The loss takes them. "
        "Both are of the model in the column repaired. Seconds: compressing and measuring (the "
        "first with the curvature, which all share)"
        + (" + tuning, one epoch with labels, and measuring." if finetuning else ".")
    )
    document = json.dumps(
        {"command": "eigendamage demo", "seed": seed, "budgets": entries}, indent=1
    )
    with written_beside(out) as beside:
        beside.write_text(document + "\n", encoding="utf-8")
    page = out.with_name(f"{out.stem}-report.html")
    command = shlex.join(["eigendamage", *sys.argv[1:]])
    shown = reports[len(reports) // 2].model_copy(update={"command": command})
    write_page(shown, page, sweep=_sweep(reports))
    console.print(f"Report: {out}")
    console.print(f"As a page, auto at {shown.budget}: {page}")
    if as_json:
        typer.echo(document)


def _sweep(reports: list[Report]) -> Sweep:
    """The same model at all budgets."""
    first = reports[0]
    rows = (
        SweepRow(
            budget=report.budget,
            macs=report.macs[1] / report.macs[0],
            parameters=report.parameters[1] / report.parameters[0],
            priced=report.predicted,
            calibrated=None if report.truth is None else report.truth.calibrated,
            gap=report.gap,
            measured=report.final,
            seconds=sum(report.seconds.values()),
        )
        for report in reports
    )
    return Sweep(
        model=first.model,
        examples=first.examples,
        measured_on=first.measured_on,
        measured_examples=first.measured_examples,
        original=first.original,
        rows=tuple(rows),
        left_alone=first.left_alone,
        seconds={},
        environment=first.environment,
    )


def _empty_table(finetuning: bool) -> Table:
    table = Table(
        title="Fashion-MNIST, accuracy on 2,000 test images; compressed without labels",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "MACs\nleft",
        "params\nleft",
        "\nmethod",
        "after\ncut",
        "\nrepaired",
        *(["\ntuned"] if finetuning else []),
        "divergence\npredicted",
        "\nmeasured",
        "loss\nrise",
        "\nseconds",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _tuned(
    model: nn.Module,
    train: zoo.ImageSet,
    held_out: zoo.ImageBatches,
    *,
    seed: int,
    progress: bool,
) -> dict[str, float | None]:
    """What one epoch makes of a model, which is trained in place."""
    start = time.perf_counter()
    batches = train.batches(_BATCH, shuffle_seed=seed, augment=True)
    finetune(model, batches, FinetuneConfig(), progress=progress)
    after = evaluate(model, held_out, progress=progress)
    return {
        "accuracy": after.accuracy,
        "loss": after.loss,
        "seconds": time.perf_counter() - start,
    }


def _row(
    label: str, report: Report, tuned: dict[str, float | None] | None, seconds: float
) -> list[str]:
    macs, parameters, truth = report.macs, report.parameters, report.truth
    return [
        f"{macs[1] / macs[0]:.0%}",
        f"{parameters[1] / parameters[0]:.0%}",
        label,
        _percent(report.compressed.accuracy),
        _percent(report.final.accuracy) + ("" if report.recalibrated is None else "*"),
        *([_percent(tuned["accuracy"])] if tuned else []),
        _short(report.predicted if truth is None else truth.predicted),
        _short(report.final.divergence),
        _short(report.measured_rise),
        f"{seconds:.0f}" + (f"+{tuned['seconds']:.0f}" if tuned else ""),
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
