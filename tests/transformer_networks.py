"""Transformers that tests run over, by hand, so that what goes on in them is known."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEAD, TOKENS, CLASSES = 12, 3, 6, 5


class Grouped(nn.Module):
    """Causal attention in which two query heads share one of three heads of keys and values."""

    def __init__(self, queries: int = 6, keys: int = 3, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.shared = queries // keys
        self.q = nn.Linear(WIDTH, queries * HEAD)
        self.k = nn.Linear(WIDTH, keys * HEAD, bias=False)
        self.v = nn.Linear(WIDTH, keys * HEAD)
        self.norm = norm or nn.Identity()
        self.out = nn.Linear(queries * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for each in (self.norm(self.q(x)), self.k(x), self.v(x))
        )
        k, v = (each.repeat_interleave(self.shared, 1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention with one layer for q, k and v of four heads.

    Args:
        order: whether its outputs are all q, all k, all v, or q, k, v head by head.
        counted: whether the reshape reads the number of heads from an attribute.
    """

    def __init__(
        self, order: Literal["by kind", "by head"] = "by kind", *, counted: bool = False
    ) -> None:
        super().__init__()
        self.order = order
        self.counted = counted
        if counted:
            self.num_heads = 4
        self.qkv = nn.Linear(WIDTH, 3 * 4 * HEAD)
        self.proj = nn.Linear(4 * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.num_heads if self.counted else -1
        if self.order == "by kind":
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, HEAD)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (heads, 3, HEAD)).permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """The neurons of two layers, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 10, bias=False)
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Sequential):
    """Neurons with a ReLU in place."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 10), nn.ReLU(inplace=True), nn.Linear(10, WIDTH))


class Transformer(nn.Module):
    """Blocks in residual connections, normed before, and a classifier of the mean token."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in blocks)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(1))


def transformer(*blocks: nn.Module) -> Transformer:
    """In float64, with the same weights every time it is made of the same blocks."""
    model = Transformer(*blocks).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return model


def tokens(examples: int = 4) -> Tensor:
    """Inputs of `transformer`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, TOKENS, 7, generator=generator, dtype=torch.float64)
