"""The command line's way to method auto: compress with its options, and sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage.cli import app
from eigendamage.files import alone_in

_SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )

def batches(count):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 6, 6, generator=g), torch.randint(0, 4, (4,), generator=g))
            for _ in range(count)]

def data():
    return [x for x, _ in batches(6)], batches(2)
"""

_FEW = ("--no-calibrate", "--actions", "low-rank")  # quick, where neither matters


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `tiny` with a network and data, in the folder that commands run in."""
    (tmp_path / "tiny.py").write_text(_SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def _run(command: str, *options: str) -> Result:
    arguments = [command, "--model", "tiny:net", "--data", "tiny:data", "--out", "out", *options]
    return CliRunner().invoke(app, arguments)


def _went_well(done: Result) -> Result:
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def _only_document(done: Result) -> dict[str, object]:
    """Standard output as one JSON document, with nothing before or after it."""
    return json.loads(_went_well(done).stdout)


def test_compress_takes_auto_and_repairs_and_says_so() -> None:
    out = Path("out")
    done = _went_well(_run("compress", "--macs", "0.6", "--params", "0.7"))
    report = ed.Report.load(out / "report.json")
    assert report.method == "auto"
    assert report.budget == "macs 0.6, params 0.7"
    assert report.macs[1] <= 0.6 * report.macs[0]
    assert report.parameters[1] <= 0.7 * report.parameters[0]
    left_out = any("the repair was left out" in note for note in report.notes)
    assert (report.repaired is None) == left_out
    assert report.recalibrated is None
    plan = ed.Plan.load(out / "plan.json")
    small = ed.apply_plan(_net(), plan, ed.load_curvature(out / "curvature.safetensors"))
    small.load_state_dict(load_file(out / "model.safetensors"))
    truth = report.truth
    assert truth is not None
    rows = _rows(done.output)
    if report.repaired is not None:
        assert rows["repaired"][-1] == f"{report.repaired.divergence:.4g}"
        assert rows["measured after repair"][0] == f"{truth.after_repair:.4g}"
    assert rows["priced"][0] == f"{truth.priced:.4g}"
    assert rows["calibrated"] == [f"{truth.calibrated:.4g}", f"{truth.factor:.2f}×"]
    assert rows["joint quadratic, before repair"][0] == f"{truth.quadratic:.4g}"
    assert rows["measured before repair"][0] == f"{truth.before_repair:.4g}"
    assert rows["prediction trusted"][0] == ("yes" if truth.trusted else "no")
    alone = done.output[done.output.index("each layer alone") :]
    for name, layer in truth.layers.items():
        found = _rows(alone)[name]
        assert found[:2] == [f"{layer.price:.4g}", f"{layer.calibrated:.4g}"]
        assert found[2] == ("–" if layer.measured is None else f"{layer.measured:.4g}")
    told = "No other plan of the same menus" in " ".join(done.output.split())
    assert told == (report.gap is not None)


def _net() -> object:
    import tiny  # noqa: PLC0415

    return tiny.net().eval()


def _rows(output: str) -> dict[str, list[str]]:
    """The cells of every line of a table by its first one."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    return {cells[0]: [c for c in cells[1:] if c] for cells in lines if cells}


def test_compress_without_repair_recalibrates_unless_told_not_to() -> None:
    options = ["--bytes", "0.7", "--no-repair", "--polish", "0", *_FEW, "--quiet"]
    _went_well(_run("compress", *options))
    report = ed.Report.load("out/report.json")
    assert report.budget == "bytes 0.7"
    assert (report.repaired, report.truth) == (None, None)
    assert report.recalibrated is not None
    _went_well(_run("compress", *options, "--no-recalibrate"))
    assert ed.Report.load("out/report.json").recalibrated is None


def test_compress_to_a_loss() -> None:
    report = _only_document(_run("compress", "--loss", "0.05", *_FEW, "--json"))
    assert report["budget"] == "loss 0.05"
    assert report["macs"][1] < report["macs"][0]
    assert report["truth"]["after_repair"] <= 0.05


