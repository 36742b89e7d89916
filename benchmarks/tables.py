"""Rewrite the tables in README.md and docs/ from benchmarks/results, and draw the pictures.

Run ``python benchmarks/tables.py`` after a benchmark has written its result. A table stands between
``<!-- table:NAME -->`` and ``<!-- /table -->``. With ``--check`` nothing is written, and the exit
code is 1 if a page or a picture is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cost_tables
import demo_tables
import hard_tables
import latency_tables
import method_tables
import model_tables
import peers_tables
from cells import Results
from pictures import MISSING, PICTURES, load

ROOT = Path(__file__).resolve().parents[1]
_OPENING = "<!-- table:"
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Render = Callable[[Results], str]
TABLES: dict[str, tuple[str, Render]] = {
    "demo": ("demo.json", demo_tables.demo),
    "demo-loss": ("demo.json", demo_tables.demo_loss),
    "demo-layers": ("demo.json", demo_tables.demo_layers),
    "calibration": ("demo.json", demo_tables.calibration),
    "resnet20-cifar10": ("resnet20_cifar10.json", method_tables.resnet20_cifar10),
    "auto-cifar10": ("auto_cifar10.json", method_tables.auto_cifar10),
    "training-cifar10": ("training_cifar10.json", method_tables.training_cifar10),
    "compare": ("compare.json", method_tables.compare),
    "peers-short": ("peers.json", peers_tables.short),
    "peers-untrained": ("peers.json", partial(peers_tables.render, epochs=0)),
    "peers-trained": ("peers.json", partial(peers_tables.render, epochs=2)),
    "learning-rates": ("learning_rates.json", peers_tables.learning_rates),
    "headline": ("wide_resnet32.json", peers_tables.headline),
    "latency-peers": ("latency_peers.json", latency_tables.render),
    "latency-budgets": ("latency_budgets.json", cost_tables.latency_budgets),
    "curvature-cost": ("curvature_cost.json", cost_tables.curvature_cost),
    "curvature-memory": ("curvature_memory.json", cost_tables.curvature_memory),
    "score-cost": ("score_cost.json", cost_tables.score_cost),
    "planning": ("planning.json", cost_tables.planning),
    "growth": ("growth.json", cost_tables.growth),
    "simulated": ("growth.json", cost_tables.simulated),
    "sentence-encoder": ("sentence_encoder.json", cost_tables.sentence_encoder),
    "language-models": ("language_models.json", model_tables.language_models),
    "coverage": ("coverage.json", model_tables.coverage),
    "soak": ("soak.json", hard_tables.soak),
    "killed": ("killed.json", hard_tables.killed),
}
"""The result file and the renderer of each table."""


def filled(page: Path, root: Path) -> str:
    """A page with every marked table as the results say."""

    def fill(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name in PICTURES:
            body = PICTURES[name].link(page, root)
        elif name in TABLES:
            file, render = TABLES[name]
            results = load(root, file)
            body = MISSING if results is None else render(results)
        else:
            known = ", ".join((*TABLES, *PICTURES))
            raise SystemExit(f"{page}: there is no table '{name}'; known are {known}")
        return f"{opening}\n{body}\n\n{closing}"

    text = page.read_text(encoding="utf-8")
    if text.count(_OPENING) != len(_MARKED.findall(text)):
        raise SystemExit(f"{page}: a table is opened and not closed by <!-- /table -->")
    return _MARKED.sub(fill, text)


def pages(root: Path) -> Iterator[Path]:
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def stale(root: Path) -> list[Path]:
    """The pages, and the pictures, that are not what the results say."""
    found = [page for page in pages(root) if filled(page, root) != page.read_text(encoding="utf-8")]
    return found + [root / p.path for p in PICTURES.values() if p.is_stale(root)]


def rewrite(root: Path) -> None:
    for page in pages(root):
        page.write_text(filled(page, root), encoding="utf-8")
    for picture in PICTURES.values():
        picture.rewrite(root)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to work on")
    options = parser.parse_args(arguments)
    found = stale(options.root)
    for path in found:
        state = "does not show" if options.check else "now shows"
        print(f"{path.relative_to(options.root)} {state} what benchmarks/results say")
    if not options.check:
        rewrite(options.root)
        return 0
    if found:
        print("run: python benchmarks/tables.py", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
