"""What several commands read from their options, and refuse before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import typer

from eigendamage.compare import ALL, Competitor
from eigendamage.compress import check_steps
from eigendamage.curvature import bytes_of
from eigendamage.errors import EigenDamageError, FileError, NotAFolderError
from eigendamage.plan import (
    ActionKind,
    Budget,
    Unit,
    check_max_ratio,
    method_named,
    variant_of,
    wanted_actions,
)
from eigendamage.seeds import check_seed
from eigendamage.training import FinetuneConfig

SweepUnit = Literal[Unit, "latency", "loss"]
"""What the budgets of a sweep may be of."""


@contextmanager
def chosen_by(option: str) -> Generator[None]:
    """Inside, what this library refuses is a wrong value of an option, and so wrong usage."""
    try:
        yield
    except EigenDamageError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def fractions(text: str, option: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        BadParameter: if there is none, or one is no number.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter(f"'{text}' is not a list of numbers", param_hint=option)
    return found


def budgets(text: str, unit: SweepUnit, option: str) -> list[Budget]:
    """Budgets in one unit, from numbers separated by commas.

    Raises:
        BadParameter: if there is none, or one is none that a budget of this unit can be.
    """
    return [budget(option, **{unit: fraction}) for fraction in fractions(text, option)]


def budget(
    option: str,
    *,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    loss: float | None = None,
    ratio: float | None = None,
) -> Budget:
    """A budget, as `Budget` has it; ``option`` is what it was given by.

    Raises:
        BadParameter: if it is not well formed.
    """
    with chosen_by(option):
        return Budget(
            macs=macs, params=params, bytes=bytes, latency=latency, loss=loss, ratio=ratio
        )


def floors(texts: Sequence[str]) -> dict[str, float]:
    """By pattern the fraction that has to stay, from ``PATTERN=FRACTION`` each.

    Raises:
        BadParameter: if one is of another form, or its fraction is not from 0 to 1.
    """
    found: dict[str, float] = {}
    for text in texts:
        pattern, _, fraction = text.rpartition("=")
        try:
            value = float(fraction)
        except ValueError:
            value = -1.0
        if not pattern or not 0 <= value <= 1:
            raise typer.BadParameter(
                f"'{text}' is not PATTERN=FRACTION with a fraction from 0 to 1; "
                f"'layer1.*=0.5' leaves the layers that match at least half of their MACs",
                param_hint="--floor",
            )
        found[pattern] = value
    return found


def kinds(text: str) -> tuple[ActionKind, ...]:
    """Kinds of actions separated by commas.

    Raises:
        BadParameter: if there is none, or one is unknown.
    """
    named = (part.strip() for part in text.split(",") if part.strip())
    with chosen_by("--actions"):
        return wanted_actions(cast("Iterator[ActionKind]", named))


def refuse_unknown(method: str, variant: str | None) -> None:
    """Look whether there is a method and a variant of it.

    Raises:
        BadParameter: if there is none.
    """
    with chosen_by("--method"):
        method_named(method)
    with chosen_by("--variant"):
        variant_of(method, variant)


def refuse_steps(shots: int, rounds: int, epochs: int, *, auto: bool, budget: Budget) -> None:
    """Look whether steps go with each other, the method and the budget.

    Raises:
        BadParameter: if they do not.
    """
    with chosen_by("--shots / --rounds / --epochs"):
        check_steps(shots, rounds, epochs, auto=auto, budget=budget)


def refuse_numbers(max_ratio: float, max_memory: str | None, learning_rate: float | None) -> None:
    """Look whether numbers can be meant that the parser knows no bounds of.

    Raises:
        BadParameter: if one cannot.
    """
    with chosen_by("--max-ratio"):
        check_max_ratio(max_ratio)
    with chosen_by("--max-memory"):
        _ = None if max_memory is None else bytes_of(max_memory)
    with chosen_by("--learning-rate"):
        FinetuneConfig(learning_rate=learning_rate).check()


def checked_seed(seed: int) -> int:
    """A seed, as it was given.

    Raises:
        BadParameter: if torch takes none such.
    """
    with chosen_by("--seed"):
        check_seed(seed)
    return seed


def methods(text: str) -> Sequence[str]:
    """Methods of a comparison separated by commas, or all.

    Raises:
        BadParameter: if there is none, or one is unknown.
    """
    if text == "all":
        return ALL
    with chosen_by("--methods"):
        named = [Competitor.of(part).name for part in text.split(",") if part.strip()]
    if not named:
        raise typer.BadParameter("it names no method", param_hint="--methods")
    return named


def refuse_unwritable(out: Path) -> None:
    """Look whether the folder is there or can be made.

    Raises:
        NotAFolderError: if it is a file.
        FileError: if it cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise NotAFolderError(f"--out {out} is a file; give a folder")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise FileError(
            f"--out {out}: {there} cannot be written to; give a folder that can, or change its "
            f"rights"
        )
