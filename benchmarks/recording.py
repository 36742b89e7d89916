"""What every benchmark's results file says beside its numbers."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import eigendamage as ed
from eigendamage.files import written_beside


def machine() -> dict[str, Any]:
    """Where it ran; where glibc's allocator was set, also how, which times may depend on."""
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return {
        "system": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"malloc": malloc} if malloc else {}),
    }


OTHERS = ("torch-pruning", "tensorly", "onnxruntime")
"""What results may depend on, where it was loaded."""


def versions() -> dict[str, str]:
    loaded = [name for name in OTHERS if name.replace("-", "_") in sys.modules]
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "eigendamage": ed.__version__,
        **{name: version(name) for name in loaded},
    }


def record(out: Path, result: dict[str, Any]) -> None:
    """Write a results file, whole or not at all."""
    with written_beside(out) as beside:
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def add_row(out: Path, head: dict[str, Any], row: dict[str, Any], keys: Sequence[str]) -> None:
    """Put a row into a results file, in the place of an older one with the same keys.

    Rows are measured at different times, so each says with what.
    """
    row = {**row, "machine": machine(), "versions": versions()}
    rows = [r for r in known_rows(out) if any(r[key] != row[key] for key in keys)] + [row]
    record(out, {**head, "rows": sorted(rows, key=lambda r: [_ordered(r[key]) for key in keys])})


def known_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no such file yet."""
    return json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []


def _ordered(value: str | float) -> tuple[float, str]:
    """Names by length, so that resnet20 comes before resnet110; numbers from the largest."""
    return (len(value), value) if isinstance(value, str) else (-value, "")
