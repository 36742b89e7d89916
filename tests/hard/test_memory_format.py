"""Memory formats: kept as they came, and no gradient that writes past its memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.layers import find_layers
from eigendamage.surgery._factor import factored_module


def _network(inputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(inputs, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).eval()


def _images(count: int = 8) -> Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_layer_that_was_factored_before_does_not_change_its_format() -> None:
    factored = ed.FactoredConv2d(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 6, 3, padding=1)).eval()
    assert not factored.weight.is_contiguous()  # the product comes out that way, the stages do not
    model = _network()
    model[0] = factored
    stages = [torch.randn(2, 4), torch.randn(6, 2, 9)]
    again = factored_module(find_layers(model).compressible["0"], stages)
    assert all(p.is_contiguous() for p in again.parameters())
    model.to(memory_format=torch.channels_last)
    again = factored_module(find_layers(model).compressible["0"], stages)
    assert again[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert not again[1].weight.is_contiguous()


def test_narrow_shortcuts_train_in_rows_and_keep_their_format() -> None:
    """oneDNN writes past its memory otherwise: see `narrow_shortcuts_in_rows`."""
    model = _network().to(memory_format=torch.channels_last)
    plain = _network()
    narrow = model[4]
    stride = narrow.weight.stride()
    assert stride != plain[4].weight.stride()
    seen: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        # Not is_contiguous, which does not look at axes of size 1.
        rows = (inputs[0].stride(), module.weight.stride()) == ((216, 36, 6, 1), (6, 1, 1, 1))
        seen.append(rows)

    x = _images().contiguous(memory_format=torch.channels_last)
    batches = [(x, torch.arange(8) % 3)] * 2
    config = ed.FinetuneConfig(epochs=1, held_out=0.0, optimizer="sgd")
    hook = narrow.register_forward_hook(look)
    ed.finetune(model, batches, config, progress=False)
    hook.remove()
    assert seen
    assert all(seen)
    assert narrow.weight.stride() == stride
    assert not narrow._forward_pre_hooks
    ed.finetune(plain, [(x.contiguous(), y) for x, y in batches], config, progress=False)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)
    assert torch.isfinite(F.cross_entropy(model(x), batches[0][1]))
