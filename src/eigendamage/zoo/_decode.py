"""Image files to pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from eigendamage.errors import DataError
from eigendamage.zoo._limits import refuse_too_many_bytes
from eigendamage.zoo._sources import ImageFile

_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF")
# The second is a warning, and an error only where warnings are.
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_MOST_PIXELS = 64_000_000
_MOST_THREADS = 8


def decode(files: Sequence[ImageFile], resize: tuple[int, int] | None) -> UInt8[Tensor, "n 3 h w"]:
    """Read the files in several threads; RGB, all of one size.

    Args:
        files: at least one.
        resize: height and width to bring every image to, whatever its proportions.

    Raises:
        DataError: if a file is no whole image of 8 bits a channel, or of another size than the
            first; the message names it.
    """
    first = _decode_one(files[0], resize)
    height, width = first.shape[:2]
    refuse_too_many_bytes(len(files) * first.size, f"{len(files)} images of {height} x {width}")
    pixels = np.empty((len(files), 3, height, width), np.uint8)

    def place(index: int) -> None:
        image = _decode_one(files[index], resize)
        if image.shape != first.shape:
            raise DataError(
                f"'{files[index].name}' is {image.shape[0]} x {image.shape[1]} pixels (height x"
                f" width), but '{files[0].name}' is {height} x {width}; give a size to resize to"
            )
        pixels[index] = image.transpose(2, 0, 1)

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(place, range(len(files))):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels)


def _decode_one(file: ImageFile, resize: tuple[int, int] | None) -> np.ndarray:
    content = file.read()
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _refuse(image, file)
            # Pillow wants a palette's transparency made explicit before it is dropped.
            opaque = image.convert("RGBA") if image.has_transparency_data else image
            rgb = opaque.convert("RGB")
    # A broken PNG is a SyntaxError to Pillow.
    except (OSError, SyntaxError, ValueError, *_BOMBS) as error:
        raise DataError(f"'{file.name}' cannot be read as an image ({error}); remove it") from error
    if resize is not None:
        rgb = rgb.resize((resize[1], resize[0]), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _refuse(image: Image.Image, file: ImageFile) -> None:
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"'{file.name}' has {image.mode} pixels, more than 8 bits a channel; save it with 8"
        )
    if image.width * image.height > _MOST_PIXELS:
        raise DataError(
            f"'{file.name}' is {image.height} x {image.width} pixels, more than"
            f" {_MOST_PIXELS:,}; save it smaller"
        )
