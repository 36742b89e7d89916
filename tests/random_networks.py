"""Random small networks: stacks of blocks with sums, concatenations, depthwise layers and gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Kind = Literal["plain", "sum", "projected sum", "concatenation", "depthwise", "excite"]
Head = Literal["pooled", "flattened"]


@dataclass(frozen=True)
class Block:
    """One block: its kind, its width (of what is new in it), and its stride where it has one."""

    kind: Kind
    width: int
    stride: int


@dataclass(frozen=True)
class RandomNetwork:
    """What a random network is made of; it prints as what rebuilds it."""

    stem: int
    blocks: tuple[Block, ...]
    head: Head
    bias: bool
    seed: int

    def model(self) -> nn.Module:
        """In float32 and eval mode, with batch norm's statistics as training leaves them."""
        torch.manual_seed(self.seed)
        model = _Stack(self).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        return model

    def inputs(self, examples: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(examples, 3, 8, 8, generator=generator)


class _Conv(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, bias: bool
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class _Sum(nn.Module):
    def __init__(self, inputs: int, block: Block, bias: bool) -> None:
        super().__init__()
        projected = block.kind == "projected sum"
        outputs, stride = (block.width, block.stride) if projected else (inputs, 1)
        self.first = _Conv(inputs, block.width, stride=stride, bias=bias)
        self.second = nn.Conv2d(block.width, outputs, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=bias) if projected else nn.Identity()
        )
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.second(self.first(x))) + self.shortcut(x))


class _Concatenation(nn.Module):
    def __init__(self, inputs: int, block: Block, bias: bool) -> None:
        super().__init__()
        self.left = _Conv(inputs, block.width, 1, bias=bias)
        self.right = _Conv(inputs, 4, 3, bias=bias)
        self.outputs = block.width + 4

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class _Depthwise(nn.Module):
    def __init__(self, inputs: int, block: Block, bias: bool) -> None:
        super().__init__()
        self.each = nn.Conv2d(inputs, inputs, 3, block.stride, 1, groups=inputs, bias=bias)
        self.norm = nn.BatchNorm2d(inputs)
        self.mix = _Conv(inputs, block.width, 1, bias=bias)
        self.outputs = block.width

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.relu(self.norm(self.each(x))))


class _Excite(nn.Module):
    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(inputs, 4, 1), nn.Conv2d(4, inputs, 1)
        self.outputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class _Plain(nn.Module):
    def __init__(self, inputs: int, block: Block, bias: bool) -> None:
        super().__init__()
        self.conv = _Conv(inputs, block.width, stride=block.stride, bias=bias)
        self.outputs = block.width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Stack(nn.Module):
    def __init__(self, network: RandomNetwork) -> None:
        super().__init__()
        self.stem = _Conv(3, network.stem, bias=network.bias)
        width = network.stem
        blocks: list[nn.Module] = []
        for block in network.blocks:
            blocks.append(_BUILD[block.kind](width, block, network.bias))
            width = blocks[-1].outputs
        self.blocks = nn.Sequential(*blocks)
        if network.head == "pooled":
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
        else:
            self.head = nn.Sequential(
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(4 * width, 8),
                nn.ReLU(),
                nn.Linear(8, 5),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


_BUILD: dict[Kind, Callable[[int, Block, bool], nn.Module]] = {
    "plain": _Plain,
    "sum": _Sum,
    "projected sum": _Sum,
    "concatenation": _Concatenation,
    "depthwise": _Depthwise,
    "excite": lambda inputs, block, _bias: _Excite(inputs, block),
}


def networks() -> st.SearchStrategy[RandomNetwork]:
    """Random networks of one to three blocks, 4 to 12 channels wide, for inputs of 3×8×8."""
    widths = st.integers(4, 12)
    block = st.builds(Block, st.sampled_from(get_args(Kind)), widths, st.sampled_from((1, 2)))
    return st.builds(
        RandomNetwork,
        stem=widths,
        blocks=st.lists(block, min_size=1, max_size=3).map(tuple),
        head=st.sampled_from(get_args(Head)),
        bias=st.booleans(),
        seed=st.integers(0, 2**16),
    )
