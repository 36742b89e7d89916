"""Numbers that are not finite, at every stage: an error that names the place, and no trace left."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from tests.hard.odd_calls import fingerprint

NAN, INF = math.nan, math.inf


class Spoilt(nn.Module):
    """Passes its input on, with one value replaced; and its gradient, if that is asked for."""

    def __init__(self, value: float | None = None, gradient: float | None = None) -> None:
        super().__init__()
        self.value, self.gradient = value, gradient

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        if self.value is not None:
            y.view(-1)[0] = self.value
        if self.gradient is not None and y.requires_grad:
            y.register_hook(lambda g: g * self.gradient)
        return y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 12),
        nn.Tanh(),
        nn.Linear(12, 3),
    ).eval()


def batches(scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(4, 2, 6, 6, generator=generator), torch.arange(4) % 3)
        for _ in range(5)
    ]


def with_module(at: int, module: nn.Module) -> nn.Module:
    model = network()
    model.insert(at, module)
    return model


def with_value(name: str, value: float, everywhere: bool = False) -> nn.Module:
    model = network()
    tensor = model.state_dict()[name]
    tensor.mul_(value) if everywhere else tensor.view(-1)[:1].fill_(value)
    return model


WRONG: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a bias": (lambda: with_value("0.bias", NAN), {}, "parameter '0.bias'"),
    "a statistic": (lambda: with_value("1.running_var", NAN), {}, "buffer '1.running_var'"),
    "the classifier": (lambda: with_value("9.weight", INF), {}, "layer '9'"),
    "an activation": (lambda: with_module(5, Spoilt(NAN)), {}, "output of layer '5' (Spoilt)"),
    "an infinite one": (lambda: with_module(5, Spoilt(INF)), {}, "layer '8': the second moment"),
    "one that overflows": (lambda: with_module(5, Spoilt(1e38)), {}, "layer '8': the second"),
    "a gradient": (lambda: with_module(7, Spoilt(gradient=NAN)), {}, "its output gradients"),
    "a huge gradient": (lambda: with_module(7, Spoilt(gradient=1e30)), {}, "output gradients"),
    "a huge weight": (lambda: with_value("0.weight", 1e30, True), {}, "layer '3': the second"),
    "huge inputs": (network, {"data": batches(1e30)}, "layer '0': the second moment"),
    "an input": (network, {"data": batches(NAN)}, "the input of batch 0"),
    "held-out inputs": (network, {"eval_data": batches(INF)}, "the input of batch 0"),
    "a target": (
        network,
        {"data": [(x, torch.full((4, 3), NAN)) for x, _ in batches()], "loss": "mse"},
        "the labels hold NaN",
    ),
}


@pytest.mark.parametrize("stage", list(WRONG))
def test_what_is_not_finite_is_named(stage: str) -> None:
    build, options, said = WRONG[stage]
    model = build()
    before = fingerprint(model)
    options = {"data": batches(), **options}
    with pytest.raises(ed.NonFiniteError) as found:
        ed.compress(model, budget=ed.Budget(macs=0.6), progress=False, **options)
    assert said in str(found.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("what", "value"),
    [("S", NAN), ("A", 1e30), ("Q_S", 1e30), ("eigenvalues", INF), ("patches", NAN)],
)
def test_a_factor_that_is_not_a_factor_never_makes_a_broken_model(what: str, value: float) -> None:
    """Of a curvature made by hand; one that is loaded is checked when it is."""
    model = network()
    curvature = ed.estimate_curvature(
        model, batches(), also=("patches", "channels"), progress=False
    )
    layers = dict(curvature)
    tensor = getattr(layers["3"], what).clone()
    tensor.view(-1)[0] = value
    layers["3"] = replace(layers["3"], **{what: tensor})
    broken = replace(curvature, layers=layers)
    for method in ("kron-obs", "auto"):
        try:
            result = ed.compress(
                model,
                batches(),
                budget=ed.Budget(macs=0.6),
                method=method,
                curvature=broken,
                progress=False,
            )
        except ed.EigenDamageError as error:
            assert "'3'" in str(error)
        else:
            assert torch.isfinite(result.model(batches()[0][0])).all()


@pytest.mark.parametrize("method", ["auto", "obs"])
@pytest.mark.parametrize("scale", [0.0, 1e-15])
def test_singular_factors_give_a_model(method: str, scale: float) -> None:
    """Inputs that say nothing at all: factors of zero, or of subnormal numbers."""
    budget = ed.Budget(ratio=0.5) if method == "obs" else ed.Budget(macs=0.6)
    result = ed.compress(network(), batches(scale), budget=budget, method=method, progress=False)
    assert torch.isfinite(result.model(batches()[0][0])).all()


def _options(seed: Any) -> dict[str, Any]:
    return {"seed": seed, "progress": False}


SEEDED: dict[str, Callable[[Any], object]] = {
    "compress": lambda seed: ed.compress(
        network(), batches(), budget=ed.Budget(macs=0.6), **_options(seed)
    ),
    "preview": lambda seed: ed.preview(
        network(), batches(), budget=ed.Budget(macs=0.6), **_options(seed)
    ),
    "sweep": lambda seed: ed.sweep(
        network(), batches(), budgets=[ed.Budget(macs=0.6)], **_options(seed)
    ),
    "compare": lambda seed: ed.compare(
        network(),
        batches(),
        eval_data=batches(),
        methods=["magnitude"],
        budgets=[0.6],
        epochs=0,
        **_options(seed),
    ),
    "estimate_curvature": lambda seed: inspect.unwrap(ed.estimate_curvature)(
        network(), batches(), **_options(seed)
    ),
    "finetune": lambda seed: ed.finetune(
        network(), batches(), ed.FinetuneConfig(seed=seed), progress=False
    ),
    "load_images": lambda seed: ed.zoo.load_images("absent", seed=seed),
}


@pytest.mark.parametrize("where", list(SEEDED))
@pytest.mark.parametrize("seed", [True, 2**64, -(2**63) - 1])
def test_a_seed_that_is_none_is_refused(where: str, seed: Any) -> None:
    with pytest.raises(ed.EigenDamageError, match=f"seed is {seed}"):
        SEEDED[where](seed)


@pytest.mark.parametrize("seed", [None, 1.5, "1"])
def test_a_seed_that_is_no_number_is_refused(seed: Any) -> None:
    with pytest.raises(ed.EigenDamageError, match=f"seed is {seed!r}; expected a whole number"):
        SEEDED["estimate_curvature"](seed)  # of which the types are not checked here


@pytest.mark.parametrize("seed", [2**64 - 1, -1, -(2**63)])
def test_every_seed_that_torch_takes_is_taken_everywhere(seed: int, tmp_path: Path) -> None:
    result = ed.compress(
        network(),
        batches(),
        budget=ed.Budget(macs=0.6),
        method="kron-obs",
        rounds=2,
        epochs=1,
        finetuning=ed.FinetuneConfig(seed=seed),
        **_options(seed),
    )
    result.report.save(tmp_path / "report.json")
    assert ed.Report.load(tmp_path / "report.json").environment.seed == seed
    ed.estimate_curvature(
        network(), batches(), also=("patches",), patch_positions=2, **_options(seed)
    )
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    images = ed.zoo.load_images(tmp_path / "d.npz", seed=seed)
    assert sum(len(batch) for batch in images.batches(2, shuffle_seed=seed)) == 3
