"""The pages say what was measured, name what exists, and their first example runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import eigendamage as ed

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


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


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
    spec = importlib.util.spec_from_file_location("tables", TABLES)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in (*tables.TABLES, "demo-picture"):
        assert f"<!-- table:{name} -->" in text


def test_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    first, *others = python_blocks(ROOT / "README.md")
    names: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), names)
    small = names["small"]
    assert isinstance(small, ed.Compressed)
    before, after = small.report.macs
    assert after <= 0.5 * before
    assert small.report.final.accuracy is not None
    assert small.report.final.accuracy > 0.7
    assert "rise of loss" in capsys.readouterr().out
    # What follows goes on with the same names; the curvature is the one at hand.
    names["curvature"] = small.curvature
    for block in others:
        lines = [line for line in block.splitlines() if "estimate_curvature" not in line]
        exec(compile("\n".join(lines), "README.md", "exec"), names)
    plan = ed.Plan.load("plan.json")
    assert plan.macs[1] <= 0.35 * plan.macs[0]
    assert list(ed.load_curvature("curvature.safetensors")) == list(plan.layers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_pages_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for block in python_blocks(page):
        compile(block, page.name, "exec")
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
