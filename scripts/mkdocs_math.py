"""A hook of mkdocs: blocks of ``math``, in LaTeX, become MathML, which browsers draw by themselves.

No script and no font is fetched or bundled. On GitHub the same blocks are drawn as they are.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def mathml(latex: str) -> str:
    """One displayed formula.

    Raises:
        ValueError: if it has a command that is not known.
    """
    known = latex.strip().replace("{aligned}", "{align*}")  # alike, but the converter's own name
    found = convert(known, display="block")
    if unknown := re.search(r"\\[A-Za-z]+|>&(?:amp;|#x00026;)?<", found):
        raise ValueError(f"no rule draws {unknown[0]} of the formula {latex.strip()!r}")
    return found


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the blocks of a page; mkdocs calls this."""
    return _BLOCK.sub(lambda block: f'<div class="formula">{mathml(block[1])}</div>', markdown)
