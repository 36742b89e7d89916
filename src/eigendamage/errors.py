"""Every error of the library, and how it warns: what was found, where, and what to do about it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping

_WITHIN = ("eigendamage", "torch", "contextlib")  # whose decorators lie between


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the caller's own code, however deep in the library this is called."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _WITHIN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class EigenDamageError(Exception):
    """Base of all errors that this library raises on purpose."""


class DataError(EigenDamageError):
    """The data cannot be used: empty, not finite, or of a form the model cannot take."""


class LossError(EigenDamageError):
    """The loss and the model's output, the targets or the kind of Fisher do not fit together."""


class LayerError(EigenDamageError):
    """A layer cannot be handled; the message starts with its dotted path."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"layer '{layer}': {message}")
        self.layer = layer
        self._message = message

    def __reduce__(self) -> tuple[type[LayerError], tuple[str, str]]:
        # An error travels between processes, and is made anew by what it was made of.
        return type(self), (self.layer, self._message)


class ShapeError(LayerError):
    """A tensor's shape does not fit the layer it is meant for."""


class NonFiniteError(EigenDamageError):
    """A NaN or an infinity turned up in inputs, outputs, gradients or weights."""


class NothingToCompressError(EigenDamageError):
    """No layer of the model can be compressed, or the plan would leave every layer as it is."""


class ChannelError(EigenDamageError):
    """Which channels of a model go together could not be found out."""


class BudgetError(EigenDamageError):
    """A budget that cannot be met, or that is not well formed.

    Attributes:
        least: by unit the least fraction of the model that can be reached, each alone; empty where
            it is not known.
    """

    def __init__(self, message: str, least: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.least = dict(least or {})


class MismatchError(EigenDamageError):
    """A curvature or plan belongs to another model than the one given."""


class FileFormatError(EigenDamageError):
    """A file is not what it should be: another format, another version, cut short."""


class FileError(EigenDamageError, OSError):
    """A file or a folder cannot be read or written: no space, no right, in use by another run."""


class MissingFileError(FileError, FileNotFoundError):
    """A file that is to be read, or the folder of one that is to be written, is not there."""


class NotAFolderError(FileError, NotADirectoryError):
    """A file is where a folder was expected."""


class ExportError(EigenDamageError):
    """A model cannot be exported, or what was exported computes something else."""


class ProcessError(EigenDamageError):
    """Another of several processes that compute one result failed, ended or is out of step."""


class ExtraError(EigenDamageError):
    """A package that only some uses need is not installed, or does not import."""
