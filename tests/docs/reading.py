"""Markdown pages as what a test can run: blocks of code, and the comments that say how.

A page is read from top to bottom. Its Python blocks run in order, in one namespace. Comments that a
reader does not see say what he is told in words, or has of his own:

    <!-- test: setup          Python that runs here, such as `model = …`
    model = …
    -->
    <!-- test: sections -->           every ## section is a unit of its own, with its own namespace
    <!-- test: needs timm, onnx -->   the unit is skipped where one of these is missing
    <!-- test: not run, REASON -->    the next block is only compiled and held against signatures
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(r"^( *)```(\S*)\s*$")
_OPENING = re.compile(r"^ *<!-- test: (.*)$")


class PageError(Exception):
    """A page says something that no rule covers."""


@dataclass(frozen=True)
class Block:
    """A fenced block, or Python that is hidden in a comment (``language`` is then ``setup``)."""

    language: str
    code: str
    line: int  # of its first line of code, from 1
    not_run: str = ""  # the reason, if there is one


@dataclass
class Unit:
    """Blocks that share a namespace: a page, or a section of it."""

    page: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.page}: {self.title}" if self.title else self.page

    @property
    def python(self) -> list[Block]:
        return [block for block in self.blocks if block.language in ("python", "setup")]


def read(text: str, page: str) -> list[Unit]:
    """The units of a page.

    Raises:
        PageError: if a comment or a block is not closed, or a comment is of no known form.
    """
    lines = text.splitlines()
    units = [Unit(page, "")]
    by_section, reason, at = False, "", 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if fence := _FENCE.match(line):
            indent, language = fence.groups()
            end = _closing(lines, at, lambda text: text.strip() == "```", page)
            code = "\n".join(text.removeprefix(indent) for text in lines[at:end])
            units[-1].blocks.append(Block(language, code, at + 1, reason))
            reason, at = "", end + 1
        elif comment := _OPENING.match(line):
            said = comment[1]
            if said == "setup":
                end = _closing(lines, at, lambda text: text.strip() == "-->", page)
                units[-1].blocks.append(Block("setup", dedent("\n".join(lines[at:end])), at + 1))
                at = end + 1
            elif said == "sections -->":
                by_section = True
            elif needs := re.fullmatch(r"needs (.+) -->", said):
                units[-1].needs += [name.strip() for name in needs[1].split(",")]
            elif why := re.fullmatch(r"not run, (.+) -->", said):
                reason = why[1]
            else:
                raise PageError(f"{page}:{at}: no rule reads the comment {line.strip()!r}")
        elif by_section and line.startswith("## "):
            units.append(Unit(page, line.removeprefix("## ")))
    if reason:
        raise PageError(f"{page}: a comment 'not run' has no block after it")
    return units


def units() -> list[Unit]:
    """The units of all pages."""
    return [
        unit
        for page in PAGES
        for unit in read(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    ]


def _closing(lines: list[str], start: int, closes: object, page: str) -> int:
    assert callable(closes)
    for index in range(start, len(lines)):
        if closes(lines[index]):
            return index
    raise PageError(f"{page}:{start}: what begins here is not closed")
