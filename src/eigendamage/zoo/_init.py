"""How the networks of the zoo are initialised."""

from __future__ import annotations

from torch import nn


def kaiming_(model: nn.Module) -> None:
    """Initialise every convolution and linear layer after He et al. 2015, in place.

    Normal weights with variance 2 / fan-in, biases of zero; batch norms start as the identity.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
