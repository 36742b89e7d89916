"""Shell blocks, command by command: options of ours are parsed, files of others exist."""

from __future__ import annotations

import re
import shlex
import tomllib

import typer

from eigendamage.cli import app
from tests.docs.reading import ROOT

UsageError = typer.BadParameter.__base__  # of click, or of the copy of it that typer may bring
_DUMMIES = {"--model": "zoo:resnet20", "--data": "images.npz", "--out": "small"}


class CommandError(Exception):
    """A command that no rule covers, or that the program would refuse."""


def commands(code: str) -> list[list[str]]:
    """The commands of a block, as words; continued lines are joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", code)
    found = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in found if words]


def check(words: list[str]) -> None:
    """Hold one command against what there is.

    Raises:
        CommandError: if it would be refused, or is of no known kind.
    """
    match words:
        case ["eigendamage", *rest]:
            _ours(rest)
        case ["torchrun", *rest] if "eigendamage" in rest:
            _ours(rest[rest.index("eigendamage") + 1 :])
        case ["python", "-m", "eigendamage", *rest]:
            _ours(rest)
        case ["make", target]:
            _require(f"\n{target}:" in (ROOT / "Makefile").read_text(), f"no target {target}")
        case ["python" | "torchrun", *rest]:
            script = next((each for each in rest if each.endswith(".py")), "")
            own = not script.startswith(("benchmarks/", "examples/", "scripts/"))
            _require(bool(script) and (own or (ROOT / script).is_file()), f"no script {script}")
        case ["pip", "install", *rest]:
            for extra in re.findall(r"eigendamage\[([\w,]+)\]", " ".join(rest)):
                for name in extra.split(","):
                    _require(name in _extras(), f"no extra {name}")
        case [name, *rest] if "=" in name:  # a variable of the environment
            check(rest)
        case ["cd" | "git", *_]:
            pass
        case _:
            raise CommandError(f"no rule covers the command {shlex.join(words)!r}")


def _ours(words: list[str]) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    if words[0].startswith("--"):
        known = {option for each in group.params for option in each.opts}
        _require(words[0] in known, f"no option {words[0]}")
        return
    name, *rest = words
    _require(name in group.commands, f"no command eigendamage {name}")
    command = group.commands[name]
    if "…" in rest:  # the reader's own model and data
        rest.remove("…")
        rest += [
            word
            for each in command.params
            for word in (each.opts[0], _DUMMIES.get(each.opts[0], ""))
            if each.opts[0] in _DUMMIES and each.opts[0] not in rest
        ]
    if rest == ["--help"]:
        return
    try:
        command.make_context(f"eigendamage {name}", rest)
    except UsageError as error:
        raise CommandError(f"eigendamage {shlex.join(words)}: {error}") from error


def _extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CommandError(otherwise)
