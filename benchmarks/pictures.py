"""The pictures of docs/ that are drawn from benchmarks/results, for tables.py."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latency_tables
import peers_tables

MISSING = "*Not measured yet.*"
WAYS = {"auto": "`auto`", "eigendamage": "paper"}
"""The methods of the demo, and what they are called in its tables."""

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "svg.hashsalt": "eigendamage",
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
_SOLID, _DASHED = "-", (0, (4, 2))
_GREEN, _RED, _BLUE, _GREY = "#2b8a4f", "#b5403a", "#2f6db3", "#555555"

Points = dict[str, list[float]]


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        file: the results that it shows.
        path: where it lies, from the root.
        alt: what it shows, in words.
        points: what is drawn of the results.
        panels: draws them onto the axes of two panels.
    """

    file: str
    path: Path
    alt: str
    points: Callable[[Mapping[str, Any]], Points]
    panels: Callable[[Any, Any, Points], None]

    def link(self, page: Path, root: Path) -> str:
        """What stands in a page for it."""
        if load(root, self.file) is None:
            return MISSING
        return f"![{self.alt}]({(root / self.path).relative_to(page.parent).as_posix()})"

    def fingerprint(self, results: Mapping[str, Any]) -> str:
        """Stands in the picture, so that it can be told what it was drawn from."""
        text = json.dumps(self.points(results), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"drawn from benchmarks/results/{self.file}, points {digest[:16]}"

    def is_stale(self, root: Path) -> bool:
        """Whether it shows anything but the results, or is there without any."""
        results, path = load(root, self.file), root / self.path
        if results is None or not path.exists():
            return path.exists() or results is not None
        return self.fingerprint(results) not in path.read_text(encoding="utf-8")

    def rewrite(self, root: Path) -> None:
        """Draw it anew if that is needed."""
        results = load(root, self.file)
        if results is None:
            (root / self.path).unlink(missing_ok=True)
        elif self.is_stale(root):
            self.draw(results, root / self.path)

    def draw(self, results: Mapping[str, Any], path: Path) -> None:
        """Draw it into an SVG file."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        with mpl.rc_context(_STYLE):
            figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), facecolor="white")
            self.panels(left, right, self.points(results))
            for axes in (left, right):
                axes.set_axisbelow(True)
                if not axes.has_data():
                    axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)
                    continue
                axes.legend(
                    loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=4, frameon=False
                )
            figure.tight_layout(w_pad=3)
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None, "Description": self.fingerprint(results)}
            figure.savefig(path, metadata=metadata)
            plt.close(figure)


def demo_points(results: Mapping[str, Any]) -> Points:
    """What is drawn of the demo, from the mildest budget to the hardest."""
    first = results["budgets"][0]["auto"]["report"]
    drawn: dict[str, list[float]] = {"original": [100 * first["original"]["accuracy"]]}
    for report, way in demo_reports(results):
        cut, truth = report["compressed"], report["truth"]
        repaired = report["repaired"] or report["recalibrated"] or cut
        meant = report["repaired"] or cut  # what the prediction stands for
        for what, value in (
            ("macs", 100 * report["macs"][1] / report["macs"][0]),
            ("surgery", 100 * cut["accuracy"]),
            ("repaired", 100 * repaired["accuracy"]),
            ("predicted", (truth and truth["calibrated"]) or report["predicted"]),
            ("measured", meant["divergence"]),
        ):
            drawn.setdefault(f"{way} {what}", []).append(value)
    return drawn


def _demo_panels(left: Any, right: Any, drawn: Points) -> None:
    """Accuracy and divergence against the MACs left."""
    auto, paper = WAYS.values()
    accuracies = {
        f"{auto} repaired": ("auto, repaired", _GREEN, "o", _SOLID),
        f"{auto} surgery": ("auto, right after surgery", _GREEN, "s", _DASHED),
        f"{paper} repaired": ("paper, batch norm recalibrated", _RED, "o", _SOLID),
        f"{paper} surgery": ("paper, right after surgery", _RED, "s", _DASHED),
    }
    divergences = {
        f"{auto} measured": ("auto, measured, repaired", _GREEN, "o", _SOLID),
        f"{auto} predicted": ("auto, predicted, calibrated", _GREEN, "D", _DASHED),
        f"{paper} measured": ("paper, measured right after surgery", _RED, "s", _SOLID),
        f"{paper} predicted": ("paper, predicted", _RED, "D", _DASHED),
    }
    original = drawn["original"][0]
    left.axhline(original, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for axes, lines, start in (
        (left, accuracies, ([100], [original])),
        (right, divergences, ([], [])),
    ):
        for name, (label, colour, marker, dashes) in lines.items():
            macs = [*start[0], *drawn[f"{name.split()[0]} macs"]]
            values = [*start[1], *drawn[name]]
            axes.plot(macs, values, color=colour, marker=marker, linestyle=dashes, label=label)
    left.plot(100, original, color=_GREY, marker="o")
    bottom, top = left.get_ylim()
    left.set_ylim(bottom, top + 0.06 * (top - bottom))
    left.annotate(f"original {original:.1f} %", (100, original), (6, 5), textcoords="offset points")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    left.set(title="Accuracy on the test images, %", xlabel="MACs left, %")
    right.set(title="Divergence from the original, nats (logarithmic)", xlabel="MACs left, %")
    for axes in (left, right):
        axes.invert_xaxis()


def truth_points(results: Mapping[str, Any]) -> Points:
    """What was predicted and measured of all rows, with the MACs left."""
    rows = results["rows"]
    keys = ("quadratic", "held_out_cut", "priced", "calibrated", "divergence")
    return {
        f"{network} {key}": [row[key] for row in rows if row["network"] == network]
        for network in dict.fromkeys(row["network"] for row in rows)
        for key in keys
    }


def _truth_panels(left: Any, right: Any, drawn: Points) -> None:
    """Measured against predicted divergence, right after surgery and repaired."""
    networks = list(dict.fromkeys(name.split()[0] for name in drawn))
    lines = (
        (left, "quadratic", "held_out_cut", "quadratic", _BLUE),
        (right, "calibrated", "divergence", "sum of prices, calibrated", _GREEN),
        (right, "priced", "divergence", "sum of prices", _RED),
    )
    for axes in (left, right):
        ends = [
            value
            for panel, key, measured, *_ in lines
            if panel is axes
            for network in networks
            for value in drawn[f"{network} {key}"] + drawn[f"{network} {measured}"]
        ]
        ends = [min(ends) / 1.3, max(ends) * 1.3]
        axes.plot(ends, ends, color=_GREY, linewidth=1, label="predicted = measured")
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axes.set(xlabel="predicted, nats", ylabel="measured, nats")
    for axes, key, measured, label, colour in lines:
        for network, marker in zip(networks, itertools.cycle("osD^v"), strict=False):
            axes.plot(
                drawn[f"{network} {key}"],
                drawn[f"{network} {measured}"],
                color=colour,
                marker=marker,
                linestyle="none",
                label=f"{label}, {network}",
            )
    left.set_title("Right after surgery, on the held-out tenth")
    right.set_title("Repaired, on the test split")


PICTURES: dict[str, Picture] = {
    "demo-picture": Picture(
        "demo.json",
        Path("docs/images/demo.svg"),
        "Two panels over the fraction of MACs left, for auto and for the paper's method. Left: "
        "accuracy right after surgery, and repaired or with batch norm recalibrated. Right: "
        "predicted and measured divergence from the original.",
        demo_points,
        _demo_panels,
    ),
    "truth-picture": Picture(
        "auto_cifar10.json",
        Path("docs/images/truth.svg"),
        "Two panels of measured against predicted divergence on logarithmic axes, with the line "
        "where both agree. Left: right after surgery on the held-out tenth, by the joint "
        "quadratic, close to the line. Right: repaired, on the test split, by the sum of the "
        "prices: calibrated close to the line, bare above it.",
        truth_points,
        _truth_panels,
    ),
    "peers-picture": Picture(
        "peers.json",
        Path("docs/images/peers.svg"),
        "Two panels of accuracy over the fraction of MACs left, without training and after two "
        "epochs, for four of our methods, four of Torch-Pruning's, input-whitened SVD and "
        "Tucker-2.",
        peers_tables.points,
        peers_tables.panels,
    ),
    "latency-picture": Picture(
        "latency_peers.json",
        Path("docs/images/latency.svg"),
        "Two panels of accuracy without training over the time of a call, at a batch of 1 and of "
        "64: auto by MACs, by latency and with channels alone, and Torch-Pruning's GroupTaylor "
        "over all channels and over inner ones.",
        latency_tables.points,
        latency_tables.panels,
    ),
}
"""The pictures, by their names in the pages."""


def demo_reports(results: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The report of every budget and method, and the method's name in the tables."""
    for entry in results["budgets"]:
        for method, way in WAYS.items():
            yield entry[method]["report"], way


def load(root: Path, file: str) -> Any:
    path = root / "benchmarks" / "results" / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
