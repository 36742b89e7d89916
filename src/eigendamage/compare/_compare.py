"""compare: several methods on one model at equal budgets, in one resumable run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from eigendamage.batches import Batches, Data, kept
from eigendamage.calls import device_of
from eigendamage.columns import fitted
from eigendamage.compare._competitor import ALL, Competitor
from eigendamage.compare._contest import Contest
from eigendamage.curvature import (
    Curvature,
    Extra,
    Fisher,
    estimate_curvature,
    preserved_random_state,
)
from eigendamage.errors import (
    BudgetError,
    ChannelError,
    DataError,
    EigenDamageError,
    MismatchError,
)
from eigendamage.files import alone_in
from eigendamage.measure import evaluate
from eigendamage.plan import Budget, Unit, needs
from eigendamage.report import Comparison, Environment, Measured, Row, Settings
from eigendamage.seeds import check_seed
from eigendamage.training import FinetuneConfig


@torch.inference_mode(False)
def compare(
    model: nn.Module,
    data: Data,
    *,
    eval_data: Data,
    methods: Sequence[str] = ALL,
    budgets: Sequence[float] = (0.5, 0.35),
    unit: Unit = "macs",
    train_data: Callable[[], Iterable[Any]] | None = None,
    epochs: int = 0,
    learning_rate: float = 0.02,
    fisher: Fisher = "mc",
    max_examples: int | None = None,
    measured_on: str = "eval_data",
    out: str | Path | None = None,
    command: str = "eigendamage.compare",
    seed: int = 0,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Compress one model by several methods to the same budgets, train each alike, and measure.

    All methods share one curvature, the same images and the same steps of training. Nothing is
    chosen by what is measured. The model given is not changed.

    ``auto`` is shown repaired in place of right after surgery: its result without training. The
    shared curvature is of all of ``data``, so it has seen the tenth on which ``auto`` calibrates
    and judges repairs, which `compress` alone holds out of it; ``eval_data`` it has not seen.

    Args:
        model: the trained network.
        data: inputs for the curvature, as for `compress`.
        eval_data: held-out batches to measure on, with labels if accuracy is to be known.
        methods: ``METHOD[:VARIANT][@ROUNDS]`` each; see `make_plan` and `compress`.
        budgets: fractions of the model to leave. Methods that mask single weights leave that
            fraction of the weights, and all MACs and parameters.
        unit: what budgets are fractions of: ``macs`` or ``params``.
        train_data: returns labelled batches of known length, the same for every call.
        epochs: of training after each compression. With several rounds each trains on its share
            of the batches for as many epochs, so that all see as many examples.
        learning_rate: the peak of the schedule.
        fisher: which labels the curvature takes.
        max_examples: the most examples of ``data`` to use.
        measured_on: what ``eval_data`` is, in words, for the record.
        out: a folder to write ``comparison.json`` to after every row. If it holds one with the
            same settings already, its rows are kept and only what is missing is done.
        command: what made it, for the record.
        seed: of the label draws and of ``random``.
        progress: whether to show progress.
        on_row: called with every row that is done.

    Raises:
        EigenDamageError: if a method is unknown, a budget out of range, or there is nothing to
            train on although epochs are asked for.
        MismatchError: if the folder holds a comparison with other settings.
        FileError: if another run is in the folder, or it cannot be made.
    """
    competitors = list(dict.fromkeys(Competitor.of(name) for name in methods))
    _refuse_bad_options(competitors, budgets, unit, epochs, train_data)
    check_seed(seed)
    # A generator is used up by the first row.
    data, eval_data = fitted(data, model), fitted(eval_data, model)
    data = kept(data, max_examples)
    eval_data = kept(eval_data)
    folder = None if out is None else Path(out)
    with preserved_random_state():
        training = train_data() if train_data is not None and epochs else None
        if training is not None and not isinstance(training, Sized):
            raise DataError(
                f"train_data returned a {type(training).__name__}, whose number of batches is not "
                f"known; return a list, or a DataLoader"
            )
        if training is not None and _first_batch(training)["target"] is None:
            raise DataError(
                "the batches of train_data have no labels, and a comparison trains all methods on "
                "them: give (input, label) pairs, or epochs=0 for no training"
            )
        settings = Settings(
            model=type(model).__name__,
            weights=_fingerprint(model.state_dict()),
            data=_fingerprint(_first_batch(data)),
            unit=unit,
            max_examples=max_examples,
            train_batches=0 if training is None else len(cast(Sized, training)),
            train_data=None if training is None else _fingerprint(_first_batch(training)),
            epochs=epochs,
            learning_rate=learning_rate,
            measured_on=measured_on,
            eval_data=_fingerprint(_first_batch(eval_data)),
            fisher=fisher,
            seed=seed,
        )
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(alone_in(folder))
        before = _known(folder, settings)
        if before is None:
            measured = evaluate(model, eval_data, progress=progress)
            original, examples = Measured.of(measured), measured.examples
        else:
            original, examples = before.original, before.measured_examples
        rows = {(row.method, row.budget): row for row in (before.rows if before else ())}
        environment = Environment.here(device_of(model), seed)

        def document() -> Comparison:
            return Comparison(
                command=command,
                settings=settings,
                original=original,
                measured_examples=examples,
                rows=tuple(rows.values()),
                environment=environment,
            )

        todo = [
            (c, f) for f in dict.fromkeys(budgets) for c in competitors if (c.name, f) not in rows
        ]
        if not todo:
            return document()
        extras: set[Extra] = {extra for competitor, _ in todo for extra in needs(competitor.method)}
        curvature, no_channels = _shared_curvature(
            model, data, extras, fisher, max_examples, seed, progress
        )
        task = Contest(
            model=model,
            data=data,
            eval_data=eval_data,
            curvature=curvature,
            no_channels=no_channels,
            train_data=train_data if epochs else None,
            config=FinetuneConfig(
                epochs=max(1, epochs),
                learning_rate=learning_rate,
                held_out=0.0,
                label_share=1.0,
                seed=seed,
            ),
            fisher=fisher,
            max_examples=max_examples,
            seed=seed,
            progress=progress,
        )
        for competitor, fraction in todo:
            row = task.row(competitor, fraction, unit)
            rows[competitor.name, fraction] = row
            if folder is not None:
                document().save(folder / "comparison.json")
            if on_row is not None:
                on_row(row)
        return document()


