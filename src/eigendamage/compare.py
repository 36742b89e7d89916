"""compare: several methods on one model at equal budgets, in one resumable run."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eigendamage.batches import Data, device_of
from eigendamage.compress import compress
from eigendamage.curvature import Curvature, Extra, Fisher, estimate_curvature
from eigendamage.errors import (
    BudgetError,
    ChannelError,
    DataError,
    EigenDamageError,
    MismatchError,
    NothingToCompressError,
)
from eigendamage.measure import Evaluation, evaluate
from eigendamage.plan import METHODS, Budget, Unit, WeightMethod, needs, variant_of
from eigendamage.report import Comparison, Environment, Measured, Row, Settings
from eigendamage.rounds import compress_in_rounds
from eigendamage.training import FinetuneConfig, finetune

ALL = (*METHODS, "kron-obs:paper", "eigendamage@3")
_NAME = re.compile(r"(?P<method>[\w-]+)(:(?P<variant>[\w-]+))?(@(?P<rounds>\d+))?")


@dataclass(frozen=True)
class Competitor:
    """A method as it is named in a comparison: ``METHOD[:VARIANT][@ROUNDS]``."""

    name: str
    method: str
    variant: str | None
    rounds: int

    @classmethod
    def of(cls, name: str) -> Competitor:
        """Read a name.

        Raises:
            EigenDamageError: if it is of another form, or there is no such method or variant.
        """
        found = _NAME.fullmatch(name.strip())
        if found is None:
            raise EigenDamageError(
                f"'{name}' names no method; the form is METHOD[:VARIANT][@ROUNDS], such as "
                f"kron-obs:paper or eigendamage@3"
            )
        method, variant = found["method"], found["variant"]
        variant_of(method, variant)
        rounds = int(found["rounds"] or 1)
        if rounds < 1:
            raise EigenDamageError(f"'{name}' asks for {rounds} rounds; at least 1 is needed")
        return cls(name.strip(), method, variant, rounds)

    def budget(self, fraction: float, unit: Unit) -> Budget:
        """The budget that leaves a fraction; masks leave that fraction of the single weights."""
        if isinstance(METHODS[self.method], WeightMethod):
            return Budget(ratio=1 - fraction)
        return Budget(macs=fraction) if unit == "macs" else Budget(params=fraction)


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
    learning_rate: float = FinetuneConfig.learning_rate,
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

    Args:
        model: the trained network.
        data: inputs for the curvature, as for `compress`.
        eval_data: held-out batches to measure on, with labels if accuracy is to be known.
        methods: ``METHOD[:VARIANT][@ROUNDS]`` each; see `make_plan` and `compress_in_rounds`.
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
    """
    competitors = [Competitor.of(name) for name in methods]
    _refuse_bad_options(competitors, budgets, epochs, train_data)
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    original = evaluate(model, eval_data, progress=progress)
    settings = Settings(
        model=type(model).__name__,
        weights=_fingerprint(model),
        unit=unit,
        max_examples=max_examples,
        train_batches=0 if train_data is None or not epochs else len(list(train_data())),
        epochs=epochs,
        learning_rate=learning_rate,
        measured_on=measured_on,
        measured_examples=original.examples,
        fisher=fisher,
        seed=seed,
    )
    rows = {(row.method, row.budget): row for row in _known_rows(folder, settings)}
    environment = Environment.here(device_of(model), seed)

    def document() -> Comparison:
        return Comparison(
            command=command,
            settings=settings,
            original=Measured.of(original),
            rows=tuple(rows.values()),
            environment=environment,
        )

    todo = [(c, f) for f in budgets for c in competitors if (c.name, f) not in rows]
    if not todo:
        return document()
    extras: set[Extra] = {extra for competitor, _ in todo for extra in needs(competitor.method)}
    curvature, no_channels = _shared_curvature(
        model, data, extras, fisher, max_examples, seed, progress
    )
    task = _Task(
        model=model,
        data=data,
        eval_data=eval_data,
        curvature=curvature,
        no_channels=no_channels,
        train_data=train_data if epochs else None,
        config=FinetuneConfig(epochs=max(1, epochs), learning_rate=learning_rate),
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


@dataclass(frozen=True, eq=False)
class _Task:
    """What every row starts from."""

    model: nn.Module
    data: Data
    eval_data: Data
    curvature: Curvature
    no_channels: str | None
    train_data: Callable[[], Iterable[Any]] | None
    config: FinetuneConfig
    fisher: Fisher
    max_examples: int | None
    seed: int
    progress: bool

    def row(self, competitor: Competitor, fraction: float, unit: Unit) -> Row:
        """Compress, train and measure."""
        budget = competitor.budget(fraction, unit)
        if self.no_channels is not None and "channels" in needs(competitor.method):
            return Row(method=competitor.name, budget=fraction, refused=self.no_channels)
        try:
            if competitor.rounds > 1:
                return self._in_rounds(competitor, fraction, budget)
            return self._at_once(competitor, fraction, budget)
        except (BudgetError, NothingToCompressError) as error:
            return Row(method=competitor.name, budget=fraction, refused=str(error))

    def _in_rounds(self, competitor: Competitor, fraction: float, budget: Budget) -> Row:
        start = time.perf_counter()
        result = compress_in_rounds(
            self.model,
            self.data,
            budget=budget,
            rounds=competitor.rounds,
            train_data=None if self.train_data is None else self.train_data(),
            finetuning=self.config,
            method=competitor.method,
            variant=competitor.variant,
            eval_data=self.eval_data,
            curvature=self.curvature,
            fisher=self.fisher,
            max_examples=self.max_examples,
            seed=self.seed,
            progress=self.progress,
        )
        spent = time.perf_counter() - start
        last = result.rounds[-1]
        macs = last.compressed.report.macs[1] / result.rounds[0].compressed.report.macs[0]
        return Row(
            method=competitor.name,
            budget=fraction,
            macs=macs,
            parameters=_left(result.model, self.model),
            surgery=last.compressed.report.compressed,
            recalibrated=last.compressed.report.recalibrated,
            tuned=None if last.tuned is None else Measured.of(last.tuned),
            seconds={"rounds": spent},
        )

    def _at_once(self, competitor: Competitor, fraction: float, budget: Budget) -> Row:
        start = time.perf_counter()
        result = compress(
            self.model,
            self.data,
            budget=budget,
            method=competitor.method,
            variant=competitor.variant,
            eval_data=self.eval_data,
            curvature=self.curvature,
            max_examples=self.max_examples,
            calibration_examples=0,
            seed=self.seed,
            progress=self.progress,
        )
        seconds = {"compressing": time.perf_counter() - start}
        tuned = None
        if self.train_data is not None:
            start = time.perf_counter()
            finetune(result.model, self.train_data(), self.config, progress=self.progress)
            seconds["training"] = time.perf_counter() - start
            tuned = Measured.of(self._measured(result.model))
        report = result.report
        return Row(
            method=competitor.name,
            budget=fraction,
            macs=report.macs[1] / report.macs[0],
            parameters=_left(result.model, self.model),
            predicted=report.predicted,
            surgery=report.compressed,
            recalibrated=report.recalibrated,
            tuned=tuned,
            seconds=seconds,
            masks=isinstance(METHODS[competitor.method], WeightMethod),
        )

    def _measured(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.eval_data, reference=self.model, progress=self.progress)


def _left(model: nn.Module, original: nn.Module) -> float:
    """Parameters of a model that are not masked to zero, as a fraction of the original's."""
    masked = sum(int((m == 0).sum()) for n, m in model.named_buffers() if n.endswith("_mask"))
    return (_parameters(model) - masked) / _parameters(original)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _known_rows(folder: Path | None, settings: Settings) -> tuple[Row, ...]:
    """The rows of an earlier run with the same settings.

    Raises:
        MismatchError: if the settings were others.
    """
    file = None if folder is None else folder / "comparison.json"
    if file is None or not file.exists():
        return ()
    before = Comparison.load(file)
    for name, now in settings:
        then = getattr(before.settings, name)
        if then != now:
            raise MismatchError(
                f"{file} holds a comparison with {name} {then!r}, now it is {now!r}; name another "
                f"folder, or remove that file to start again"
            )
    return before.rows


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
    epochs: int,
    train_data: Callable[[], Iterable[Any]] | None,
) -> None:
    if not competitors or not budgets:
        raise EigenDamageError("a comparison needs at least one method and one budget")
    for fraction in budgets:
        Budget(macs=fraction)
    if epochs < 0:
        raise EigenDamageError(f"epochs is {epochs}; it must be at least 0")
    if epochs and train_data is None:
        raise DataError(f"{epochs} epochs of training were asked for, but there is no train_data")
