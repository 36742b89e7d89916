"""How a command ends: its exit code, and its error in words or as JSON."""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from traceback import print_exception
from typing import Protocol, runtime_checkable

from eigendamage.cli._processes import speaker
from eigendamage.distributed import rank
from eigendamage.errors import (
    BudgetError,
    EigenDamageError,
    ExtraError,
    NothingToCompressError,
    ProcessError,
)


class Exit(IntEnum):
    """What the exit codes of all commands mean."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    BUDGET = 4
    SURROUNDINGS = 5
    INTERRUPTED = 130


EPILOG = (
    "Exit codes: 0 all went well; 1 a bug; 2 wrong usage; 3 the model, the data or a file cannot "
    "be used; 4 the budget cannot be met, or there is nothing to compress; 5 a package is "
    "missing, or another process failed; 130 interrupted. With --json an error is a JSON "
    "document, too."
)

# By class, the first that fits.
_CODES: tuple[tuple[type[BaseException], Exit], ...] = (
    (BudgetError, Exit.BUDGET),
    (NothingToCompressError, Exit.BUDGET),
    (ExtraError, Exit.SURROUNDINGS),
    (ProcessError, Exit.SURROUNDINGS),
    (EigenDamageError, Exit.INPUT),
    (OSError, Exit.INPUT),
    (KeyboardInterrupt, Exit.INTERRUPTED),
)


@runtime_checkable
class Refusal(Protocol):
    """An error of the parser of options, whichever parser typer brings."""

    exit_code: int

    def format_message(self) -> str:
        """What is wrong, with the option's name."""
        ...


def exit_of(error: BaseException) -> Exit:
    """The exit code for an error."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return Exit.USAGE if isinstance(error, Refusal) else Exit.BUG


def tell(error: BaseException, *, as_json: bool) -> Exit:
    """Say what went wrong, and return the exit code.

    As JSON it is ``{"error": …, "kind": …}`` on standard output, of the first of several processes;
    else one line on standard error. What is a bug brings its traceback on standard error.
    """
    code = exit_of(error)
    if code is Exit.BUG:
        print_exception(error)
    words = error.format_message() if isinstance(error, Refusal) else str(error)
    words = words or ("interrupted" if code is Exit.INTERRUPTED else type(error).__name__)
    if as_json and rank() == 0:
        print(json.dumps({"error": words, "kind": type(error).__name__, "exit_code": int(code)}))
    elif code is not Exit.BUG:
        print(f"{speaker()}: {words}", file=sys.stderr)
    return code
