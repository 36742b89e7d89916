"""Images from a folder, a zip archive or an .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from eigendamage.errors import DataError
from eigendamage.files import opened
from eigendamage.seeds import check_seed, unsigned_seed
from eigendamage.zoo._decode import decode
from eigendamage.zoo._images import ImageSet, normalise
from eigendamage.zoo._layout import lay_out, splits_of
from eigendamage.zoo._limits import refuse_too_many_bytes
from eigendamage.zoo._npz import npz_splits, read_npz
from eigendamage.zoo._sources import image_files

RGB_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of R, G and B in 0..1, which most pretrained networks were trained with."""
RGB_STD = (0.229, 0.224, 0.225)
"""The standard deviations that go with it."""


def load_images(
    path: str | Path,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    resize: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ImageSet:
    """Read a split's images into memory, in an order shuffled by ``seed``.

    A folder or a .zip (read without unpacking) holds ``<split>/<class>/*.jpg`` and the like, or
    ``<class>/*.jpg``, or images alone, which are unlabeled; an .npz holds uint8 ``<split>_images``
    and ``<split>_labels``, or ``images`` and ``labels``. Where there are no splits, any split is
    all there is.

    Args:
        path: the folder or file.
        split: which part of it, such as ``train`` or ``test``.
        limit: read no more than so many images, the first of the shuffled order.
        seed: of the order; files tend to be sorted by class.
        resize: height and width to bring all images to; without it they must be of one size.
        mean: a number a channel to normalise with; if None, what the .npz says, else `RGB_MEAN`.
        std: the same for the standard deviation, else `RGB_STD`.

    Raises:
        MissingFileError: if there is no such folder or file.
        FileError: if it cannot be read.
        DataError: if there are no such images, or they do not fit together.
        FileFormatError: if a file is broken.
        EigenDamageError: if the seed is none.
    """
    path = Path(path)
    check_seed(seed)
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images was given; it must be 1 or more")
    if path.suffix.lower() == ".npz" and path.is_file():
        if resize is not None:
            raise DataError(f"'{path}': arrays are not resized; save them in the size you need")
        return _from_npz(path, split, limit=limit, seed=seed, mean=mean, std=std)
    with image_files(path) as files:
        layout = lay_out(files, split, str(path))
        order = _order(len(layout.files), limit, seed)
        chosen = [layout.files[i] for i in order]
        refuse_too_many_bytes(sum(file.size for file in chosen), str(path))
        pixels = decode(chosen, resize)
    labels = None if layout.labels is None else torch.tensor(layout.labels)[order]
    images = normalise(pixels, mean or RGB_MEAN, std or RGB_STD)
    return ImageSet(images, labels, layout.class_names)


def find_splits(path: str | Path) -> tuple[str, ...]:
    """Name the splits that a folder, zip or .npz has; none if all its images are one set.

    Raises:
        MissingFileError: if there is no such folder or file.
        FileError: if it cannot be read.
        DataError: if there is no image there.
        FileFormatError: if a file is broken.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        with opened(path, "data") as stream:
            return npz_splits(stream, str(path))
    with image_files(path) as files:
        return splits_of(files)


def _from_npz(
    path: Path,
    split: str,
    *,
    limit: int | None,
    seed: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> ImageSet:
    with opened(path, "data") as stream:
        arrays = read_npz(stream, split, str(path))
    mean, std = mean or arrays.mean, std or arrays.std
    if arrays.pixels.shape[1] == 3:
        mean, std = mean or RGB_MEAN, std or RGB_STD
    if mean is None or std is None:
        raise DataError(
            f"'{path}' has images of {arrays.pixels.shape[1]} channels and does not say how to"
            " normalise them; give mean and std, or save arrays 'mean' and 'std' in it"
        )
    order = _order(len(arrays.pixels), limit, seed)
    labels = None if arrays.labels is None else arrays.labels[order]
    return ImageSet(normalise(arrays.pixels[order], mean, std), labels, arrays.class_names)


def _order(count: int, limit: int | None, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(unsigned_seed(seed)).permutation(count)[:limit])
