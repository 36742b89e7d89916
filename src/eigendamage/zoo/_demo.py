"""The demo network: a small residual CNN that comes trained on the bundled images."""

from __future__ import annotations

import importlib.resources

import torch

from eigendamage.zoo._resnet import ResNet
from eigendamage.zoo._weights import load_weights


def demo_network(pretrained: bool = True) -> ResNet:
    """Build the demo network for 1 x 28 x 28 images and ten classes: 0.70 M parameters.

    A residual CNN: a 3 x 3 stem of stride 2, then two basic blocks each at 32, 64 and 128 channels
    (14, 7 and 4 pixels a side), with 1 x 1 convolutions where a shortcut changes shape.

    Args:
        pretrained: load the weights trained on `fashion_mnist("train")`, and return the network
            in evaluation mode; the global random number generator is left as it was.
    """
    if not pretrained:
        return _untrained()
    with torch.random.fork_rng(devices=[]):
        model = _untrained()
    weights = importlib.resources.files("eigendamage.zoo") / "weights" / "demo_network.safetensors"
    with importlib.resources.as_file(weights) as path:
        load_weights(model, path)
    model.eval()
    return model


def _untrained() -> ResNet:
    return ResNet(2, (32, 64, 128), in_channels=1, stem_stride=2, shortcut="projection")
