"""The table and the picture of benchmarks/latency_peers.py, for tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from cells import Results, table

Rows = list[Mapping[str, Any]]
BATCHES = (1, 64)
DRAWN = "resnet20"
"""The network of the picture; the first that was measured if this one was not."""


def of_network(results: Results, network: str) -> Rows:
    return [row for row in results["rows"] if row["network"] == network]


def fastest(row: Mapping[str, Any], batch: int) -> float:
    """Milliseconds in the fastest of the ways of running."""
    spent: Mapping[str, float] = row["milliseconds"]
    return min(value for way, value in spent.items() if way.endswith(f", {batch}"))


def original(rows: Rows) -> Mapping[str, Any]:
    return next(row for row in rows if row["candidate"] == "original")


def render(results: Results) -> str:
    """Of every network: accuracy, and time relative to the original's in each way of running."""
    parts: list[str] = []
    for network in dict.fromkeys(row["network"] for row in results["rows"]):
        rows = of_network(results, network)
        first = original(rows)
        ways = list(first["milliseconds"])
        trained = [row for row in rows if "tuned" in row]
        made = sorted((r for r in rows if "refused" not in r), key=lambda row: -row["accuracy"])
        lines = [
            [
                row["candidate"],
                f"{100 * row['macs']:.0f} %",
                f"{100 * row['accuracy']:.1f} %",
                *([f"{100 * row['tuned']:.1f} %" if "tuned" in row else "–"] if trained else []),
                *(f"{fastest(row, batch) / fastest(first, batch):.2f}" for batch in BATCHES),
                *(f"{row['milliseconds'][way] / first['milliseconds'][way]:.2f}" for way in ways),
            ]
            for row in made
        ]
        refused = [row for row in rows if "refused" in row]
        after = [f"after {trained[0]['epochs']} epochs"] if trained else []
        best = [f"fastest way, {batch}" for batch in BATCHES]
        parts += [
            f"**{network}**",
            table(["candidate", "MACs left", "accuracy", *after, *best, *ways], lines),
            _original(first),
            *(
                f"Refused, {row['candidate']}: {row['refused'].partition(';')[0]}."
                for row in refused
            ),
        ]
    first = results["rows"][0]
    threads, cores = first["machine"]["threads"], first["machine"]["cores"]
    parts.append(
        f"Times as fractions of the original's, medians of {results['rounds']} rounds in which all "
        f"take turns{_spread(results)}; the number after the way is the batch; the fastest way of "
        f"each is held against the fastest way of the original. Accuracy is that without training, "
        f"and where a column says so after as many epochs as in the tables above. "
        f"`{results['command']}`, seed 0, {threads} threads of {cores} cores; torch "
        f"{first['versions']['torch']}, eigendamage {first['versions']['eigendamage']}."
    )
    return "\n\n".join(parts)


def _spread(results: Results) -> str:
    """How far the quartiles of a time lie apart, as a fraction of its median."""
    ratios = [
        spread / row["milliseconds"][way]
        for row in results["rows"]
        for way, spread in row.get("interquartile_milliseconds", {}).items()
    ]
    median, high = np.quantile(ratios, (0.5, 0.9))
    return (
        f" (half of the times have quartiles at most {100 * median:.0f} % of the median apart, "
        f"nine in ten at most {100 * high:.0f} %)"
    )


def _original(row: Mapping[str, Any]) -> str:
    said = ", ".join(f"{way}: {spent:.2g} ms" for way, spent in row["milliseconds"].items())
    return f"The original takes {said}."


def points(results: Results) -> dict[str, list[float]]:
    """By batch and kind of candidate: times in the fastest way, and accuracies."""
    networks = [row["network"] for row in results["rows"]]
    rows = of_network(results, DRAWN if DRAWN in networks else networks[0])
    first = original(rows)
    drawn: dict[str, list[float]] = {}
    for row in rows:
        for batch in BATCHES:
            if "refused" in row or row["candidate"] == "original":
                continue
            kind = _kind(row["candidate"], batch)
            if kind is not None:
                time = fastest(row, batch) / fastest(first, batch)
                drawn.setdefault(f"{batch} {kind} time", []).append(time)
                drawn.setdefault(f"{batch} {kind} accuracy", []).append(100 * row["accuracy"])
    return drawn


def _kind(candidate: str, batch: int) -> str | None:
    """What a candidate is called in the picture; None if it was made for the other batch."""
    if "latency" in candidate:
        return "auto, by latency" if candidate.endswith(f"at batch {batch}") else None
    return candidate.rpartition(", macs ")[0]


_OF_8 = {"marker": "s", "linestyle": (0, (4, 2))}
_STYLES: dict[str, dict[str, Any]] = {
    "auto": {"color": "#2b8a4f", "marker": "o"},
    "auto, multiples of 8": {"color": "#2b8a4f", **_OF_8},
    "auto, channels alone": {"color": "#2b8a4f", "marker": "^", "linestyle": (0, (1, 1))},
    "auto, by latency": {"color": "#7a4fb0", **_OF_8},
    "Torch-Pruning GroupTaylor, global": {"color": "#b5403a", "marker": "o"},
    "Torch-Pruning GroupTaylor, global, multiples of 8": {"color": "#b5403a", **_OF_8},
    "Torch-Pruning GroupTaylor, inner": {"color": "#2f6db3", "marker": "o"},
    "Torch-Pruning GroupTaylor, inner, multiples of 8": {"color": "#2f6db3", **_OF_8},
    "Tucker-2": {"color": "#808080", "marker": "v"},
}


def panels(left: Any, right: Any, drawn: Mapping[str, list[float]]) -> None:
    """Accuracy against time, one panel for each size of batch."""
    for axes, batch in ((left, 1), (right, 64)):
        axes.set_title(f"Batch {batch}")
        axes.set(xlabel="time, % of the original's, each in its fastest way", ylabel="accuracy, %")
        for kind, style in _STYLES.items():
            times = drawn.get(f"{batch} {kind} time", [])
            pairs = sorted(zip(times, drawn.get(f"{batch} {kind} accuracy", []), strict=True))
            if pairs:
                axes.plot([100 * t for t, _ in pairs], [a for _, a in pairs], label=kind, **style)
