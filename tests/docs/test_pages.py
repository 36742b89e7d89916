"""Every block of every page runs, or is held against what it is about."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import nn

import eigendamage as ed
from eigendamage.zoo import ImageSet
from tests.docs import commands, signatures
from tests.docs.models import residual
from tests.docs.reading import PAGES, ROOT, Block, PageError, Unit, read, units

IMAGES = 60
UNITS = units()


def named(chosen: list[Unit]) -> list[object]:
    return [pytest.param(unit, id=unit.name) for unit in chosen]


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled network, narrow and untrained, with few images: pages take seconds."""
    images = {split: ed.zoo.fashion_mnist(split) for split in ("train", "test")}

    def demo_network(pretrained: bool = True) -> nn.Module:
        return residual((8, 12, 16))

    def fashion_mnist(split: str) -> ImageSet:
        return images[split].take(slice(IMAGES))

    monkeypatch.setattr(ed.zoo, "demo_network", demo_network)
    monkeypatch.setattr(ed.zoo, "fashion_mnist", fashion_mnist)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to write to; environment and process group are put back."""
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(block: Block, page: str, names: dict[str, object]) -> None:
    code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
    exec(compile(code, page, "exec"), names)


@pytest.mark.pages
@pytest.mark.usefixtures("small_zoo", "surroundings")
@pytest.mark.filterwarnings("ignore:fine-tuning made the model worse")  # on a few images
@pytest.mark.parametrize("unit", named([each for each in UNITS if each.python]))
def test_python_runs(unit: Unit):
    for package in unit.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    names: dict[str, object] = {"__name__": "page"}
    for block in unit.python:
        if not block.not_run:
            run(block, unit.page, names)
    # What a reader is left with is what the page is about: smaller networks that compute numbers.
    for name, value in names.items():
        if isinstance(value, ed.Compressed):
            before, after = value.report.parameters
            assert after <= before, name
            assert math.isfinite(value.report.final.loss or 0.0), name
        model = value.model if isinstance(value, ed.Compressed) else value
        if isinstance(model, nn.Module):
            assert all(bool(t.isfinite().all()) for t in model.state_dict().values()), name


@pytest.mark.parametrize("unit", named([each for each in UNITS if each.python]))
def test_python_names_what_exists_and_calls_it_as_it_is(unit: Unit):
    names: dict[str, object] = {}
    found: list[str] = []
    for block in unit.python:
        tree = ast.parse("\n" * (block.line - 1) + block.code, unit.page)
        try:
            names |= signatures.names_in(tree)
        except ImportError as error:
            if error.name in unit.needs:
                continue
            raise
        found += signatures.mistakes(tree, names)
    assert not found


def math_hook() -> ModuleType:
    """What draws formulas when the pages are built."""
    spec = importlib.util.spec_from_file_location("math_hook", ROOT / "scripts" / "mkdocs_math.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("unit", named([each for each in UNITS if each.blocks]))
def test_every_other_block_is_checked(unit: Unit):
    for block in unit.blocks:
        match block.language:
            case "python" | "setup":
                pass  # above
            case "" | "text":
                pass  # formulas, trees of folders
            case "sh" | "bash":
                for words in commands.commands(block.code):
                    commands.check(words)
            case "json":
                json.loads(block.code)
            case "math":
                pytest.importorskip("latex2mathml", reason="the extra docs is not installed")
                assert math_hook().mathml(block.code).startswith("<math")
            case other:
                raise PageError(f"{unit.page}:{block.line}: no rule covers a block of {other!r}")


def test_a_formula_that_would_not_be_drawn_is_refused():
    pytest.importorskip("latex2mathml", reason="the extra docs is not installed")
    for latex in (r"\nosuchcommand x", r"a & b"):
        with pytest.raises(ValueError, match="no rule draws"):
            math_hook().mathml(latex)


def test_all_pages_are_read():
    assert {unit.page for unit in UNITS} >= {"README.md", "docs/tutorial.md", "docs/index.md"}
    assert len(PAGES) == len({unit.page for unit in UNITS})


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1",
        "<!-- test: setup\nx = 1",
        "<!-- test: skip -->",
        "<!-- test: not run, x -->",
    ],
)
def test_what_no_rule_reads_is_refused(text: str):
    with pytest.raises(PageError):
        read(text, "page.md")


def test_units_are_the_page_or_its_sections():
    text = "<!-- test: needs a, b -->\n```python\nx = 1\n```\n## two\n```sh\nmake test\n```\n"
    (whole,) = read(text, "page.md")
    assert whole.needs == ["a", "b"]
    assert [(block.language, block.code, block.line) for block in whole.blocks] == [
        ("python", "x = 1", 3),
        ("sh", "make test", 7),
    ]
    first, second = read("<!-- test: sections -->\n" + text, "page.md")
    assert (first.title, second.title) == ("", "two")
    assert [block.language for block in second.blocks] == ["sh"]


def test_a_block_that_is_not_run_says_why():
    text = "<!-- test: not run, two machines -->\n```python\nx\n```\n```python\ny\n```\n"
    (unit,) = read(text, "page.md")
    assert [block.not_run for block in unit.blocks] == ["two machines", ""]


@pytest.mark.parametrize(
    "code",
    [
        "ed.compres(model)",
        "ed.compress(model, data, buget=None)",
        "ed.zoo.fashion_mnist('train', 'test')",
        "ed.Plan.lod('plan.json')",
    ],
)
def test_a_wrong_name_or_keyword_is_found(code: str):
    assert signatures.mistakes(ast.parse(code), {"ed": ed})


def test_right_calls_and_names_of_others_are_let_pass():
    code = "ed.compress(model, data, budget=ed.Budget(macs=0.5)); model.compres(); len([], 1)"
    assert not signatures.mistakes(ast.parse(code), {"ed": ed})


@pytest.mark.parametrize(
    "command",
    [
        "eigendamage compress --model zoo:resnet20 --data d.zip --out o --macs 0.5 --maks 1",
        "eigendamage compress --macs half …",
        "eigendamage compresss",
        "make tests",
        "python benchmarks/none.py",
        "pip install 'eigendamage[none]'",
        "rm -rf /",
    ],
)
def test_a_command_that_would_be_refused_is_found(command: str):
    (words,) = commands.commands(command)
    with pytest.raises(commands.CommandError):
        commands.check(words)
