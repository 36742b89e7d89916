"""The state of a training run in a file, from which it goes on as if it had not been stopped."""

from __future__ import annotations

import pickle
import random
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from eigendamage.errors import FileError, FileFormatError, MismatchError, MissingFileError
from eigendamage.files import opened, written_beside

_VERSION = 2


class Checkpoint:
    """Keeps the state of one run in one file, which is whole at any moment or not there.

    Args:
        path: of the file; its folder has to exist.
        identity: what has to be equal for a state to be gone on from, by name.
        every: seconds that have to pass between two saves that are not forced.
        writing: whether this process is the one that writes.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], *, every: float, writing: bool
    ) -> None:
        self._path = Path(path)
        if not self._path.parent.is_dir():
            raise MissingFileError(
                f"cannot write {self._path}: the folder {self._path.parent} does not exist"
            )
        self._identity = {name: str(value) for name, value in identity.items()}
        self._every = every
        self._writing = writing
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state; None if there is none yet. No code of the file runs.

        Raises:
            FileFormatError: if the file is not such a state, or cut short.
            FileError: if it cannot be read.
            MismatchError: if it is of another run; the message names the first difference.
        """
        if not self._path.exists():
            return None
        try:
            with opened(self._path, "state of a training run"):  # can it be read at all?
                pass
            found: Any = torch.load(self._path, weights_only=True)
        except FileError:
            raise
        except (
            *(OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError),
            *(KeyError, ValueError, IndexError, TypeError),  # of bytes that happen to be opcodes
        ) as error:
            said = (str(error).splitlines() or [""])[0]
            raise FileFormatError(
                f"{self._path} is not the state of a training run, or cut short: {said}. Remove it "
                f"to train anew"
            ) from error
        if not isinstance(found, dict) or "version" not in found:
            raise FileFormatError(
                f"{self._path} is not the state of a training run: it says no version"
            )
        state = cast("dict[str, Any]", found)
        if state["version"] != _VERSION:
            raise FileFormatError(
                f"{self._path} is the state of a training run of version {state['version']!r}, "
                f"this library reads {_VERSION}; remove it to train anew (of a compression in "
                f"rounds its whole folder, as OUT/rounds), give another place, or end the run with "
                f"the version that began it"
            )
        before: dict[str, str] = state["identity"]
        for name, value in self._identity.items():
            if before.get(name) != value:
                raise MismatchError(
                    f"{self._path} is of another run: {name} was {before.get(name)} and is now "
                    f"{value}; give the same again, or remove the file to start anew"
                )
        return state

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return time.monotonic() - self._saved >= self._every

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state beside the old one, then rename."""
        self._saved = time.monotonic()
        if not self._writing:
            return
        with written_beside(self._path) as beside:
            try:
                torch.save({"version": _VERSION, "identity": self._identity, **state}, beside)
            except RuntimeError as error:  # as torch says that the disk is full
                raise OSError((str(error).splitlines() or [""])[0]) from error


def random_state() -> dict[str, Any]:
    """The states of torch's generators, numpy's and Python's, as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = cast("tuple[Any, ...]", np.random.get_state())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put them back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
