"""How commands end: exit codes, errors as JSON, plain lines, and what a shell offers."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage import cli, progress
from eigendamage.cli._exits import EPILOG, Exit, exit_of
from eigendamage.cli._sources import load_data

runner = CliRunner()
_GIVEN = ("--model", "m", "--data", "d", "--out", "o")
_EXPORT = ("--model", "m", "--out", "o")


def _main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """The program in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["eigendamage", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ed.BudgetError("x"), Exit.BUDGET),
        (ed.NothingToCompressError("x"), Exit.BUDGET),
        (ed.DataError("x"), Exit.INPUT),
        (ed.ShapeError("conv1", "x"), Exit.INPUT),
        (ed.EigenDamageError("x"), Exit.INPUT),
        (FileNotFoundError("x"), Exit.INPUT),
        (ed.ExtraError("x"), Exit.SURROUNDINGS),
        (ed.ProcessError("x"), Exit.SURROUNDINGS),
        (typer.BadParameter("x"), Exit.USAGE),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
        (KeyError("x"), Exit.BUG),
    ],
)
def test_an_error_s_class_gives_its_exit_code(error: BaseException, code: Exit) -> None:
    assert exit_of(error) is code


def test_every_exit_code_is_in_the_help_and_in_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for code in Exit:
        assert f"{int(code)} " in EPILOG
        assert f"| {int(code)} |" in page


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "words"),
    [
        (["compress"], 2, "MissingParameter", "--model"),
        (["compress", "--size", "1"], 2, "NoSuchOption", "--size"),
        (["compress", *_GIVEN, "--macs", "2"], 2, "BadParameter", "macs is 2"),
        (["compress", *_GIVEN, "--method", "nomethod"], 2, "BadParameter", "nomethod"),
        (["compress", *_GIVEN, "--variant", "novariant"], 2, "BadParameter", "novariant"),
        (["compress", *_GIVEN, "--actions", "noaction"], 2, "BadParameter", "noaction"),
        (
            ["compress", *_GIVEN, "--macs", "0.5", "--multiple", "0"],
            2,
            "BadParameter",
            "--multiple",
        ),
        (["compress", *_GIVEN, "--macs", "0.5", "--polish", "-1"], 2, "BadParameter", "--polish"),
        (
            ["compress", *_GIVEN, "--macs", "0.5", "--shots", "2", "--rounds", "2"],
            *(2, "BadParameter", "--shots / --rounds / --epochs: give"),
        ),
        (
            ["compress", *_GIVEN, "--loss", "0.1", "--shots", "2"],
            *(2, "BadParameter", "--shots / --rounds / --epochs: a budget"),
        ),
        (
            ["compress", *_GIVEN, "--macs", "0.5", "--max-memory", "lots"],
            *(2, "BadParameter", "--max-memory: max_memory is 'lots'"),
        ),
        (
            ["compress", *_GIVEN, "--macs", "0.5", "--max-ratio", "1"],
            *(2, "BadParameter", "--max-ratio: max_ratio is 1.0"),
        ),
        (
            ["compress", *_GIVEN, "--macs", "0.5", "--learning-rate", "0"],
            *(2, "BadParameter", "--learning-rate"),
        ),
        (["compress", *_GIVEN, "--examples", "0"], 2, "BadParameter", "--examples"),
        *(
            ([*command, "--seed", seed], 2, "BadParameter", f"--seed: seed is {seed}")
            for command in (
                ["compress", *_GIVEN, "--macs", "0.5"],
                ["sweep", *_GIVEN],
                ["compare", *_GIVEN],
                ["export", "f", *_EXPORT, "--shape", "3"],
                ["demo"],
            )
            for seed in ("99999999999999999999", str(-(2**63) - 1))
        ),
        (["sweep", *_GIVEN, "--multiple", "0"], 2, "BadParameter", "--multiple"),
        (["sweep", *_GIVEN, "--unit", "ratio"], 2, "BadParameter", "--unit"),
        (["sweep", *_GIVEN, "--unit", "loss"], 2, "BadParameter", "--budgets: a sweep of losses"),
        (
            ["sweep", *_GIVEN, "--unit", "latency", "--budgets", "1.5"],
            *(2, "BadParameter", "--budgets: latency is 1.5"),
        ),
        (["compare", *_GIVEN, "--epochs", "-1"], 2, "BadParameter", "--epochs"),
        (["sweep", *_GIVEN, "--actions", "noaction"], 2, "BadParameter", "noaction"),
        (["compare", *_GIVEN, "--methods", "nomethod"], 2, "BadParameter", "nomethod"),
        (["compare", *_GIVEN, "--methods", ","], 2, "BadParameter", "names no method"),
        (["export", "f", *_EXPORT, "--format", "tflite"], 2, "BadParameter", "tflite"),
        (["export", "f", *_EXPORT, "--shape", "3x0"], 2, "BadParameter", "3x0"),
        (
            ["sweep", *["--model", "zoo:x", "--data", "d", "--out", "o"]],
            3,
            "EigenDamageError",
            "zoo has no",
        ),
    ],
)
def test_with_json_an_error_is_one_document_with_the_same_exit_code(
    arguments: list[str],
    code: int,
    kind: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = _main(monkeypatch, capsys, *arguments)
    found = _main(monkeypatch, capsys, *arguments, "--json")
    assert plain[0] == found[0] == code
    assert plain[1] == ""
    assert words in plain[2]
    told = json.loads(found[1])
    assert told.keys() == {"error", "kind", "exit_code"}
    assert (told["kind"], told["exit_code"]) == (kind, code)
    assert words in told["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (ZeroDivisionError, 1)])
def test_an_interruption_and_a_bug_have_codes_of_their_own(
    options: list[str],
    error: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("eigendamage.cli._sweep.load_model", fail)
    found, out, err = _main(monkeypatch, capsys, "sweep", *_GIVEN, *options)
    assert found == code
    assert ("Traceback" in err) == (code == 1)
    assert [json.loads(line)["kind"] for line in out.splitlines()] == [error.__name__] * len(
        options
    )


_FAULTY = """
import torch

def net():
    return torch.nn.Linear(3, "many")

def batches():
    yield torch.ones(2, 3)
    raise ValueError("the disk is full")

def pair():
    return [torch.ones(2, 3)], batches()

def silent():
    raise RuntimeError

def fine():
    return torch.nn.Sequential(torch.nn.Linear(3, 3))
"""


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            "faulty:net",
            "faulty:batches",
            r"faulty:net was called and raised TypeError: .*faulty\.py, line 5",
        ),
        (
            "faulty:fine",
            "faulty:batches",
            r"faulty:batches .* ValueError: the disk is full .*faulty",
        ),
        ("faulty:fine", "faulty:pair", r"faulty:pair was .* the disk is full .*line 9"),
        ("faulty:fine", "faulty:silent", r"faulty:silent was .* raised RuntimeError \(faulty\.py"),
        (
            "half:net",
            "faulty:pair",
            r"half:net: importing 'half' raised SyntaxError: invalid syntax \(half\.py, line 1\)$",
        ),
        ("none:net", "faulty:pair", r"none:net: .*no module 'none'"),
        ("leaving:net", "faulty:pair", r"importing 'leaving' raised SystemExit: 7"),
    ],
)
def test_what_a_callable_of_the_user_raises_is_his_own(
    model: str,
    data: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "faulty.py").write_text(_FAULTY)
    (tmp_path / "half.py").write_text("def net(:")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("faulty", "half", "leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    given = ("--model", model, "--data", data, "--out", "o", "--macs", "0.5")
    code, _, err = _main(monkeypatch, capsys, "compress", *given)
    assert code == Exit.INPUT
    assert re.search(words, err)
    assert "Traceback" not in err


def test_of_data_without_an_end_the_first_examples_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "endless.py").write_text(
        "import torch\n\ndef batches():\n    while True:\n        yield torch.zeros(20, 3, 4, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "endless", raising=False)
    found = load_data("endless:batches", examples=50, batch_size=8, seed=0, test_examples=None)
    assert [len(batch) for batch in found.data] == [20, 20, 20]


def test_progress_is_a_plain_line_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.track(range(3), "counting", total=3, enabled=True)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"counting: \d+\.\d s\n", err)


