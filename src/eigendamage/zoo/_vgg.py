"""VGG for 32 x 32 images, as the pruning papers use it."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from eigendamage.zoo._init import kaiming_

_STAGES_OF_VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with batch norm, 2 x 2 max pooling between, a linear classifier.

    The state dict names are those of the EigenDamage paper's released code: ``feature.{i}.*`` and
    ``classifier.*``.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, widths in enumerate(stages):
            if index > 0:
                layers.append(nn.MaxPool2d(2))
            for i, o in pairwise((channels, *widths)):
                layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
            channels = widths[-1]
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        kaiming_(self)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits."""
        return self.classifier(adaptive_avg_pool2d(self.feature(x), 1).flatten(1))


def vgg19(num_classes: int = 10) -> VGG:
    """Build VGG19 with batch norm for CIFAR: 20.0 M parameters, 0.40 G MACs at 32 x 32.

    Sixteen convolutions (Simonyan and Zisserman 2015, configuration E) without biases and, in place
    of the three fully connected layers, average pooling and one linear classifier: the form that
    network slimming (Liu et al. 2017) and EigenDamage (Wang et al. 2019) prune.
    """
    return VGG(_STAGES_OF_VGG19, num_classes)
