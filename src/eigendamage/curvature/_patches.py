"""The second moment of whole patches, A over all inputs and kernel offsets, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigendamage.curvature._factors import gram
from eigendamage.layers import ConvGeometry
from eigendamage.seeds import later_seed

_BUFFER_BYTES = 64 * 2**20
_SKIPPED = 2**20  # numbers at a time


def patch_moments(
    x: Float[Tensor, "n i h w"],
    geometry: ConvGeometry,
    positions: Int[Tensor, "n p"] | None = None,
) -> tuple[Float[Tensor, "iK iK"], Float[Tensor, " iK"]]:
    """Σ_n Σ_t vec(a) vec(a)ᵀ and Σ_n Σ_t vec(a) over examples and positions, a the (i, K) patch.

    Divided by N·T they are the patch second moment A (Grosse & Martens 2016, eq. 26) and its mean.
    Cost: one (iK × n·t) product, and a slice of the patches at a time in memory.

    Args:
        x: the input.
        geometry: the convolution's.
        positions: output positions to read of each example, drawn uniformly; their sums are scaled
            to stand for all T. All positions by default.
    """
    rows, columns = geometry.output_size(x.shape[2], x.shape[3])
    seen = rows * columns if positions is None else positions.shape[1]
    width = x.shape[1] * geometry.offsets
    step = max(1, _BUFFER_BYTES // (width * seen * x.element_size()))
    moment, total = x.new_zeros(width, width), x.new_zeros(width)
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        if positions is None:
            patches = geometry.patches(part)
        else:
            patches = patches_at(part, geometry, positions[start : start + step])
        patches = patches.flatten(1, 2)
        moment += gram(patches)
        total += patches.sum((0, 2))
    scale = rows * columns / seen
    return scale * moment, scale * total


def patches_at(
    x: Float[Tensor, "n i h w"], geometry: ConvGeometry, positions: Int[Tensor, "n p"]
) -> Float[Tensor, "n i K p"]:
    """The patches that a convolution reads for some of its output positions, padding included.

    Equals ``geometry.patches(x)`` gathered along its last axis, without building the others.

    Args:
        x: the input.
        geometry: the convolution's.
        positions: of each example the output positions, counted row by row, on any device.
    """
    positions = positions.to(x.device)
    _, columns = geometry.output_size(x.shape[2], x.shape[3])
    padded = geometry.pad(x)
    width = padded.shape[3]
    flat = padded.flatten(2)
    top = positions // columns * geometry.stride[0]
    left = positions % columns * geometry.stride[1]
    taps: list[Tensor] = []
    for y in range(geometry.kernel[0]):
        for z in range(geometry.kernel[1]):
            at = (top + y * geometry.dilation[0]) * width + left + z * geometry.dilation[1]
            taps.append(flat.gather(2, at.unsqueeze(1).expand(-1, x.shape[1], -1)))
    return torch.stack(taps, 2)


@dataclass
class _Stream:
    """The numbers of one layer, how many examples have had theirs, and the last ones drawn."""

    random: torch.Generator
    examples: int = 0
    last: tuple[int, Tensor] | None = None


class PositionDraws:
    """Which positions of each example are read: at most so many, the same for any batch size.

    Args:
        limit: the most positions an example; all are read where there are no more.
        seed: of the draws, one stream of numbers a layer in data order.
        layers: the first layers that may draw, in the order of their streams; others have theirs
            in the order in which they first draw.
    """

    def __init__(self, limit: int, seed: int, layers: Iterable[str] = ()) -> None:
        self._limit = limit
        self._seed = seed
        self._streams: dict[str, _Stream] = {}
        self._first: int | None = None
        for name in layers:
            self._stream(name)

    def start_at(self, example: int) -> None:
        """Say which example of the data the coming draws of each layer begin with.

        Those before it are passed over, and a layer that draws again for the same examples (as
        under activation checkpointing) gets the same positions. Until this is called, each draw
        begins where the layer's last one ended.
        """
        self._first = example

    def draw(self, layer: str, examples: int, positions: int) -> Int[Tensor, "n p"] | None:
        """Uniform draws with replacement, (n, limit); None where all positions are to be read."""
        if positions <= self._limit:
            return None
        stream = self._stream(layer)
        first = stream.examples if self._first is None else self._first
        if stream.last is None or stream.last[0] != first or len(stream.last[1]) != examples:
            advance(stream.random, (first - stream.examples) * self._limit)
            uniform = torch.rand(
                (examples, self._limit), generator=stream.random, dtype=torch.float64
            )
            stream.last = first, uniform
            stream.examples = first + examples
        return (stream.last[1] * positions).long().clamp_max(positions - 1)

    def draw_counted(self, layer: str, counted: Bool[Tensor, "n t"]) -> Int[Tensor, " p"]:
        """The same where some positions do not count, as indices into all n·t of them.

        Each example is drawn from as if it had come alone, without what does not count.
        """
        found: list[Tensor] = []
        for example, mine in enumerate(counted.cpu()):
            places = example * len(mine) + mine.nonzero()[:, 0]
            drawn = self.draw(layer, 1, len(places))
            found.append(places if drawn is None else places[drawn[0]])
        return torch.cat(found).to(counted.device)

    def _stream(self, layer: str) -> _Stream:
        if layer not in self._streams:
            seed = later_seed(self._seed, len(self._streams))
            self._streams[layer] = _Stream(torch.Generator().manual_seed(seed))
        return self._streams[layer]


def advance(random: torch.Generator, count: int) -> None:
    """Pass over so many uniform float64 numbers, as if they had been drawn."""
    while count > 0:
        size = min(count, _SKIPPED)
        torch.rand(size, generator=random, dtype=torch.float64)
        count -= size
