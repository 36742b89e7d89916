"""Methods side by side on networks for CIFAR-10, as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cells import Results, mean_of, percent, short, table, words_of


def resnet20_cifar10(results: Results) -> str:
    """One row a method and budget: the mean over the seeds, and the range where there are several.

    The measured rise is that of the model that is handed back, batch norm recalibrated.
    """
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row.get("budget", row["macs"]), row["method"]), []).append(row)
    base = percent(results["base"]["accuracy"])
    rows = [["100.0 %", "as it is", "100.0 %", base, "–", "–", "–"]]
    for (budget, method), group in groups.items():

        def spread(key: str, show: Callable[[float | None], str], group: Any = group) -> str:
            values = [row[key] for row in group if row.get(key) is not None]
            if not values:
                return "–"
            mean = show(sum(values) / len(values))
            if len(values) == 1 or show(min(values)) == show(max(values)):
                return mean
            return f"{mean} ({show(min(values)).removesuffix(' %')} to {show(max(values))})"

        rows.append(
            [
                percent(budget),
                method,
                spread("parameters", percent),
                spread("accuracy_after_surgery", percent),
                spread("accuracy_recalibrated", percent),
                spread("predicted", short),
                spread("measured_rise", short),
            ]
        )
    header = [
        "MACs allowed",
        "method",
        "parameters left",
        "accuracy right after",
        "batch norm recalibrated",
        "predicted rise of loss",
        "measured, recalibrated",
    ]
    return (
        f"{table(header, rows, words=2)}\n\nMean over seeds {words_of(results['seed'])} and the "
        f"range. `{results['command'].strip()}`; {words_of(results['machine'])}; "
        f"{words_of(results['versions'])}."
    )


def auto_cifar10(results: Results) -> str:
    """Accuracy of `compress` as it comes, and what was predicted of it."""
    rows: list[list[str]] = []
    for row in results["rows"]:
        calibrated, measured = row["calibrated"], row["held_out_repaired"]
        rows.append(
            [
                f"{row['network']}, seed {row['seed']}",
                percent(row["macs"]),
                percent(row["base"]),
                percent(row["cut"]),
                percent(row["repaired"]),
                short(row["quadratic"]),
                short(row["held_out_cut"]),
                short(row["priced"]),
                short(calibrated),
                short(measured),
                f"{measured / calibrated:.2f} ×",
                short(row["divergence"]),
                f"{row['divergence'] / calibrated:.2f} ×",
                f"{row['seconds']:.0f} ({row['machine']['threads']})",
            ]
        )
    header = ("network", "MACs left", "accuracy before", "right after", "repaired")
    truth = ("quadratic", "measured right after", "priced", "calibrated", "measured repaired")
    apart = ("to calibrated", "on the test split", "to calibrated", "seconds (threads)")
    return table((*header, *truth, *apart), rows)


def training_cifar10(results: Results) -> str:
    """What a polish and two epochs gave back: means over the seeds, and the range."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["kind"], row["network"], row["budget"]), []).append(row)
    lines = [
        [
            network,
            kind,
            percent(budget),
            percent(statistics.mean(row["base"] for row in found)),
            mean_of([row["repaired"] for row in found]),
            mean_of([row["accuracy"] for row in found]),
            f"{statistics.mean(row['seconds'] for row in found):.0f} s",
            " or ".join(sorted({str(row["machine"]["threads"]) for row in found})),
            str(len(found)),
        ]
        for (kind, network, budget), found in groups.items()
    ]
    header = ["network", "then", "MACs left", "original", "repaired", "after"]
    header += ["took", "threads", "seeds"]
    polished = [row for row in results["rows"] if row["kind"] == "polished"]
    passes = sorted({len(row["scores"]) - 1 for row in polished})
    carried = sorted({row["recorded"] for row in results["rows"] if "recorded" in row})
    first = results["rows"][0]
    system = f"{first['machine']['system']}, {first['machine']['cores']} cores"
    return (
        f"{table(header, lines, words=2)}\n\nAccuracy on the whole test split of CIFAR-10: means "
        f"over the seeds, and their range. Polished: {' or '.join(map(str, passes))} passes over "
        f"{results['examples']:,} images without labels, crops and flips. Trained: two epochs over "
        f"the training images less a tenth, on labels and distillation. `{results['command']}`; "
        f"{system}, those trained while other work ran; {words_of(first['versions'])}. Some rows "
        f"are {'; others '.join(carried)}."
    )


