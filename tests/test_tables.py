"""The pages say what was measured, name what exists, and their first example runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import eigendamage as ed
from eigendamage.report import Environment, Measured, Row, Settings

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "benchmarks" / "tables.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TABLES), "--check", "--root", str(root)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_growth_s_peak_of_memory_leaves_out_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    growth = importlib.import_module("growth")
    bytearray(400_000_000)  # an earlier peak, gone again
    size, peak = growth.peak_above_start(lambda: len(bytearray(100_000_000)))
    assert 0.9 * size < peak < 1.5 * size


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def tables_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", TABLES)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TABLES.parent)
        spec.loader.exec_module(tables)
    return tables


def comparison(*, epochs: int = 1) -> dict[str, Any]:
    """A made-up comparison, in the form in which it is written."""

    def row(method: str, budget: float, loss: float, *, masks: bool = False) -> Row:
        measured = Measured(loss=loss, accuracy=1 - loss, divergence=0.0)
        cut = Measured(loss=loss + 1, accuracy=0.1, divergence=1.0)
        return Row(
            method=method,
            budget=budget,
            macs=1.0 if masks else budget,
            parameters=budget,
            predicted=None if method == "random" else 0.25,
            surgery=cut,
            recalibrated=cut if epochs else measured,
            tuned=measured if epochs else None,
            masks=masks,
        )

    document = ed.Comparison(
        command="eigendamage compare",
        settings=Settings(
            model="Network",
            weights="0",
            data="1",
            unit="macs",
            max_examples=300,
            train_batches=4,
            train_data="2",
            epochs=epochs,
            learning_rate=0.02,
            measured_on="held-out images",
            eval_data="3",
            fisher="mc",
            seed=3,
        ),
        original=Measured(loss=0.1, accuracy=0.9),
        measured_examples=400,
        rows=(
            row("random", 0.5, 0.9),
            row("obd", 0.5, 0.11, masks=True),
            row("kron-obs", 0.5, 0.3),
            Row(method="slimming", budget=0.5, refused="there is no batch norm"),
            row("eigendamage@3", 0.5, 0.2),
            row("kron-obs", 0.8, 0.2),
        ),
        environment=Environment.here(torch.device("cpu"), 3),
    )
    return json.loads(document.model_dump_json())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages and the results, to spoil."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    results = ROOT / "benchmarks" / "results"
    if results.exists():
        shutil.copytree(results, tmp_path / "benchmarks" / "results")
    return tmp_path


def test_pages_and_picture_show_what_the_results_say():
    found = check(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_check_notices_a_number_typed_by_hand(copy: Path):
    page = copy / "README.md"
    opening = "<!-- table:demo -->\n"
    text = page.read_text(encoding="utf-8")
    assert opening in text
    page.write_text(text.replace(opening, opening + "| 99.9 % |\n"), encoding="utf-8")
    found = check(copy)
    assert found.returncode == 1
    assert "README.md" in found.stdout


@pytest.mark.parametrize(
    "spoiled", ["<!-- table:no-such-table -->\n<!-- /table -->", "<!-- table:"]
)
def test_a_table_that_is_unknown_or_not_closed_is_refused(copy: Path, spoiled: str):
    page = copy / "docs" / "index.md"
    page.write_text(page.read_text(encoding="utf-8") + spoiled, encoding="utf-8")
    found = check(copy)
    assert found.returncode == 1
    assert "index.md" in found.stderr


def test_every_table_has_a_place():
    tables = tables_module()
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in (*tables.TABLES, *tables.PICTURES):
        assert f"<!-- table:{name} -->" in text


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_comparison_is_ranked_by_the_loss_at_the_end(epochs: int):
    text = tables_module().method_tables.compare(comparison(epochs=epochs))
    mild, hard = text.split("**At most 50.0 % of the MACs**")
    assert "At most 80.0 %" in mild
    rows = [line.strip("| ").split(" | ") for line in hard.splitlines() if line.startswith("|")]
    header, _, base, *methods = rows
    assert [row[0] for row in methods] == [
        "`eigendamage@3`",
        "`kron-obs`",
        "`random`",
        "`obd` †",
        "`slimming`",
    ]
    assert {len(row) for row in rows} == {8 + 2 * epochs}
    assert header[-1] == "loss"
    assert base[:6] == ["as it is", "100.0 %", "100.0 %", "–", "90.0 %", "0.1"]
    of = {row[0]: row for row in methods}
    assert of["`kron-obs`"][1:6] == ["50.0 %", "50.0 %", "0.25", "10.0 %", "1.3"]
    assert of["`kron-obs`"][-2:] == ["70.0 %", "0.3"]
    assert of["`random`"][3] == "–"
    assert of["`obd` †"][1] == "100.0 %"
    assert of["`slimming`"][1] == "refused"


def test_a_comparison_says_what_it_was_made_with_and_what_masks_and_refusals_mean():
    results = comparison()
    text = tables_module().method_tables.compare(results)
    for said in (
        "† Masks leave",
        "nothing is saved",
        "`slimming` was refused at 50.0 %: there is no batch norm.",
        "`eigendamage compare`. A single run, with seed 3.",
        "400 examples, held-out images",
        "standard error of 1.5 points",  # √(0.9 · 0.1 / 400)
        "at most 300 examples",
        "1 epoch of 4 batches",
        results["environment"]["platform"],
    ):
        assert said in text
    results["rows"] = [row for row in results["rows"] if row["method"] == "kron-obs"]
    plain = tables_module().method_tables.compare(results)
    assert "†" not in plain
    assert "refused" not in plain


def demonstration() -> dict[str, Any]:
    """A made-up demo at one budget, in the form in which it is written."""

    def report(divergences: tuple[float, float | None], *, repaired: bool) -> dict[str, Any]:
        cut, mended = ({"accuracy": 1 - d, "loss": 0.2 + d, "divergence": d} for d in divergences)
        return {
            "macs": [200.0, 100.0],
            "parameters": [10, 3],
            "examples": 90,
            "measured_examples": 400,
            "predicted": 0.02,
            "original": {"accuracy": 0.9, "loss": 0.2, "divergence": None},
            "compressed": cut,
            "repaired": mended if repaired else None,
            "recalibrated": None if repaired else mended,
            "truth": {"examples": 10, "calibrated": 0.04} if repaired else None,
            "environment": Environment.here(torch.device("cpu"), 3).model_dump(),
        }

    return {
        "command": "eigendamage demo",
        "seed": 3,
        "budgets": [
            {
                "auto": {"report": report((0.2, 0.1), repaired=True)},
                "eigendamage": {"report": report((0.5, 0.3), repaired=False)},
            }
        ],
    }


def cells(text: str) -> list[list[str]]:
    """The rows of a Markdown table below its header."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_demo_shows_both_methods_and_what_the_paper_has_in_place_of_a_repair():
    text = tables_module().demo_tables.demo(demonstration())
    base, auto, paper = cells(text)
    assert base[:4] == ["100.0 %", "as it is", "100.0 %", "90.0 %"]
    assert auto == ["50.0 %", "`auto`", "30.0 %", "80.0 %", "90.0 %", "0.1", "0.1"]
    assert paper == ["50.0 %", "paper", "30.0 %", "50.0 %", "70.0 % *", "0.3", "0.3"]
    assert "has no repair" in text
    assert "90 for the curvature, which all share, and 10 held out of it (about a tenth" in text


