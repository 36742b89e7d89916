"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | Path) -> Generator[Path]:
    """A path beside ``path`` to write to; renamed to it if all went well, removed if not.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(f"cannot write {final}: the folder {final.parent} does not exist")
    beside = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)
