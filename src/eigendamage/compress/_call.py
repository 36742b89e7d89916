"""A call of `compress` in words, for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from eigendamage.compress._result import Compressed
from eigendamage.plan import Budget

_SILENT = {"progress"}  # has no part in what comes out


def call_in_words(function: Callable[..., Any], given: Mapping[str, object]) -> str:
    """A call as one would type it, without the arguments that are left at their defaults.

    Args:
        function: that was called.
        given: its arguments by name. Numbers, words and budgets are told, the names of
            positional arguments, and of everything else the type.
    """
    told: list[str] = []
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            told.append(name)
        elif name not in _SILENT and given[name] is not parameter.default:
            words = _in_words(given[name])
            if words != repr(parameter.default):
                told.append(f"{name}={words}")
    return f"eigendamage.{function.__name__}({', '.join(told)})"


def _in_words(value: object) -> str:
    match value:
        case Budget():
            return f"Budget({', '.join(f'{k}={v!r}' for k, v in value.given.items())})"
        case None | bool() | int() | float() | str():
            return repr(value)
        case Path():
            return repr(str(value))
        case tuple() | list() if all(isinstance(item, int | float | str) for item in value):
            return repr(list(value))
        case _:
            return f"<{type(value).__name__}>"


def with_command(result: Compressed, command: str) -> Compressed:
    """The same result, whose report says what made it."""
    return replace(result, report=result.report.model_copy(update={"command": command}))
