"""Packages that only some uses need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from eigendamage.errors import ExtraError


def required(module: str, extra: str) -> Any:
    """Import a module of a package that comes with an extra of this one.

    Raises:
        ExtraError: if it is not installed, or does not import; the message names the extra.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name == package else f" ({package} needs '{error.name}')"
        raise ExtraError(
            f"{package} is not installed{missing}; pip install 'eigendamage[{extra}]'"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExtraError(
            f"{package} is installed but cannot be imported: {reason}. It, or what it needs, was "
            f"built for another torch than {torch.__version__}: install the build that fits"
        ) from error