def test_compress_in_shots_of_some_actions_by_multiples() -> None:
    options = ["--macs", "0.5", "--shots", "2", "--multiple", "4", *_FEW]
    options += ["--floor", "0=1", "--ignore", "nothing*"]
    done = _run("compress", *options)
    assert isinstance(done.exception, ed.EigenDamageError)  # the pattern matches nothing
    assert "nothing*" in str(done.exception)
    _went_well(_run("compress", *options[:-2], "--quiet"))
    plan = ed.Plan.load("out/plan.json")
    assert "0" not in plan.changed
    for name in plan.changed:
        action = plan.layers[name].action
        assert isinstance(action, ed.LowRank)
        assert action.rank % 4 == 0


@pytest.mark.parametrize("command", ["compress", "sweep"])
@pytest.mark.parametrize("text", ["half", "conv1=lots", "=0.5", "conv1=1.5", "conv1="])
def test_a_floor_of_another_form_is_refused_at_once(command: str, text: str) -> None:
    done = _run(command, "--floor", text, *(["--macs", "0.5"] if command == "compress" else []))
    assert done.exit_code == 2
    assert "PATTERN=FRACTION" in " ".join(done.output.replace("│", " ").split())
    assert not Path("out").exists()


def test_sweep_writes_json_and_plots_and_shows_a_table() -> None:
    done = _went_well(_run("sweep", "--budgets", "0.8,0.5,0.001", "--measure", "0.5"))
    found = ed.Sweep.load("out/sweep.json")
    assert [row.budget for row in found.rows] == ["macs 0.8", "macs 0.5", "macs 0.001"]
    assert [row.measured is not None for row in found.rows] == [False, True, False]
    assert found.rows[2].error is not None
    assert (found.measured_on, found.measured_examples) == ("eval_data", 8)
    assert sorted(p.name for p in Path("out").iterdir()) == ["sweep.json", "sweep.png", "sweep.svg"]
    assert _mentions(done.output, ["macs 0.8: priced at", "macs 0.001: cannot be met", "Written"])


def _mentions(output: str, words: Sequence[str]) -> bool:
    text = " ".join(output.split())
    return all(word in text for word in words)


def test_sweep_as_json_prints_one_document() -> None:
    options = ["--budgets", "0.7", "--unit", "params", "--measure", "all", *_FEW]
    document = _only_document(_run("sweep", *options, "--no-repair", "--json"))
    assert document == json.loads(Path("out/sweep.json").read_text())
    [row] = document["rows"]
    assert row["budget"] == "params 0.7"
    assert row["parameters"] <= 0.7
    assert row["measured"]["divergence"] >= 0


def test_a_sweep_of_which_nothing_can_be_met_fails_but_is_kept() -> None:
    options = ["--budgets", "0.5", "--floor", "*=1", *_FEW]
    done = _run("sweep", *options, "--quiet")
    assert isinstance(done.exception, ed.NothingToCompressError)
    [row] = ed.Sweep.load("out/sweep.json").rows
    assert row.error is not None
    assert not Path("out/sweep.png").exists()


def test_a_sweep_into_a_folder_in_which_a_run_is_at_work_is_refused() -> None:
    with alone_in(Path("out")):
        done = _run("sweep", "--budgets", "0.7", *_FEW)
        assert isinstance(done.exception, ed.FileError)
        assert "another run is at work in out" in str(done.exception)
        assert list(Path("out").iterdir()) == []


def test_sweep_refuses_what_it_does_not_know() -> None:
    done = _run("sweep", "--measure", "0.33")
    assert isinstance(done.exception, ed.EigenDamageError)
    assert "macs 0.33 is not in the sweep" in str(done.exception)
    done = _run("sweep", "--actions", "magic")
    assert done.exit_code == 2
    assert "action 'magic' is unknown" in done.output
    assert not Path("out").exists()


def test_sweep_refuses_a_list_that_is_none() -> None:
    outside = _run("sweep", "--budgets", "1.5")
    assert outside.exit_code == 2
    assert "macs is 1.5" in outside.output
    for options in (["--budgets", "half"], ["--measure", "some"], ["--budgets", ","]):
        done = _run("sweep", *options)
        assert done.exit_code == 2
        assert "is not a list of numbers" in " ".join(done.output.replace("│", " ").split())
