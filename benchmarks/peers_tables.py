"""The tables and the picture of benchmarks/peers.py, for tables.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cells import Results, table

Rows = list[Mapping[str, Any]]
OURS = "ours, auto"
CHANNELS = "ours, channels alone"
"""Of `auto`: what Torch-Pruning may do as well."""


def by_network(results: Results, epochs: int) -> dict[str, Rows]:
    """The rows of each network, of those with so many epochs of training."""
    found: dict[str, Rows] = {}
    for row in results["rows"]:
        if row["epochs"] == epochs:
            found.setdefault(row["network"], []).append(row)
    return found


def accuracy(row: Mapping[str, Any]) -> float:
    """Trained, or without training."""
    return float(row["tuned"] if row["epochs"] else row["untrained"])


def means(
    rows: Rows, value: Callable[[Mapping[str, Any]], float] = accuracy
) -> dict[tuple[str, float], list[float]]:
    """By method and budget, the accuracies of all seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        found.setdefault((row["method"], row["budget"]), []).append(value(row))
    return found


def render(results: Results, epochs: int) -> str:
    """For every network the methods, best first, at every budget; and what ours is ahead by."""
    parts: list[str] = []
    for network, rows in by_network(results, epochs).items():
        budgets = sorted({row["budget"] for row in rows}, reverse=True)
        found = means(rows)
        methods = sorted(
            dict.fromkeys(row["method"] for row in rows), key=lambda m: -_rank(found, m, budgets)
        )
        lines = [
            [
                f"**{method}**" if method == OURS else method,
                *(_cell(found.get((method, budget))) for budget in budgets),
                " / ".join(_left(rows, method, budget) for budget in budgets),
            ]
            for method in methods
        ]
        header = ["method", *map(_column, budgets), "parameters left, %"]
        base = statistics.mean(row["base"] for row in rows)
        first, *more = sorted({row["seed"] for row in rows})
        seeds = f"seed {first}"
        if more:
            seeds += f", with a range where {' or '.join(map(str, more))} were run too"
        parts += [
            f"**{network}**, {100 * base:.2f} % before; {seeds}",
            table(header, lines),
            _ahead(found, budgets),
        ]
    return "\n\n".join([*parts, _source(results, epochs)]) if parts else "*Not measured yet.*"


KINDS: dict[str, Callable[[str], bool]] = {
    "`auto`": lambda method: method == OURS,
    "`auto`, channels alone": lambda method: method == CHANNELS,
    "the paper's family": lambda method: (
        method.startswith("ours, ") and method not in (OURS, CHANNELS)
    ),
    "Torch-Pruning": lambda method: method.startswith("Torch-Pruning"),
    "SVD and Tucker-2": lambda method: "SVD" in method or method == "Tucker-2",
}
STAGES = {0: "no training", 2: "after two epochs"}


def short(results: Results) -> str:
    """Of each kind of method the best at each budget, without training and with."""
    parts: list[str] = []
    for epochs, stage in STAGES.items():
        for network, rows in by_network(results, epochs).items():
            budgets = sorted({row["budget"] for row in rows}, reverse=True)
            base = statistics.mean(row["base"] for row in rows)
            header = [f"{network}, {100 * base:.1f} %; {stage}", *map(_column, budgets)]
            parts.append(table(header, _best_of_kinds(means(rows), budgets)))
    seeds = sorted({row["seed"] for row in results["rows"]})
    said = (
        "Accuracy in percent on the whole test split (CIFAR-10; Fashion-MNIST for demo_network), "
        f"seed {seeds[0]}, and means with a range where {', '.join(map(str, seeds[1:]))} were run "
        f"too. The best of several is the best by this very table. "
        f"`{results['command']}`."
    )
    return "\n\n".join([*parts, said])


