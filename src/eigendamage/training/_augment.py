"""Changes of images that leave what they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Makes inputs, (n, …), of inputs, drawing from a generator on the CPU alone."""


def crops_and_flips(padding: int = 4) -> Augment:
    """Shift each image by up to ``padding`` pixels in both directions, and mirror half of them.

    Pixels that come in are zero, the mean of normalised images.
    """
    return _CropsAndFlips(padding)


@dataclass(frozen=True)
class _CropsAndFlips:
    """The function that `crops_and_flips` makes; its words are the same in every process."""

    padding: int

    def __call__(
        self, x: Float[Tensor, "n c h w"], generator: torch.Generator
    ) -> Float[Tensor, "n c h w"]:
        n, c, h, w = x.shape
        padding = self.padding
        shifts = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(x.device)
        mirrored = torch.rand(n, generator=generator).to(x.device) < 0.5
        padded = F.pad(x, (padding,) * 4)
        rows = shifts[0, :, None] + torch.arange(h, device=x.device)
        columns = torch.arange(w, device=x.device).expand(n, w)
        columns = torch.where(mirrored[:, None], w - 1 - columns, columns) + shifts[1, :, None]
        tall = padded.gather(2, rows[:, None, :, None].expand(n, c, h, w + 2 * padding))
        return tall.gather(3, columns[:, None, None, :].expand(n, c, h, w))
