"""eigendamage demo: the bundled network on the bundled images, at three budgets."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from eigendamage import zoo
from eigendamage.compress import compress
from eigendamage.curvature import Curvature
from eigendamage.files import written_beside
from eigendamage.measure import evaluate
from eigendamage.plan import Budget
from eigendamage.report import Report, count_of, number, percent
from eigendamage.training import FinetuneConfig, finetune

BUDGETS = (0.7, 0.5, 0.35)
_CURVATURE_IMAGES = 2000
_BATCH = 125


def demo_command(
    out: Path = typer.Option(Path("eigendamage-demo.json"), help="Where the report goes, as JSON."),
    seed: int = typer.Option(0, help="Of label draws, shuffling and augmentation."),
    finetuning: bool = typer.Option(True, help="Fine-tune for one epoch after each."),
    as_json: bool = typer.Option(False, "--json", help="Print the report instead of the table."),
    quiet: bool = typer.Option(False, help="No progress."),
) -> None:
    """Compress the bundled network at three budgets and show what that cost.

    A residual network of 0.7 M parameters, trained on 12,000 images of Fashion-MNIST, and the 2,000
    test images beside them. The curvature is taken on 2,000 training images without labels.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {out.parent} does not exist")
    console = Console(quiet=as_json)
    model = zoo.demo_network()
    train, test = zoo.fashion_mnist("train"), zoo.fashion_mnist("test")
    unlabeled = zoo.ImageSet(train.images[:_CURVATURE_IMAGES]).batches(_BATCH)
    held_out = test.batches(_BATCH)

    table = Table(
        title="Fashion-MNIST, 2,000 test images; the curvature is label-free",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for column in (
        "left of\nMACs",
        "\nparams",
        "accuracy\nafter cut",
        "\nBN anew",
        "\ntuned",
        "loss rise\npredicted",
        "\nafter cut",
        "\nBN anew",
        "\nseconds",
    ):
        table.add_column(column, justify="right", no_wrap=True)

    curvature: Curvature | None = None
    entries: list[dict[str, Any]] = []
    for fraction in BUDGETS:
        start = time.perf_counter()
        result = compress(
            model,
            unlabeled,
            budget=Budget(macs=fraction),
            eval_data=held_out,
            curvature=curvature,
            seed=seed,
            progress=not quiet,
        )
        seconds = time.perf_counter() - start
        tuned: dict[str, float | None] | None = None
        if finetuning:
            start = time.perf_counter()
            batches = train.batches(_BATCH, shuffle_seed=seed, augment=True)
            finetune(result.model, batches, FinetuneConfig(), progress=not quiet)
            after = evaluate(result.model, held_out, progress=not quiet)
            tuned = {
                "accuracy": after.accuracy,
                "loss": after.loss,
                "seconds": time.perf_counter() - start,
            }
        report = result.report
        if curvature is None:
            before = report.original
            table.add_row(
                count_of(report.macs[0]),
                count_of(float(report.parameters[0])),
                percent(before.accuracy),
                *[""] * 6,
            )
        curvature = result.curvature
        table.add_row(*_row(report, tuned, seconds))
        entries.append(
            {
                "report": report.model_dump(mode="json"),
                "finetuned": tuned,
                "seconds": seconds,
            }
        )

    console.print(table)
    console.print(
        "The first row is the network as it is. BN anew: with batch norm's statistics measured "
        "again; tuned: after one epoch. Seconds: compressing (the first budget's with the "
        "curvature, which the others share) + tuning and measuring. The rise of the loss is that "
        "before tuning. Predicted is the sum of the prices of what was removed: it ranks well but "
        "is too low, as nothing in it knows that the layers' errors add up. Trust the measured one."
    )
    document = json.dumps(
        {"command": "eigendamage demo", "seed": seed, "budgets": entries}, indent=1
    )
    with written_beside(out) as beside:
        beside.write_text(document + "\n", encoding="utf-8")
    console.print(f"Report: {out}")
    if as_json:
        typer.echo(document)


def _row(report: Report, tuned: dict[str, float | None] | None, seconds: float) -> list[str]:
    macs, parameters = report.macs, report.parameters
    return [
        f"{macs[1] / macs[0]:.0%}",
        f"{parameters[1] / parameters[0]:.0%}",
        percent(report.compressed.accuracy),
        percent(report.final.accuracy),
        percent(tuned["accuracy"]) if tuned else "–",
        number(report.predicted),
        number(report.rise(report.compressed)),
        number(report.measured_rise),
        f"{seconds:.0f}" + (f"+{tuned['seconds']:.0f}" if tuned else ""),
    ]