def compare(results: Results) -> str:
    """A table for each budget of a comparison: one row a method, best at the end first."""
    settings, parts = results["settings"], []
    stages = {"surgery": "right after", "recalibrated": "BN anew"}
    if settings["epochs"]:
        stages["tuned"] = "trained"
    original = results["original"]
    as_it_is = ["as it is", "100.0 %", "100.0 %", "–", *measured_cells(original)]
    as_it_is += ["–"] * 2 * (len(stages) - 1)
    header = ["method", "MACs", "parameters", "predicted rise"]
    header += [cell for stage in stages.values() for cell in (f"accuracy {stage}", "loss")]
    for budget in sorted({row["budget"] for row in results["rows"]}, reverse=True):
        rows = [as_it_is]
        for row in ranked([row for row in results["rows"] if row["budget"] == budget]):
            name = f"`{row['method']}`" + (" †" if row["masks"] else "")
            if row["refused"] is not None:
                rows.append([name, "refused", *["–"] * (len(header) - 2)])
                continue
            sizes = [percent(row["macs"]), percent(row["parameters"]), short(row["predicted"])]
            cells = [cell for stage in stages for cell in measured_cells(row[stage])]
            rows.append([name, *sizes, *cells])
        unit = "MACs" if settings["unit"] == "macs" else "parameters"
        parts += [f"**At most {percent(budget)} of the {unit}**", table(header, rows)]
    if any(row["masks"] for row in results["rows"]):
        parts.append(
            "† Masks leave that fraction of the single weights. The others are zero and stay in "
            "place: nothing is saved, so these rows are not in the running."
        )
    parts += [
        f"`{row['method']}` was refused at {percent(row['budget'])}: {row['refused']}."
        for row in results["rows"]
        if row["refused"] is not None
    ]
    return "\n\n".join([*parts, compare_source(results)])


def compare_source(results: Results) -> str:
    """What a comparison's numbers were measured with, and how far they can be trusted."""
    settings, here = results["settings"], results["environment"]
    tested, accuracy = results["measured_examples"], results["original"]["accuracy"]
    images = settings["max_examples"]
    epochs = settings["epochs"]
    training = (
        f"{epochs} epoch{'s' * (epochs != 1)} of {settings['train_batches']} batches, peak "
        f"learning rate {settings['learning_rate']:g}"
        if epochs
        else "no training"
    )
    doubt = (
        ""
        if accuracy is None
        else (
            f"; an accuracy near {percent(accuracy)} has a standard error of "
            f"{100 * (accuracy * (1 - accuracy) / tested) ** 0.5:.1f} points"
        )
    )
    return (
        f"`{results['command']}`. A single run, with seed {settings['seed']}. Measured on "
        f"{tested:,} examples, {settings['measured_on']}{doubt}. One curvature for all (rounds "
        f"after the first take their own), of {'all' if images is None else f'at most {images:,}'} "
        f"examples; "
        f"{training}. eigendamage {here['eigendamage']}, torch {here['torch']}, "
        f"{here['platform']}, {here['device']}, {here['threads']} "
        f"thread{'s' * (here['threads'] != 1)}."
    )


def measured_cells(measured: Mapping[str, float] | None) -> list[str]:
    """Accuracy and loss of one model."""
    if measured is None:
        return ["–", "–"]
    return [percent(measured["accuracy"]), short(measured["loss"])]


def ranked(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lowest loss at the end first (divergence where there are no labels), masks, refusals."""

    def key(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        final = row["tuned"] or row["recalibrated"] or row["surgery"] or {}
        values = (final.get(name) for name in ("loss", "divergence"))
        worth = next((value for value in values if value is not None), math.inf)
        return row["refused"] is not None, row["masks"], worth

    return sorted(rows, key=key)
