"""Progress of whatever takes over two seconds: a bar on a terminal, a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eigendamage.distributed import rank

T = TypeVar("T")
_PATIENCE_S = 2.0


def track(items: Iterable[T], what: str, *, total: int | None, enabled: bool) -> Iterator[T]:
    """Go through ``items`` and show how far it has come.

    On a terminal a bar with the time left, gone when it is done; elsewhere one line on standard
    error at the end, and only if it took longer than two seconds. Nothing where ``enabled`` is
    false, and in all but the first of several processes.
    """
    if not enabled or rank() > 0:
        yield from items
        return
    console = Console(stderr=True)
    start = time.monotonic()
    # Not by rich's word alone: FORCE_COLOR makes it take a pipe for a terminal.
    if console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total or None, description=what)
    else:
        yield from items
        seconds = time.monotonic() - start
        if seconds > _PATIENCE_S:
            print(f"{what}: {seconds:.1f} s", file=sys.stderr)


def say(line: str, *, enabled: bool) -> None:
    """One line on standard error, where progress is shown."""
    if enabled and rank() == 0:
        print(line, file=sys.stderr)