def _fingerprint(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first_batch(data: Data) -> dict[str, Any]:
    """The tensors of the first batch, to know the data again by."""
    batch = Batches(data, torch.device("cpu")).peek()
    found = {f"input {index}": x for index, x in enumerate(batch.args)}
    return {**found, **batch.kwargs, "target": batch.target}


def _known(folder: Path | None, settings: Settings) -> Comparison | None:
    """An earlier run with the same settings.

    Raises:
        MismatchError: if the settings were others.
    """
    file = None if folder is None else folder / "comparison.json"
    if file is None or not file.exists():
        return None
    before = Comparison.load(file)
    for name, now in settings:
        then = getattr(before.settings, name)
        if then != now:
            raise MismatchError(
                f"{file} holds a comparison with {name} {then!r}, now it is {now!r}; name another "
                f"folder, or remove that file to start again"
            )
    return before


def _shared_curvature(
    model: nn.Module,
    data: Data,
    extras: set[Extra],
    fisher: Fisher,
    max_examples: int | None,
    seed: int,
    progress: bool,
) -> tuple[Curvature, str | None]:
    """One curvature with what any of the methods needs; why it has no channels, if it should."""
    options = (model, data, fisher, max_examples, seed, progress)
    try:
        return _estimate(extras, *options), None
    except ChannelError as error:
        return _estimate(extras - {"channels"}, *options), str(error)


def _estimate(
    extras: set[Extra],
    model: nn.Module,
    data: Data,
    fisher: Fisher,
    max_examples: int | None,
    seed: int,
    progress: bool,
) -> Curvature:
    return estimate_curvature(
        model,
        data,
        fisher=fisher,
        max_examples=max_examples,
        also=sorted(extras),
        seed=seed,
        progress=progress,
    )


def _refuse_bad_options(
    competitors: Sequence[Competitor],
    budgets: Sequence[float],
    unit: str,
    epochs: int,
    train_data: Callable[[], Iterable[Any]] | None,
) -> None:
    if unit not in get_args(Unit):
        raise BudgetError(f"unit is {unit!r}; known are {', '.join(get_args(Unit))}")
    if not competitors or not budgets:
        raise EigenDamageError("a comparison needs at least one method and one budget")
    for fraction in budgets:
        Budget(macs=fraction)
    if epochs < 0:
        raise EigenDamageError(f"epochs is {epochs}; it must be at least 0")
    if epochs and train_data is None:
        raise DataError(f"{epochs} epochs of training were asked for, but there is no train_data")
