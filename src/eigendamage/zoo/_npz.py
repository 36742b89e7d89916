"""Images from an .npz file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.lib.npyio import NpzFile
from torch import Tensor

from eigendamage.errors import DataError, FileFormatError
from eigendamage.zoo._archive import ARCHIVE_ERRORS
from eigendamage.zoo._limits import refuse_too_many_bytes

# numpy raises more, of a header that promises too much.
_READ_ERRORS = (*ARCHIVE_ERRORS, MemoryError, AttributeError, TypeError)


@dataclass(frozen=True, eq=False)
class Arrays:
    """What an .npz file says of one split; the optional parts are None where it does not."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"] | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_npz(stream: IO[bytes], split: str, where: str) -> Arrays:
    """Read ``<split>_images`` and what goes with it, or ``images`` where the file has no splits.

    Images are uint8, (n, h, w) or (n, h, w, c). Optional: labels ``<split>_labels`` or ``labels``,
    ``class_names``, and the ``mean`` and ``std`` to normalise with, a number for each channel.

    Args:
        stream: the open file.
        split: which part of it to read.
        where: how messages call the file.

    Raises:
        FileFormatError: if it is no .npz file of plain arrays.
        DataError: if the split is not in it, or the arrays are not of that form.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            refuse_too_many_bytes(sum(entry.file_size for entry in archive.infolist()), where)
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            return _read(file, split, where)
    except _READ_ERRORS as error:
        raise FileFormatError(
            f"'{where}' is not a whole .npz file of plain arrays ({error}); save it again with"
            " numpy.savez_compressed"
        ) from error


def npz_splits(stream: IO[bytes], where: str) -> tuple[str, ...]:
    """The splits of an .npz file: what stands before ``_images`` in the names of its arrays.

    Raises:
        FileFormatError: if it is no .npz file.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            names = [entry.filename for entry in archive.infolist()]
    except _READ_ERRORS as error:
        raise FileFormatError(f"'{where}' is not a whole .npz file ({error})") from error
    ending = "_images.npy"
    return tuple(sorted(n.removesuffix(ending) for n in names if n.endswith(ending)))


def _read(file: NpzFile, split: str, where: str) -> Arrays:
    prefix = f"{split}_"
    if f"{prefix}images" not in file.files:
        if "images" not in file.files:
            raise DataError(
                f"'{where}' has neither '{split}_images' nor 'images'; it has"
                f" {', '.join(file.files) or 'no arrays'}"
            )
        prefix = ""
    images: np.ndarray = file[f"{prefix}images"]
    labels = file[f"{prefix}labels"] if f"{prefix}labels" in file.files else None
    names = np.atleast_1d(file["class_names"]) if "class_names" in file.files else ()
    return Arrays(
        _pixels(images, f"'{where}': '{prefix}images'"),
        None if labels is None else _labels(labels, f"'{where}': '{prefix}labels'", len(images)),
        tuple(str(name) for name in names),
        _numbers(file, "mean"),
        _numbers(file, "std"),
    )


def _pixels(images: np.ndarray, what: str) -> UInt8[Tensor, "n c h w"]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise DataError(
            f"{what} is {images.dtype} of shape {images.shape}; uint8 of shape (n, h, w) or"
            " (n, h, w, channels), with at least one image, was expected"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return pixels.unsqueeze(1) if images.ndim == 3 else pixels.permute(0, 3, 1, 2)


def _labels(labels: np.ndarray, what: str, count: int) -> Int64[Tensor, " n"]:
    if (
        labels.dtype.kind not in "iu"
        or labels.shape != (count,)
        or not 0 <= int(labels.min()) <= int(labels.max()) < 2**31
    ):
        raise DataError(
            f"{what} is {labels.dtype} of shape {labels.shape}; {count} class indices, integers"
            " from 0, were expected"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _numbers(file: NpzFile, key: str) -> tuple[float, ...] | None:
    if key not in file.files:
        return None
    numbers = np.atleast_1d(file[key])
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise DataError(f"'{key}' has shape {numbers.shape}; one finite number a channel expected")
    return tuple(float(x) for x in numbers)
