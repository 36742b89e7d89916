"""Sets of normalised images in memory, batches of them, and the bundled Fashion-MNIST."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from eigendamage.errors import DataError
from eigendamage.seeds import check_seed, unsigned_seed
from eigendamage.zoo._npz import read_npz

_CROP_PADDING = 2


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, normalised, with their labels where there are any.

    Attributes:
        images: normalised float32 pixels.
        labels: one class index an image, or None for an unlabeled set.
        class_names: the name of each class index; empty where the source has no names.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " labels"] | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.images):
            raise DataError(
                f"{len(self.images)} images come with {len(self.labels)} labels; give one label"
                " an image, or none at all"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: slice | Int64[Tensor, " k"]) -> ImageSet:
        """Return the images at ``index``, with their labels, as a set of its own."""
        labels = None if self.labels is None else self.labels[index]
        return ImageSet(self.images[index], labels, self.class_names)

    def batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, augment: bool = False
    ) -> ImageBatches:
        """Cut the set into batches; see `ImageBatches`."""
        return ImageBatches(self, batch_size, shuffle_seed=shuffle_seed, augment=augment)


class ImageBatches:
    """A re-iterable over batches of an `ImageSet`; every ``for`` loop is one whole pass.

    A batch is ``(images, labels)``, or ``images`` alone where the set has no labels; the last one
    may be smaller. With a shuffle seed each pass has its own order, a function of the seed and of
    how many passes were begun before. ``augment`` crops each image at random out of itself padded
    by two repeated border pixels, and flips every second one left to right. The global random
    number generators are neither read nor moved.
    """

    def __init__(
        self, source: ImageSet, batch_size: int, *, shuffle_seed: int | None, augment: bool
    ) -> None:
        if batch_size < 1:
            raise DataError(f"a batch size of {batch_size} was asked for; give 1 or more")
        if len(source) == 0:
            raise DataError("the image set is empty; there is nothing to make batches of")
        if shuffle_seed is not None:
            check_seed(shuffle_seed)
        self.source = source
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.augment = augment
        self._passes = 0

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next; the first is 0."""
        self._passes = epoch

    def holding_out(self, fraction: float, seed: int) -> tuple[ImageBatches, ImageBatches]:
        """The same without a random part of its images, and that part in order, as it is.

        Raises:
            DataError: if nothing would be left.
        """
        count = len(self.source)
        held = max(1, round(fraction * count))
        if held >= count:
            raise DataError(f"of {count} images {fraction:g} cannot be held out; give more")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        rest, out = (
            self.source.take(part.sort().values) for part in order.split([count - held, held])
        )
        kept = rest.batches(self.batch_size, shuffle_seed=self.shuffle_seed, augment=self.augment)
        return kept, out.batches(self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        generator = _generator(self.shuffle_seed or 0, self._passes)
        self._passes += 1
        return self._one_pass(generator)

    def _one_pass(self, generator: torch.Generator) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        images, labels = self.source.images, self.source.labels
        if self.shuffle_seed is None:
            order = torch.arange(len(images))
        else:
            order = torch.randperm(len(images), generator=generator)
        for index in order.split(self.batch_size):
            batch = images[index]
            if self.augment:
                batch = _crop_and_flip(batch, generator)
            yield batch if labels is None else (batch, labels[index])


def fashion_mnist(split: Literal["train", "test"]) -> ImageSet:
    """Load the bundled part of Fashion-MNIST: 12,000 images to train with, 2,000 to test.

    A fixed, class-balanced choice in shuffled order out of the original's 60,000 and 10,000
    (Xiao et al. 2017, MIT licence beside the file), each within its own split. Pixels are scaled
    to 0..1 and normalised with a mean of 0.286 and a standard deviation of 0.353, those of all
    60,000.
    """
    file = importlib.resources.files("eigendamage.zoo") / "data" / "fashion_mnist.npz"
    with file.open("rb") as stream:
        arrays = read_npz(stream, split, "fashion_mnist.npz")
    mean, std = arrays.mean or (), arrays.std or ()
    return ImageSet(normalise(arrays.pixels, mean, std), arrays.labels, arrays.class_names)


def normalise(
    pixels: UInt8[Tensor, "n c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "n c h w"]:
    """Map pixels to ``(pixels / 255 - mean) / std``, with a mean and a std for each channel."""
    channels = pixels.shape[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise DataError(
            f"images of {channels} channels cannot be normalised with mean {mean} and std {std};"
            f" give {channels} numbers for each, the std's above zero"
        )
    shape = (1, channels, 1, 1)
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def _generator(seed: int, passes: int) -> torch.Generator:
    # SeedSequence keeps (0, 1) and (1, 0) apart, which a sum of the two would not.
    state = np.random.SeedSequence([unsigned_seed(seed), passes]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _crop_and_flip(
    images: Float[Tensor, "n c h w"], generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    n, c, h, w = images.shape
    padding = _CROP_PADDING
    padded = torch.nn.functional.pad(images, (padding,) * 4, mode="replicate")
    offsets = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    flips = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(w).expand(n, w)
    rows = offsets[0] + torch.arange(h)
    columns = offsets[1] + torch.where(flips, columns.flip(1), columns)
    return padded[
        torch.arange(n).view(n, 1, 1, 1),
        torch.arange(c).view(1, c, 1, 1),
        rows.view(n, 1, h, 1),
        columns.view(n, 1, 1, w),
    ]
