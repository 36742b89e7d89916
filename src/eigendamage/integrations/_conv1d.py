"""GPT-2's layers as Linear ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from eigendamage.errors import EigenDamageError
from eigendamage.integrations._extras import required
from eigendamage.layers import copy_model


def plain_linears(model: nn.Module) -> nn.Module:
    """A copy of a model in which GPT-2's ``Conv1D`` layers are ``nn.Linear`` with equal outputs.

    ``Conv1D`` is a Linear layer that stores its weight transposed; everything else of the library
    knows Linear alone. Dotted paths stay. Without a ``Conv1D`` it is a plain copy.

    Raises:
        ExtraError: if transformers is not installed.
        EigenDamageError: if the model is a lone ``Conv1D``.
    """
    kind = conv1d()
    if isinstance(model, kind):
        raise EigenDamageError("the model is a single Conv1D; give the model that it is a part of")
    copy = copy_model(model)
    found = [(path, m) for path, m in copy.named_modules() if isinstance(m, kind)]
    for path, module in found:
        parent, _, name = path.rpartition(".")
        setattr(copy.get_submodule(parent), name, _as_linear(module))
    return copy


def conv1d() -> type[Any]:
    """The class of GPT-2's layers.

    Raises:
        ExtraError: if transformers is not installed.
    """
    return required("transformers.pytorch_utils", "huggingface").Conv1D


def _as_linear(module: Any) -> nn.Linear:
    inputs, outputs = module.weight.shape
    # On no device: the weights that it would be given at random are not wanted.
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(
        module.weight.detach().T.contiguous(), requires_grad=module.weight.requires_grad
    )
    linear.bias = module.bias
    return linear.train(module.training)
