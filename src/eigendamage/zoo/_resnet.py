"""Residual networks for small images: the CIFAR family of He et al. 2015, and wider ones."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad, relu

from eigendamage.errors import EigenDamageError
from eigendamage.zoo._init import kaiming_

Shortcut = Literal["zero-pad", "projection"]


class ZeroPadShortcut(nn.Module):
    """The shortcut without parameters (option A of He et al. 2015, section 4.2).

    Keeps every ``stride``-th pixel in both directions and adds channels of zeros, half of them
    before and half after.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Thin out the pixels and pad the channels."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return pad(kept, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm, around a shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Return ``relu(branch(x) + shortcut(x))``."""
        branch = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of basic blocks, global average pooling and a linear classifier.

    The second and the third stage begin with stride 2.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        widths: tuple[int, int, int],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        stem_stride: int = 1,
        shortcut: Shortcut = "zero-pad",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks_per_stage, 1, shortcut)
        self.layer2 = _stage(widths[0], widths[1], blocks_per_stage, 2, shortcut)
        self.layer3 = _stage(widths[1], widths[2], blocks_per_stage, 2, shortcut)
        self.linear = nn.Linear(widths[2], num_classes)
        kaiming_(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(depth: int, *, width: int = 16, num_classes: int = 10) -> ResNet:
    """Build the CIFAR ResNet of He et al. 2015 with ``depth = 6n + 2`` layers.

    Args:
        depth: 20, 32, 44, 56, 110 and so on.
        width: channels of the first stage; the others have two and four times as many.
        num_classes: size of the output.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise EigenDamageError(
            f"a CIFAR ResNet has 6n + 2 layers, but a depth of {depth} was asked for;"
            " take 8, 14, 20, 32, 44, 56 or 110"
        )
    return ResNet(blocks, (width, 2 * width, 4 * width), num_classes=num_classes)


def resnet20(num_classes: int = 10, *, width: int = 16) -> ResNet:
    """Build the CIFAR ResNet-20: 0.27 M parameters, 41 M MACs at 32 x 32."""
    return resnet(20, width=width, num_classes=num_classes)


def resnet32(num_classes: int = 10, *, width: int = 16) -> ResNet:
    """Build the CIFAR ResNet-32: 0.46 M parameters, 69 M MACs at 32 x 32."""
    return resnet(32, width=width, num_classes=num_classes)


def resnet44(num_classes: int = 10, *, width: int = 16) -> ResNet:
    """Build the CIFAR ResNet-44: 0.66 M parameters, 97 M MACs at 32 x 32."""
    return resnet(44, width=width, num_classes=num_classes)


def resnet56(num_classes: int = 10, *, width: int = 16) -> ResNet:
    """Build the CIFAR ResNet-56: 0.85 M parameters, 125 M MACs at 32 x 32."""
    return resnet(56, width=width, num_classes=num_classes)


def wide_resnet32(num_classes: int = 10) -> ResNet:
    """Build the ResNet-32 of the EigenDamage paper, four times as wide: 64, 128, 256 channels.

    With 1 x 1 convolutions and batch norm on the two shortcuts that change shape, and ten classes,
    it has the size the paper prints (Wang et al. 2019): 7.43 M parameters and 1.10 G MACs at
    32 x 32. With shortcuts without parameters it would have 7.39 M, with 100 classes 7.45 M.
    """
    return ResNet(5, (64, 128, 256), num_classes=num_classes, shortcut="projection")


def _shortcut(in_channels: int, out_channels: int, stride: int, kind: Shortcut) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    if kind == "zero-pad":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _stage(
    in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: Shortcut
) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    rest = [BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
