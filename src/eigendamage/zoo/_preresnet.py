"""The pre-activation residual network of the EigenDamage paper."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from eigendamage.errors import EigenDamageError
from eigendamage.zoo._init import kaiming_


class PreActivationBottleneck(nn.Module):
    """Batch norm, ReLU and convolution, three times over: 1 x 1, 3 x 3, 1 x 1.

    The shortcut takes the input as it is; where the shape changes it goes through a plain 1 x 1
    convolution, ``downsample.0``.
    """

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.downsample = nn.Sequential()
        if in_channels != out_channels or stride != 1:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Return ``branch(x) + shortcut(x)``; what follows begins with a batch norm."""
        branch = self.conv1(relu(self.bn1(x)))
        branch = self.conv2(relu(self.bn2(branch)))
        branch = self.conv3(relu(self.bn3(branch)))
        return branch + self.downsample(x)


class PreResNet(nn.Module):
    """A stem, three stages of pre-activation bottlenecks, batch norm, pooling and a classifier.

    A stage's first block has the inner width of the stage before, the others that of their own.
    """

    def __init__(
        self, blocks_per_stage: int, widths: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.layer1 = _stage(widths[0], widths[0], blocks_per_stage, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks_per_stage, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks_per_stage, stride=2)
        self.bn = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        kaiming_(self)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(adaptive_avg_pool2d(relu(self.bn(x)), 1).flatten(1))


def preresnet(depth: int, *, num_classes: int = 10) -> PreResNet:
    """Build the pre-activation ResNet with ``depth = 9n + 2`` layers and 64, 128, 256 channels.

    He et al. 2016 with bottlenecks that keep their width (an expansion of 1, not 4): what the
    EigenDamage paper's released code builds, down to the inner widths and the names of the state
    dict, less that code's unused channel selections.
    """
    blocks, rest = divmod(depth - 2, 9)
    if blocks < 1 or rest:
        raise EigenDamageError(
            f"a pre-activation ResNet of bottlenecks has 9n + 2 layers, but a depth of {depth} was"
            " asked for; take 11, 20, 29, 56 or 164"
        )
    return PreResNet(blocks, (64, 128, 256), num_classes)


def preresnet29(num_classes: int = 10) -> PreResNet:
    """Build the paper's PreResNet-29; see `preresnet`."""
    return preresnet(29, num_classes=num_classes)


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = PreActivationBottleneck(in_channels, in_channels, out_channels, stride)
    rest = [
        PreActivationBottleneck(out_channels, out_channels, out_channels, stride=1)
        for _ in range(blocks - 1)
    ]
    return nn.Sequential(first, *rest)