def _best_of_kinds(
    found: Mapping[tuple[str, float], list[float]], budgets: Sequence[float]
) -> list[list[str]]:
    lines: list[list[str]] = []
    for kind, belongs in KINDS.items():
        methods = {method for method, _ in found if belongs(method)}
        if not methods:
            continue
        there = [[found[m, b] for m in methods if (m, b) in found] for b in budgets]
        best = [max(values, key=statistics.mean, default=None) for values in there]
        counts = sorted({len(values) for values in there if values})
        several = f", best of {' to '.join(map(str, counts[:: len(counts) - 1 or 1]))}"
        lines.append([f"{kind}{several if counts != [1] else ''}", *map(_cell, best)])
    return lines


def _column(budget: float) -> str:
    return f"{100 * budget:g} % of the MACs"


def _rank(
    found: Mapping[tuple[str, float], Sequence[float]], method: str, at: list[float]
) -> float:
    known = [statistics.mean(found[method, b]) for b in at if (method, b) in found]
    return statistics.mean(known) if len(known) == len(at) else statistics.mean(known) - 1


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return "–"
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _left(rows: Rows, method: str, budget: float) -> str:
    found = [r["parameters"] for r in rows if (r["method"], r["budget"]) == (method, budget)]
    return f"{100 * statistics.mean(found):.0f}" if found else "–"


def _ahead(found: Mapping[tuple[str, float], Sequence[float]], budgets: Iterable[float]) -> str:
    """How far `auto`, of whatever actions, is from the best of the others, by budget."""
    said: list[str] = []
    for budget in budgets:
        others = {
            method: statistics.mean(values)
            for (method, at), values in found.items()
            if at == budget and method not in (OURS, CHANNELS)
        }
        if not others or (OURS, budget) not in found:
            continue
        best = max(others, key=lambda m: others[m])
        points = 100 * (statistics.mean(found[OURS, budget]) - others[best])
        way = "above" if points >= 0 else "**below**"
        said.append(f"at {100 * budget:g} % {abs(points):.1f} points {way} the best other ({best})")
    return f"`auto` is {'; '.join(said)}." if said else ""


def _source(results: Results, epochs: int) -> str:
    rows = [row for row in results["rows"] if row["epochs"] == epochs]
    training = f"; peak learning rate {results['learning_rate']:g} for all" if epochs else ""
    versions = {(row["versions"]["torch"], row["versions"]["eigendamage"]) for row in rows}
    cores = sorted({row["machine"]["cores"] for row in rows})
    said = " and ".join(f"torch {torch}, eigendamage {ours}" for torch, ours in sorted(versions))
    return (
        f"Accuracy in percent on the whole test split; MACs are at most those of the column. "
        f"`{results['command']}`; {results['examples']:,} images for all{training}; "
        f"{', '.join(map(str, cores))} cores, {said}."
    )


def learning_rates(results: Results) -> str:
    """Accuracy on held-out training images after training at each rate."""
    rows: Rows = results["rows"]
    rates = sorted({row["rate"] for row in rows})
    methods = sorted({row["method"] for row in rows}, key=lambda method: (method != OURS, method))
    found = {(row["method"], row["rate"]): f"{100 * row['held_out']:.1f} %" for row in rows}
    lines = [[method, *(found.get((method, rate), "–") for rate in rates)] for method in methods]
    first = rows[0]
    return (
        f"{table(['method', *(f'peak rate {rate:g}' for rate in rates)], lines)}\n\n"
        f"Held-out tenth of the training split, {first['network']} at {100 * first['budget']:g} % "
        f"of the MACs, {first['epochs']} epochs, seed {first['seed']}. `{results['command']}`; "
        f"torch {first['versions']['torch']}, eigendamage {first['versions']['eigendamage']}."
    )


