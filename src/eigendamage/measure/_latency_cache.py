"""Times of layers that outlive the process: one JSON file for each set of conditions."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from eigendamage.documents import Document
from eigendamage.errors import FileFormatError
from eigendamage.plan._latency import Conditions, FormTimes

_saving = threading.Lock()  # threads of one process would write the same file beside the cache


class _Cache(Document):
    """Times of layers under the same conditions, of whatever models they were."""

    version: Literal[1] = 1
    conditions: Conditions
    entries: Mapping[str, FormTimes]


def cache_file(folder: Path | None, conditions: Conditions) -> Path | None:
    """Where the times under these conditions are kept; None if there is no home to keep them in."""
    try:
        chosen = folder or os.environ.get("EIGENDAMAGE_CACHE")
        base = os.environ.get("XDG_CACHE_HOME")
        chosen = chosen or (Path(base) if base else Path.home() / ".cache") / "eigendamage"
    except RuntimeError:
        return None
    words = " ".join(str(value) for value in conditions.model_dump().values())
    return Path(chosen) / f"latency-{re.sub('[^A-Za-z0-9.+_]+', '-', words)}.json"


def stored(file: Path | None, conditions: Conditions) -> dict[str, FormTimes]:
    """What is kept; nothing if the file cannot be read or is not what it should be."""
    if file is None:
        return {}
    try:
        found = _Cache.load(file)
    except (OSError, FileFormatError):
        return {}
    return dict(found.entries) if found.conditions == conditions else {}


def store(file: Path | None, conditions: Conditions, key: str, times: FormTimes) -> None:
    """Add one entry to what is kept by now, unless the folder cannot be written."""
    if file is None:
        return
    with suppress(OSError), _saving:
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = {**stored(file, conditions), key: times}
        _Cache(conditions=conditions, entries=entries).save(file)
