"""find_layers: both lists, and nothing with parameters in neither."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from eigendamage import EigenDamageError, LayerError, find_layers
from eigendamage.layers import FactoredLinear
from tests.cases import CASES, Case


def test_every_module_with_parameters_is_in_one_of_the_lists(case: Case) -> None:
    model = case.model()
    found = find_layers(model)
    holders = {n for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    assert set(found.compressible) | set(found.left_alone) == holders
    assert not set(found.compressible) & set(found.left_alone)


def test_reasons_are_told() -> None:
    tied = nn.Linear(4, 4)
    shared = nn.Linear(4, 4)
    shared.weight = tied.weight
    masked = nn.Linear(4, 4)
    prune.l1_unstructured(masked, "weight", 0.5)

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)

    model = nn.ModuleDict(
        {
            "hooked": hooked,
            "plain": nn.Linear(4, 4),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "conv1d": nn.Conv1d(4, 4, 3),
            "norm": nn.LayerNorm(4),
            "embedding": nn.Embedding(4, 4),
            "tied": tied,
            "shared": shared,
            "masked": masked,
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "overridden": Doubled(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    found = find_layers(model, ignore=["plain"])
    assert not found.compressible
    expected = {
        "hooked": "hooks",
        "plain": "on request",
        "grouped": "grouped",
        "conv1d": "Conv1d",
        "norm": "no weight matrix",
        "embedding": "Embedding",
        "tied": "shared",
        "shared": "shared",
        "masked": "masked",
        "normed": "parametrized",
        "overridden": "overrides",
        "attention": "MultiheadAttention",
        "attention.out_proj": "read directly",
    }
    for name, words in expected.items():
        assert words in found.left_alone[name], (name, found.left_alone[name])


def test_a_module_under_two_names_is_one_layer() -> None:
    found = find_layers(CASES["shared"].model())
    assert found.compressible["named"].names == ("named", "alias")
    assert "alias" not in found.compressible


def test_a_factored_layer_is_one_layer() -> None:
    stages = FactoredLinear(nn.Linear(6, 2, bias=False), nn.Linear(2, 5))
    layer = find_layers(nn.Sequential(stages)).compressible["0"]
    assert (layer.outputs, layer.inputs) == (5, 6)
    torch.testing.assert_close(layer.weight()[:, :, 0], stages[1].weight @ stages[0].weight)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(EigenDamageError, match="matches no layer"):
        find_layers(nn.Linear(2, 2), ignore=["nothing*"])


def test_lazy_layers_are_refused_by_name() -> None:
    with pytest.raises(LayerError, match="lazy") as error:
        find_layers(nn.Sequential(nn.LazyLinear(3)))
    assert error.value.layer == "0"


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own
def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(EigenDamageError, match="compile"):
        find_layers(torch.compile(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("how", ["part", "in place", "forward"])
def test_a_model_that_was_compiled_in_parts_is_refused_by_name(how: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    if how == "part":
        model[0] = torch.compile(model[0])  # type: ignore[assignment]
    elif how == "in place":
        model[0].compile()
    else:
        model[0].forward = torch.compile(model[0].forward)
    with pytest.raises(EigenDamageError, match="'0' was compiled in place"):
        find_layers(model)


def test_a_parametrized_layer_is_told_by_its_own_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    found = find_layers(model)
    assert list(found.compressible) == ["0"]
    assert list(found.left_alone) == ["1"]
    assert "remove_parametrizations" in found.left_alone["1"]
