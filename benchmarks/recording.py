"""What every benchmark's results file says beside its numbers."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import eigendamage as ed
from eigendamage.files import written_beside


def machine() -> dict[str, Any]:
    return {
        "system": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "eigendamage": ed.__version__,
    }


def record(out: Path, result: dict[str, Any]) -> None:
    """Write a results file, whole or not at all."""
    with written_beside(out) as beside:
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