def test_a_prediction_of_the_demo_is_held_against_the_network_it_stands_for():
    tables = tables_module()
    auto, paper = cells(tables.demo_tables.demo_loss(demonstration()))
    assert auto[2:7] == ["0.02", "0.04", "0.2", "0.1", "2.5 ×"]  # repaired to calibrated
    assert paper[2:7] == ["0.02", "–", "0.5", "–", "25.0 ×"]  # right after to priced
    drawn = tables.PICTURES["demo-picture"].points(demonstration())
    assert drawn["`auto` measured"] == [0.1]
    assert drawn["paper measured"] == [0.5]


def test_a_table_without_its_result_says_so(copy: Path):
    file = copy / "benchmarks" / "results" / "compare.json"
    file.unlink(missing_ok=True)
    assert (
        subprocess.run([sys.executable, str(TABLES), "--root", str(copy)], check=False).returncode
        == 0
    )
    page = copy / "docs" / "benchmarks.md"
    assert "<!-- table:compare -->\n\n*Not measured yet.*" in page.read_text(encoding="utf-8")
    file.write_text(json.dumps(comparison()), encoding="utf-8")
    assert check(copy).returncode == 1
    subprocess.run([sys.executable, str(TABLES), "--root", str(copy)], check=True)
    table = page.read_text(encoding="utf-8").partition("<!-- table:compare -->")[2]
    assert "`eigendamage@3`" in table.partition("<!-- /table -->")[0]
    assert check(copy).returncode == 0


@pytest.mark.slow
def test_the_first_example_of_the_readme_does_what_it_says_of_the_real_network(
    capsys: pytest.CaptureFixture[str],
):
    """All examples run in tests/docs, with a narrow network that was never trained."""
    first, *_ = python_blocks(ROOT / "README.md")
    for many, few in (("[:500]", "[:200]"), ("split(100)", "split(40)"), ("(500)", "(200)")):
        assert many in first
        first = first.replace(many, few)  # as many batches, of fewer images
    names: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), names)
    small = names["small"]
    assert isinstance(small, ed.Compressed)
    before, after = small.report.macs
    assert after <= 0.5 * before
    assert small.report.final.accuracy is not None
    assert small.report.final.accuracy > 0.7
    assert "rise of loss" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_pages_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\bed\.([A-Za-z_][\w.]*\w)", text)):
        found: object = ed
        for part in dotted.split("."):
            assert hasattr(found, part), f"{page.name} names ed.{dotted}"
            found = getattr(found, part)


def test_every_dependency_has_a_line_that_says_what_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[\[<>=! ]", requirement)[0] for requirement in wanted}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| ([a-z][\w-]*) \|", page, re.MULTILINE)) - {"package", "type"}
    assert listed == names - {"eigendamage"}