def headline(results: Results) -> str:
    """Of each network trained from scratch what is left, and how accurate, in equal rounds."""
    parts: list[str] = []
    groups: dict[tuple[Any, ...], Rows] = {}
    keys = ("network", "train_epochs", "rounds", "epochs", "last_epochs", "images", "precision")
    for row in results["rows"]:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for (network, trained, rounds, epochs, last, images, precision), rows in groups.items():
        lines = [
            [
                f"{row['method']}, seed {row['seed']}",
                f"{100 * row['macs']:.1f} %",
                f"{100 * row['parameters']:.1f} %",
                f"{100 * row['base']:.2f} %",
                f"{100 * row['accuracy']:.2f} %",
                f"{100 * (row['accuracy'] - row['base']):+.2f}",
            ]
            for row in sorted(rows, key=lambda row: -row["accuracy"])
        ]
        header = ["method", "MACs left", "parameters left", "before", "after", "points"]
        how = "bfloat16" if precision == "bf16" else "float32"
        parts += [
            f"**{network}**, epochs from scratch on {images:,} images: {trained}; then {rounds} "
            f"rounds of {epochs} of fine-tuning each, and {last} in the end; {how}, "
            f"{rows[0]['device'].upper()}",
            table(header, lines),
        ]
    said = f"The whole test split, after the last epoch. `{results['command']}` with these numbers."
    return "\n\n".join([*parts, said])


def points(results: Results) -> dict[str, list[float]]:
    """Of the first network, by epochs and method: MACs and accuracies, of means over the seeds."""
    drawn: dict[str, list[float]] = {}
    for epochs in (0, 2):
        rows = next(iter(by_network(results, epochs).values()), [])
        found, macs = means(rows), means(rows, lambda row: float(row["macs"]))
        for method, budget in sorted(found, key=lambda key: (key[0], -key[1])):
            name = f"{epochs} {method}"
            drawn.setdefault(f"{name} macs", []).append(statistics.mean(macs[method, budget]))
            drawn.setdefault(f"{name} accuracy", []).append(statistics.mean(found[method, budget]))
    return drawn


def panels(left: Any, right: Any, drawn: Mapping[str, list[float]]) -> None:
    """Accuracy against MACs, without training and after two epochs."""
    for axes, epochs, title in ((left, 0, "No training"), (right, 2, "Two epochs of training")):
        axes.set_title(title)
        axes.set(xlabel="MACs left, %", ylabel="accuracy, %")
        for name in drawn:
            if not (name.startswith(f"{epochs} ") and name.endswith(" macs")):
                continue
            method = name.removesuffix(" macs").removeprefix(f"{epochs} ")
            style = _style(method)
            if style is None:
                continue
            values = drawn[f"{epochs} {method} accuracy"]
            order = sorted(zip(drawn[name], values, strict=True), reverse=True)
            axes.plot(
                [100 * x for x, _ in order],
                [100 * y for _, y in order],
                marker="o",
                label=method,
                **style,
            )


_STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#2b8a4f"},
    CHANNELS: {"color": "#2b8a4f", "linestyle": (0, (3, 1, 1, 1))},
    "ours, kron-obs": {"color": "#2b8a4f", "linestyle": (0, (4, 2))},
    "ours, eigendamage": {"color": "#2b8a4f", "linestyle": (0, (1, 1))},
    "Torch-Pruning GroupTaylor, global": {"color": "#b5403a"},
    "Torch-Pruning GroupTaylor, inner": {"color": "#b5403a", "linestyle": (0, (3, 1, 1, 1))},
    "Torch-Pruning GroupMagnitude, inner": {"color": "#b5403a", "linestyle": (0, (4, 2))},
    "Torch-Pruning Hessian, inner": {"color": "#b5403a", "linestyle": (0, (1, 1))},
    "input-whitened SVD": {"color": "#2f6db3"},
    "Tucker-2": {"color": "#2f6db3", "linestyle": (0, (4, 2))},
}


def _style(method: str) -> dict[str, Any] | None:
    """The picture shows some of each kind; the table has all."""
    return _STYLES.get(method)
