"""compress --dry-run, and the plan that it shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage.cli import app

_MODULE = """
import torch
def net():
    torch.manual_seed(0)
    widths = (8, 24, 24, 3)
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
def data():
    return list(torch.randn(96, 8, generator=torch.Generator().manual_seed(1)).split(16))
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drynet.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr("sys.dont_write_bytecode", True)


def _run(options: Sequence[str]) -> str:
    given = ["compress", "--model", "drynet:net", "--data", "drynet:data", "--out", "small"]
    done = CliRunner().invoke(app, [*given, *options])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("method", ["auto", "eigendamage"])
def test_a_dry_run_shows_what_the_run_does_and_writes_nothing(method: str, tmp_path: Path) -> None:
    options = ["--macs", "0.6", "--method", method, "--no-augment", "--polish", "1"]
    before = sorted(tmp_path.rglob("*"))
    table = _run([*options, "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    assert "Planned: " + method in table
    assert "Nothing was changed or written" in table
    shown = json.loads(_run([*options, "--dry-run", "--json"]))
    assert sorted(tmp_path.rglob("*")) == before

    _run([*options, "--quiet"])
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert shown["layers"] == report["layers"]
    assert shown["macs"] == pytest.approx(report["macs"])
    assert shown["parameters"] == report["parameters"]
    assert shown["macs"][1] <= 0.6 * shown["macs"][0]
    for name in shown["layers"]:
        assert name in table


def test_the_preview_of_several_rounds_is_that_of_the_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )
    data = [torch.randn(32, 8)]
    few = {"method": "eigendamage", "progress": False}
    plan = ed.preview(model, data, budget=ed.Budget(params=0.49), rounds=2, **few)
    done = ed.compress(model, data, budget=ed.Budget(params=0.49), rounds=2, **few)
    assert plan == done.earlier[0]
    assert plan.budget.params == pytest.approx(0.7)
    with pytest.raises(ed.EigenDamageError, match="shots are for method='auto'"):
        ed.preview(model, data, budget=ed.Budget(params=0.5), shots=2, **few)
