"""What options of a plan may be, refused before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from eigendamage.errors import BudgetError, EigenDamageError
from eigendamage.plan._blocks import FormChoice
from eigendamage.plan._budget import Budget
from eigendamage.plan._channels import RankBy
from eigendamage.plan._menus import check_multiple
from eigendamage.plan._methods import (
    AutoMethod,
    BlockMethod,
    ChannelMethod,
    method_named,
    variant_of,
)


def check_options(
    budget: Budget,
    *,
    method: str,
    variant: str | None,
    max_ratio: float,
    form: FormChoice,
    damping: float,
    rank_by: RankBy | None,
    multiple: int | None = None,
) -> str | None:
    """Refuse options that cannot be meant, before anything is computed; return the variant meant.

    Raises:
        BudgetError: if the budget is no `Budget`.
        EigenDamageError: if the method, variant or form is unknown, or a number out of range.
    """
    if not isinstance(budget, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BudgetError(f"the budget is {budget!r}; give eigendamage.Budget(macs=0.5), say")
    check_max_ratio(max_ratio)
    if multiple is not None:
        check_multiple(multiple)
    if not isinstance(damping, int | float) or not damping > 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(f"damping is {damping!r}; it must be above 0")
    for what, given, choices in (
        ("form", form, get_args(FormChoice)),
        ("rank_by", rank_by, (None, *get_args(RankBy))),
    ):
        if given not in choices:
            known = ", ".join(str(choice) for choice in choices if choice is not None)
            raise EigenDamageError(f"{what} '{given}' is unknown; known are {known}")
    meant = variant_of(method, variant)
    auto = isinstance(method_named(method), AutoMethod)
    if not auto and not budget.limits and budget.ratio is None:
        raise BudgetError(f"a budget of {budget} is for method='auto', not for '{method}'")
    if not auto and budget.latency is not None:
        raise BudgetError(f"a budget of latency is for method='auto', not for '{method}'")
    blocks = isinstance(method_named(method), BlockMethod)
    if form != "cheapest" and not blocks:
        raise EigenDamageError(f"form='{form}' is for eigendamage, not for '{method}'")
    if rank_by is not None and not isinstance(method_named(method), ChannelMethod):
        raise EigenDamageError(f"rank_by is for methods that remove channels, not for '{method}'")
    return meant


def check_max_ratio(max_ratio: float) -> None:
    """Refuse a fraction of a side that leaves nothing of it, or takes nothing.

    Raises:
        EigenDamageError: if it does.
    """
    if not isinstance(max_ratio, int | float) or not 0 < max_ratio < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(f"max_ratio is {max_ratio!r}; it must be above 0 and below 1")


def check_refine(refine: int) -> None:
    """Refuse a number of steps that is none.

    Raises:
        EigenDamageError: if it is no whole number of at least 0.
    """
    if not isinstance(refine, int) or refine < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(f"refine is {refine!r}; it must be a whole number from 0 on")


def refuse_options_of_auto(method: str, given: Mapping[str, Any]) -> None:
    """Refuse options that another method than ``auto`` would not heed.

    Args:
        method: its name.
        given: by name the options that ``auto`` alone knows; those that are false were not given.

    Raises:
        EigenDamageError: naming those that were.
    """
    found = [name for name, value in given.items() if value]
    if found and not isinstance(method_named(method), AutoMethod):
        raise EigenDamageError(
            f"for method='auto' alone, not for '{method}', are: {', '.join(found)}"
        )
