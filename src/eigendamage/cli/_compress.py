"""eigendamage compress: a model and images in, a smaller model and a report out."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer
from rich.console import Console

from eigendamage.cli._completion import MODEL_HELP, method_names, model_names
from eigendamage.cli._parsing import budget as budget_of
from eigendamage.cli._parsing import (
    checked_seed,
    floors,
    kinds,
    refuse_numbers,
    refuse_steps,
    refuse_unknown,
    refuse_unwritable,
)
from eigendamage.cli._processes import home
from eigendamage.cli._sources import Training, load_data, load_model
from eigendamage.compress import Compressed, compress, preview
from eigendamage.curvature import EigenvalueKind, Fisher, save_curvature
from eigendamage.distributed import decided, rank
from eigendamage.files import alone_in, make_folder
from eigendamage.plan import ACTIONS, METHODS
from eigendamage.report import PlanReport, print_plan, print_report
from eigendamage.saving import save
from eigendamage.training import FinetuneConfig, PolishConfig, crops_and_flips
from eigendamage.zoo import ImageBatches


def compress_command(
    model: str = typer.Option(..., help=MODEL_HELP, autocompletion=model_names),
    data: str = typer.Option(
        ...,
        help="Folder, .zip (train/CLASS/*.jpg, test/…; labels optional), .npz, module:callable, or "
        "zoo:fashion-mnist for the bundled images.",
    ),
    out: Path = typer.Option(..., help="Folder for the result; made if it is not there."),
    weights: Path | None = typer.Option(None, help="Trained weights, .safetensors or .pt."),
    pretrained: bool = typer.Option(
        False, "--pretrained", help="For timm: and torchvision:, fetch the weights they have."
    ),
    macs: float | None = typer.Option(None, help="Fraction of the multiply-accumulates to leave."),
    params: float | None = typer.Option(None, help="Fraction of the parameters to leave."),
    size: float | None = typer.Option(
        None, "--bytes", help="Fraction of the bytes of parameters to leave."
    ),
    latency: float | None = typer.Option(
        None, help="Fraction of the latency to leave, as measured on this device."
    ),
    loss: float | None = typer.Option(
        None, help="The most divergence from the original; the smallest model within it is found."
    ),
    ratio: float | None = typer.Option(None, help="Fraction of all rows and columns to remove."),
    method: str = typer.Option(
        "auto",
        help="How to choose what goes: " + ", ".join(METHODS) + ".",
        autocompletion=method_names,
    ),
    variant: str | None = typer.Option(None, help="Form of the method, where it has several."),
    fisher: Fisher = typer.Option("mc", help="Labels of the curvature."),
    eigenvalues: EigenvalueKind = typer.Option(
        "ekfac", help="Price by λ, or by K-FAC's products (as the paper)."
    ),
    max_ratio: float = typer.Option(0.95, help="The most of one side of a layer that may go."),
    ignore: list[str] = typer.Option([], help="Pattern of layers to leave alone; may be repeated."),
    actions: str = typer.Option(
        ",".join(ACTIONS), help="For auto: what may be done to layers, by commas."
    ),
    multiple: int | None = typer.Option(
        None,
        min=1,
        help="For auto: ranks and channels left are multiples of this; 8 for latency, else 1.",
    ),
    floor: list[str] = typer.Option(
        [], help="For auto: PATTERN=FRACTION of its MACs that a layer has to keep; may be repeated."
    ),
    calibrate: bool | None = typer.Option(
        None,
        "--calibrate/--no-calibrate",
        help="For auto: correct prices by what layers cost alone; if neither is given, it does.",
    ),
    repair: bool | None = typer.Option(
        None,
        "--repair/--no-repair",
        help="Refit what is changed on the data, without labels; if neither is given, auto does.",
    ),
    shots: int = typer.Option(1, min=1, help="For auto: reach the budget in so many steps."),
    rounds: int = typer.Option(
        1,
        min=1,
        help="Reach the budget in so many rounds, each with --epochs of training; without, auto "
        "takes back a step that makes it worse.",
    ),
    epochs: int = typer.Option(
        0,
        min=0,
        help="Of fine-tuning after each round: on labels if there are any, and on the original.",
    ),
    learning_rate: float | None = typer.Option(
        None, help="The peak of the fine-tuning's schedule; 0.02 by default."
    ),
    train_examples: int | None = typer.Option(
        None, min=1, help="The most images to fine-tune on; all of the training images by default."
    ),
    polish: int | None = typer.Option(
        None,
        min=0,
        help="Passes of distilling the original at the end, without labels, on the images of the "
        "curvature; 6 by default for auto without --epochs, else 0.",
    ),
    augment: bool = typer.Option(
        True,
        "--augment/--no-augment",
        help="Shift and mirror images that are read from files where something is trained.",
    ),
    latency_batch: int = typer.Option(1, min=1, help="Images a call where latency is measured."),
    examples: int = typer.Option(2000, min=1, help="The most images to take the curvature on."),
    test_examples: int | None = typer.Option(None, min=1, help="The most images to measure on."),
    max_memory: str | None = typer.Option(
        None, help="What the sums of the curvature's passes may take, such as 2GB."
    ),
    batch_size: int = typer.Option(128, min=1, help="Images a batch."),
    recalibrate: bool | None = typer.Option(
        None,
        "--recalibrate/--no-recalibrate",
        help="Measure batch norm's statistics again; if neither is given, where nothing is "
        "repaired.",
    ),
    seed: int = typer.Option(
        0, callback=checked_seed, help="Of the choice of images and of label draws."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print the plan as a table, and write nothing."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    quiet: bool = typer.Option(False, help="No progress, no tables."),
) -> None:
    """Compress a trained model to a budget and report what it cost.

    --macs, --params, --bytes and --latency may be combined; --loss and --ratio stand alone.
    A run with --epochs that was stopped goes on if the same command is given again; what it needs
    for that, and every round's plan, weights and curvature, is in OUT/rounds.
    The folder OUT gets model.safetensors (the weights of the smaller model), structure.json,
    plan.json, report.json, report.html (the same as a page for a browser) and
    curvature.safetensors; eigendamage.load makes the smaller model again of the original one and
    OUT. With --dry-run nothing is written at all.
    """
    refuse_unknown(method, variant)
    refuse_unwritable(out)
    floor_of, allowed = floors(floor), kinds(actions)
    budget = budget_of(
        "the budget", macs=macs, params=params, bytes=size, latency=latency, loss=loss, ratio=ratio
    )
    refuse_steps(shots, rounds, epochs, auto=method == "auto", budget=budget)
    refuse_numbers(max_ratio, max_memory, learning_rate)
    network = load_model(model, weights, pretrained=pretrained).to(home())
    images = load_data(
        data,
        examples=examples,
        batch_size=batch_size,
        seed=seed,
        test_examples=test_examples,
        training=Training(train_examples, augment) if epochs else None,
    )
    if polish is None:
        polish = PolishConfig().passes if method == "auto" and not epochs else 0
    # What a callable returns may be no images at all.
    moved = crops_and_flips() if augment and isinstance(images.data, ImageBatches) else None
    polishing = PolishConfig(passes=polish, augment=moved) if polish else 0
    if dry_run:
        plan = preview(
            network,
            images.data,
            budget=budget,
            method=method,
            variant=variant,
            fisher=fisher,
            eigenvalues=eigenvalues,
            max_ratio=max_ratio,
            ignore=ignore,
            actions=allowed,
            multiple=multiple,
            floors=floor_of,
            calibrate=calibrate,
            repair=repair,
            polish=polishing,
            shots=shots,
            rounds=rounds,
            latency_batch=latency_batch,
            max_examples=examples,
            max_memory=max_memory,
            seed=seed,
            progress=not quiet,
        )
        _show(PlanReport.of(plan), as_json=as_json, quiet=quiet)
        return
    # Of two runs at once, one would leave the curvature and the other the model.
    with ExitStack() as stack:
        decided(partial(stack.enter_context, alone_in(out)))
        result = compress(
            network,
            images.data,
            budget=budget,
            method=method,
            variant=variant,
            eval_data=images.eval_data,
            fisher=fisher,
            eigenvalues=eigenvalues,
            max_ratio=max_ratio,
            ignore=ignore,
            actions=allowed,
            multiple=multiple,
            floors=floor_of,
            calibrate=calibrate,
            repair=repair,
            shots=shots,
            rounds=rounds,
            polish=polishing,
            epochs=epochs,
            train_data=images.train_data,
            finetuning=FinetuneConfig(learning_rate=learning_rate) if epochs else None,
            directory=out / "rounds" if epochs else None,
            latency_batch=latency_batch,
            max_examples=examples,
            max_memory=max_memory,
            recalibrate=recalibrate,
            seed=seed,
            progress=not quiet,
        )
        if rank() == 0:
            command = shlex.join(["eigendamage", *sys.argv[1:]])
            report = result.report.model_copy(update={"command": command})
            result = replace(result, report=report)
            _write(result, out)
    if rank() > 0:
        return
    if as_json:
        typer.echo(result.report.model_dump_json(indent=1))
    elif not quiet:
        console = Console()
        print_report(result.report, console)
        if images.where:
            console.print(f"Measured on {images.where}.")
        console.print(f"Written to {out}.")


def _show(plan: PlanReport, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(plan.model_dump_json(indent=1))
    elif not quiet and rank() == 0:
        console = Console()
        print_plan(plan, console)
        console.print("Nothing was changed or written: --dry-run.")


def _write(result: Compressed, out: Path) -> None:
    make_folder(out)
    save_curvature(result.curvature, out / "curvature.safetensors")
    save(result, out)
