"""What is loaded in a new process is what was saved: every method on every network."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eigendamage as ed
from tests.cases import CASES
from tests.saving.fresh import EXPECTED, fresh
from tests.transformer_networks import tokens

ALL = ("patches", "gradients", "channels")
MASKS = ("obs", "obd")
# Depthwise stages take half of the time of all: some of them.
DEPTHWISE = ("residual", "mixed", "conv same", "conv pointwise strided")
ITERATED = {
    "resnet": ("kron-obs", "auto"),
    "vgg, flattened": ("eigendamage", "magnitude"),
    "mobilenet": ("kron-obs", "eigendamage"),
    "transformer": ("kron-obs", "auto"),
}
FACTORED = (ed.FactoredConv2d, ed.FactoredLinear)


@dataclass(frozen=True)
class Small:
    """A compressed model, and inputs to run it on."""

    model: nn.Module
    x: Tensor


def _planned(
    model: nn.Module, curvature: ed.Curvature, method: str, params: float = 0.7
) -> nn.Module | None:
    """None where the method has nothing to remove."""
    budget = ed.Budget(ratio=0.5) if method in MASKS else ed.Budget(params=params)
    options = {"refine": 0} if method == "auto" else {}
    try:
        plan = ed.make_plan(model, curvature, budget, method=method, **options)
    except (ed.BudgetError, ed.NothingToCompressError):
        return None
    return ed.apply_plan(model, plan, curvature)


@functools.cache
def _all() -> dict[tuple[str, str], Small]:
    """By network and method."""
    found: dict[tuple[str, str], Small] = {}
    for name, case in CASES.items():
        model, (x, _) = case.model(), case.data(4)
        curvature = ed.estimate_curvature(model, [x], also=ALL, progress=False)
        for method in ed.METHODS:
            if method == "eigendamage-dw" and name not in DEPTHWISE:
                continue
            small = _planned(model, curvature, method)
            if small is not None:
                found[name, method] = Small(small, x)
    for name, (first, second) in ITERATED.items():
        generator = torch.Generator().manual_seed(2)
        image = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        model, x = fresh(name), tokens(6) if name == "transformer" else image
        curvature = ed.estimate_curvature(model, [x], also=ALL, progress=False)
        channels = _planned(model, curvature, "kron-obs")
        assert channels is not None
        found[name, "channels"] = Small(channels, x)
        # Twice, so that layers are factored which have lost channels, and the other way around.
        once = _planned(model, curvature, first, 0.8)
        assert once is not None
        again = ed.estimate_curvature(once, [x], also=ALL, progress=False)
        twice = _planned(once, again, second, 0.7)
        assert twice is not None
        found[name, f"{first} {second}"] = Small(twice, x)
    return found


def test_every_method_on_every_network_in_a_new_process(tmp_path: Path) -> None:
    models = _all()
    # The table has what it is meant to have.
    assert {name for name, _ in models} == {*CASES, *ITERATED}
    assert {method for _, method in models} >= set(ed.METHODS) - {"slimming"}
    for (name, method), small in models.items():
        folder = tmp_path / name / method
        ed.save(small.model, folder)
        expected = {k: v.contiguous().clone() for k, v in small.model.state_dict().items()}
        with torch.no_grad():
            output = small.model(small.x)
            assert torch.equal(ed.load(fresh(name), folder)(small.x), output), (name, method)
        save_file({**expected, "input": small.x, "output": output}, folder / EXPECTED)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.saving.fresh", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(models)


def test_dense_layers_return_what_factored_ones_do() -> None:
    factored = {key: s for key, s in _all().items() if any(map(_is_factored, s.model.modules()))}
    assert {"auto", "eigendamage", "eigendamage-dw"} <= {method for _, method in factored}
    for (name, method), small in factored.items():
        dense = ed.densify(small.model)
        assert not any(map(_is_factored, dense.modules()))
        with torch.no_grad():
            torch.testing.assert_close(
                dense(small.x),
                small.model(small.x),
                rtol=0,
                atol=1e-10,
                msg=lambda text, at=(name, method): f"{at}: {text}",
            )
        if method in ("eigendamage", "eigendamage-dw") and name in CASES:
            shapes = {k: v.shape for k, v in dense.state_dict().items()}
            assert shapes == {k: v.shape for k, v in fresh(name).state_dict().items()}


@pytest.mark.parametrize("method", ["auto", "eigendamage-dw", "kron-obs auto"])
def test_dense_layers_are_saved_as_well(method: str, tmp_path: Path) -> None:
    name = "resnet" if " " in method else "residual"
    small = _all()[name, method]
    dense = ed.densify(small.model)
    ed.save(dense, tmp_path)
    assert torch.equal(ed.load(fresh(name), tmp_path)(small.x), dense(small.x))


def test_both_forms_and_counts_of_heads_were_among_them() -> None:
    """What the first test is worth: layers that are factored and have lost channels, counters."""
    structures = {key: ed.saving.describe(small.model) for key, small in _all().items()}
    forms = [form for each in structures.values() for form in each.modules.values()]
    assert any(f.stages and f.dropped_outputs for f in forms)
    assert any(f.stages and f.dropped_inputs for f in forms)
    assert any(f.counts for f in forms)
    assert any(f.masked for f in forms)
    assert any(f.added_bias for f in forms)
    assert {f.stages.form for f in forms if f.stages} == {
        *("three", "merge_in", "merge_out", "depthwise")
    }


def _is_factored(module: nn.Module) -> bool:
    return isinstance(module, FACTORED)
