"""How a convolution reads its input: kernel, stride, padding, dilation, and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvGeometry:
    """The reading pattern of a two-dimensional convolution with one group.

    Attributes:
        kernel: height and width of the kernel.
        stride: steps in pixels, vertical and horizontal.
        padding: pixels added (before, after) on the vertical and the horizontal axis.
        dilation: distance between kernel taps.
        padding_mode: what is added: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvGeometry:
        """The geometry of a convolution; ``'same'`` and ``'valid'`` become explicit numbers."""
        kernel = _pair(conv.kernel_size)
        dilation = _pair(conv.dilation)
        if conv.padding == "valid":
            padding = ((0, 0), (0, 0))
        elif conv.padding == "same":
            totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            padding = tuple((t // 2, t - t // 2) for t in totals)
        else:
            vertical, horizontal = conv.padding
            padding = ((int(vertical),) * 2, (int(horizontal),) * 2)
        (top, bottom), (left, right) = padding
        return cls(
            kernel,
            _pair(conv.stride),
            ((top, bottom), (left, right)),
            dilation,
            conv.padding_mode,
        )

    @property
    def offsets(self) -> int:
        """Number of kernel taps, K."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads exactly one input pixel, and none is padded."""
        return self.kernel == (1, 1) and self.padding == ((0, 0), (0, 0))

    def output_size(self, height: int, width: int) -> Pair:
        """Height and width of the output for an input of the given size."""
        sizes: list[int] = []
        for axis, size in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            padded = size + sum(self.padding[axis])
            sizes.append((padded - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def pad(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n i hp wp"]:
        """The input with its padding in place."""
        (top, bottom), (left, right) = self.padding
        if not any((top, bottom, left, right)):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (left, right, top, bottom), mode=mode)

    def taps(self, x: Float[Tensor, "n i h w"]) -> Iterator[Float[Tensor, "n i oh ow"]]:
        """For each kernel offset, the pixels that it reads: views of the padded input."""
        padded = self.pad(x)
        rows, columns = self.output_size(x.shape[2], x.shape[3])
        for y in range(self.kernel[0]):
            for z in range(self.kernel[1]):
                top, left = y * self.dilation[0], z * self.dilation[1]
                bottom = top + self.stride[0] * (rows - 1) + 1
                right = left + self.stride[1] * (columns - 1) + 1
                yield padded[:, :, top : bottom : self.stride[0], left : right : self.stride[1]]

    def patches(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n i K t"]:
        """The unfolded input, one patch a position. The reference: K times the input's memory."""
        return torch.stack([tap.flatten(2) for tap in self.taps(x)], dim=2)

    def coverage(self, height: int, width: int) -> Float[Tensor, "h w"]:
        """How many patches read each pixel, m(p): the fold of ones, in closed form.

        The axes are independent, so it is the outer product of two counts.
        """
        out = self.output_size(height, width)
        counts: list[Tensor] = []
        for axis, size in enumerate((height, width)):
            count = torch.zeros(size, dtype=torch.float64)
            for tap in range(self.kernel[axis]):
                start = tap * self.dilation[axis] - self.padding[axis][0]
                read = start + self.stride[axis] * torch.arange(out[axis])
                inside = read[(read >= 0) & (read < size)]
                count[inside] += 1
            counts.append(count)
        return torch.outer(counts[0], counts[1])


def _pair(value: tuple[int, ...]) -> Pair:
    return int(value[0]), int(value[1])