def test_progress_is_a_bar_with_the_time_left_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    mine, its = pty.openpty()
    with os.fdopen(its, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for _ in progress.track(range(3), "counting", total=3, enabled=True):
            time.sleep(0.2)
        pieces = b""
        while b"3/3" not in pieces and select.select([mine], [], [], 5.0)[0]:
            pieces += os.read(mine, 100_000)
    os.close(mine)
    drawn = pieces.decode(errors="replace")
    assert "3/3" in drawn
    assert re.search(r"0:00:00 0:00:0\d", drawn)  # elapsed, and left
    assert "\x1b[3" not in drawn  # a color


def test_a_count_is_gone_through_whole() -> None:
    assert list(progress.track(range(4), "", total=None, enabled=True)) == [0, 1, 2, 3]


def _offered(words: str) -> list[str]:
    done = runner.invoke(
        cli.app,
        [],
        prog_name="eigendamage",
        env={"_EIGENDAMAGE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words},
    )
    offered = done.output.replace("\\", "")
    return [word for word in ("zoo:resnet20", "timm:", "kron-obs", "auto") if word in offered]


def test_a_shell_offers_networks_and_methods() -> None:
    assert _offered("eigendamage compress --model zoo:res") == ["zoo:resnet20"]
    assert _offered("eigendamage sweep --model ti") == ["timm:"]
    assert _offered("eigendamage compress --method kron") == ["kron-obs"]
    shown = runner.invoke(
        cli.app, [], prog_name="eigendamage", env={"_EIGENDAMAGE_COMPLETE": "source_bash"}
    )
    assert "complete -o default -F _eigendamage_completion eigendamage" in shown.output
