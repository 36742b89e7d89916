"""Rewrite the tables in README.md and docs/ from benchmarks/results, and draw the pictures.

Run ``python benchmarks/tables.py`` after a benchmark has written its result. A table stands between
``<!-- table:NAME -->`` and ``<!-- /table -->``. With ``--check`` nothing is written, and the exit
code is 1 if a page or a picture is not what the results say.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cost_tables
import latency_tables
import peers_tables
from pictures import MISSING, PICTURES, demo_reports, load

ROOT = Path(__file__).resolve().parents[1]
LAYERS_OF = "macs 0.5"
_OPENING = "<!-- table:"
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table whose first ``words`` columns are text and the others numbers."""
    rule = [":--" if k < words else "--:" for k in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def rise(measured: Mapping[str, float] | None, original: Mapping[str, float]) -> float | None:
    """By how much the mean loss rose."""
    return None if measured is None else measured["loss"] - original["loss"]


def demo(results: Mapping[str, Any]) -> str:
    original = results["budgets"][0]["auto"]["report"]["original"]
    rows = [["100.0 %", "as it is", "100.0 %", percent(original["accuracy"]), *["–"] * 3]]
    for report, way in demo_reports(results):
        recalibrated = report["recalibrated"]
        repaired = report["repaired"] or recalibrated or report["compressed"]
        rows.append(
            [
                percent(report["macs"][1] / report["macs"][0]),
                way,
                percent(report["parameters"][1] / report["parameters"][0]),
                percent(report["compressed"]["accuracy"]),
                percent(repaired["accuracy"]) + (" *" if recalibrated else ""),
                short(repaired["divergence"]),
                short(rise(repaired, report["original"])),
            ]
        )
    header = [
        "MACs left",
        "method",
        "parameters left",
        "accuracy right after",
        "repaired",
        "divergence",
        "rise of loss",
    ]
    return (
        f"{table(header, rows, words=2)}\n\n\\* The paper's method, `eigendamage`, has no "
        f"repair; instead batch norm's statistics are measured again. Divergence and rise of the "
        f"loss, in nats, are those of the model in the column *repaired*. {demo_source(results)}"
    )


def demo_source(results: Mapping[str, Any]) -> str:
    """What the demo's numbers were measured with."""
    first = results["budgets"][0]["auto"]["report"]
    here = first["environment"]
    return (
        f"`{results['command']}`, seed {results['seed']}: {first['measured_examples']:,} test "
        f"images; compressed on training images without labels, {first['examples']:,} for the "
        f"curvature, which all share, and {first['truth']['examples']} held out of it (about "
        f"a tenth, in whole batches). No training. eigendamage {here['eigendamage']}, "
        f"torch {here['torch']}, {here['platform']}, {here['device']}, "
        f"{here['threads']} thread{'s' * (here['threads'] != 1)}."
    )


def demo_loss(results: Mapping[str, Any]) -> str:
    """What was predicted beside what was measured of the model that the prediction stands for."""
    rows = []
    for report, way in demo_reports(results):
        truth, cut, priced = report["truth"], report["compressed"], report["predicted"]
        calibrated = truth and truth["calibrated"]
        predicted = calibrated or priced
        meant = report["repaired"] or cut
        rows.append(
            [
                percent(report["macs"][1] / report["macs"][0]),
                way,
                short(priced),
                short(calibrated),
                short(cut["divergence"]),
                short((report["repaired"] or {}).get("divergence")),
                f"{meant['divergence'] / predicted:.1f} ×",
                short(rise(cut, report["original"])),
                short(rise(report["repaired"], report["original"])),
            ]
        )
    header = [
        "MACs left",
        "method",
        "priced",
        "calibrated",
        "divergence right after",
        "repaired",
        "to predicted",
        "rise of loss right after",
        "repaired",
    ]
    return table(header, rows, words=2)


def demo_layers(results: Mapping[str, Any]) -> str:
    reports = [entry["auto"]["report"] for entry in results["budgets"]]
    report = next((r for r in reports if r["budget"] == LAYERS_OF), reports[0])
    rows = [
        [
            f"`{name}`",
            layer["action"],
            "–" if layer["ranks"] is None else "{} × {}".format(*layer["ranks"]),
            f"{layer['price']:.1e}" if layer["price"] else "0",
            f"{layer['calibrated']:.1e}" if layer["calibrated"] else "0",
            percent(layer["macs"][1] / layer["macs"][0]),
            percent(layer["parameters"][1] / layer["parameters"][0]),
        ]
        for name, layer in report["layers"].items()
    ]
    header = [
        "layer",
        "what is done",
        "ranks, out × in",
        "price",
        "calibrated",
        "MACs left",
        "parameters left",
    ]
    return table(header, rows, words=2)


def calibration(results: Mapping[str, Any]) -> str:
    found = results["budgets"][0]["auto"]["report"]["calibration"]
    rows = [
        [
            f"`{name}`",
            short(row["exact"]),
            f"{row['kfac'] / row['exact']:.2f}",
            f"{row['ekfac'] / row['exact']:.2f}",
        ]
        for name, row in found.items()
        if row["exact"]
    ]
    return table(["layer", "exact trace, few images", "K-FAC to exact", "Σ λ to exact"], rows)


def curvature_cost(results: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for network, found in results["networks"].items():
        rows = [
            [
                variant,
                f"{statistics.median(values['seconds']):.2f}",
                f"{values['ratio']['median']:.2f}",
                "{:.2f} to {:.2f}".format(*values["ratio"]["quartiles"]),
                f"{values['memory']['ratio_less_factors']:.2f}",
                f"{values['memory']['factors'] / 2**20:.1f}",
            ]
            for variant, values in found.items()
        ]
        rows += [[variant, reason, *[""] * 4] for variant, reason in results["skipped"].items()]
        header = ["variant", "seconds", "ratio", "quartiles", "peak memory", "factors, MiB"]
        parts += [f"**{network}**", table(header, rows)]
    work = results["work"]
    parts.append(
        f"`{results['command'].strip()}`: {work['batches']} batches of {work['batch']} images of "
        f"{work['size']} × {work['size']}, {work['rounds']} rounds, seed {results['seed']}. "
        f"{words_of(results['machine'])}; {words_of(results['versions'])}. Ratios are to the plain "
        f"pass of the same round; peak memory is what a pass adds, less the factors it returns, in "
        f"units of what the plain pass adds."
    )
    parts.append("\n".join(f"- *{name}*: {note}" for name, note in results["variants"].items()))
    return "\n\n".join(parts)


def resnet20_cifar10(results: Mapping[str, Any]) -> str:
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


def auto_cifar10(results: Mapping[str, Any]) -> str:
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


def training_cifar10(results: Mapping[str, Any]) -> str:
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


def mean_of(values: Sequence[float]) -> str:
    """The mean, and the range where there are several."""
    mean = f"{100 * statistics.mean(values):.2f} %"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.2f} to {100 * max(values):.2f} %)"


def planning(results: Mapping[str, Any]) -> str:
    """What planning a large network takes."""
    rows: list[list[str]] = []
    for index, row in enumerate(results["rows"]):
        budget = ", ".join(f"{unit} {fraction:g}" for unit, fraction in row["budget"].items())
        menus = "made" if index == 0 else "the same"
        rows.append([budget, menus, f"{row['seconds']:.1f}", short(row["gap"])])
    source = (
        f"`{results['command']}`, {results['layers']} layers, seed {results['seed']}, "
        f"{results['machine']['threads']} threads, {results['resident_gigabytes']:g} GB in memory "
        f"at most, {words_of(results['versions'])}."
    )
    return f"{table(('budget', 'menus', 'seconds', 'gap'), rows, words=2)}\n\n{source}"


def latency_budgets(results: Mapping[str, Any]) -> str:
    """What was asked for, and what the result takes when it is timed again."""
    rows: list[list[str]] = []
    for row in results["rows"]:
        start = [row["network"], f"{row['batch']}", percent(row["budget"])]
        if "error" in row:
            rows.append([*start, "refused", *["–"] * 5, f"{row['seconds']:.0f}"])
            continue
        before, after = row["milliseconds"]
        rows.append(
            [
                *start,
                percent(row["measured"]),
                f"{100 * row['spread']:.1f} %",
                f"{before:.1f} → {after:.1f}",
                percent(row["macs"]),
                f"{row['low_rank']}",
                f"{row['channels']}",
                f"{row['seconds']:.0f}",
            ]
        )
    header = ("network", "batch", "budget", "measured", "spread", "ms", "MACs left")
    first = results["rows"][0]
    source = (
        f"`{results['command']}`, seed {results['seed']}, {first['machine']['threads']} threads, "
        f"{words_of(first['versions'])}."
    )
    whole = table((*header, "low-rank layers", "layers with fewer channels", "seconds"), rows)
    return f"{whole}\n\n{source}"


def curvature_memory(results: Mapping[str, Any]) -> str:
    """What memory options save of the peak."""
    header = ("setting", "passes", "peak, MB", "of it the result, MB", "seconds")
    rows = [
        [
            row["setting"],
            str(row["passes"]),
            f"{row['peak'] / 1e6:.0f}",
            f"{row['result'] / 1e6:.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(results["rows"], key=lambda row: (row["result"], row["passes"]))
    ]
    first = results["rows"][0]
    source = (
        f"`{results['command']}`: {results['network']}, {results['images']} images in batches of "
        f"{results['batch']}, {results['positions']} positions of each for patches, seed "
        f"{results['seed']}, {first['machine']['threads']} threads, "
        f"{words_of(first['versions'])}. The peak is what the call adds to that of a forward and "
        f"backward pass before it, as resident memory."
    )
    return f"{table(header, rows)}\n\n{source}"


def compare(results: Mapping[str, Any]) -> str:
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


def compare_source(results: Mapping[str, Any]) -> str:
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


def words_of(item: object) -> str:
    """A record of a machine or of versions as one phrase."""
    if isinstance(item, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {v}" for k, v in item.items())
    if isinstance(item, list | tuple):
        return ", ".join(map(str, item))
    return str(item)


def language_models(results: Mapping[str, Any]) -> str:
    rows = []
    by_loss = sorted(results["rows"], key=lambda r: (r["model"], -r["size"], r["loss"]))
    for row in by_loss:
        distilled = row["distilled"]
        rows.append(
            [
                row["model"],
                percent(row["size"]),
                row["method"],
                percent(row["left"]),
                f"{row['loss'] - row['base']:+.3f}",
                f"{row['perplexity']:.2f}",
                f"{distilled - row['base']:+.3f}" if distilled else "–",
                f"{math.exp(distilled):.2f}" if distilled else "–",
            ]
        )
    header = [
        "model",
        "at most",
        "method",
        "left",
        "rise of loss right after",
        "perplexity",
        "rise distilled",
        "perplexity",
    ]
    bases = {row["model"]: row["base_perplexity"] for row in results["rows"]}
    shown = ", ".join(f"{model} {base:.2f}" for model, base in bases.items())
    return (
        f"{table(header, rows, words=3)}\n\nLosses in nats per token of the held-out text; "
        f"perplexity as it is: {shown}. Distilled: {words_of(results['distilled'])}. "
        f"Seed 0, one run. `{results['command']}`."
    )


def coverage(results: Mapping[str, Any]) -> str:
    """How many networks passed which checks; each network; why those failed that did."""
    rows, kinds = results["rows"], []
    checks = ("compress", "forward", "backward", "budget", "save", "onnx")
    rows = sorted(rows, key=lambda row: (row["kind"], row["network"]))
    whole = sum(not row["failed"] for row in rows)
    for row in rows:
        failed = row["failed"]
        ran = "compress" not in failed
        cells = ["–"] * 4
        if ran:
            sizes = (row.get(what) for what in ("flops", "parameters"))
            cells[:2] = [percent(size and size[1] / size[0]) for size in sizes]
            changed = ", ".join(f"{n} {kind}" for kind, n in row["changed"].items())
            cells[2] = f"{changed}, {row['kept']} kept"
            cells[3] = short(row.get("difference"))
        marks = [
            "no" if what in failed else "yes" if ran or what == "compress" else "–"
            for what in checks
        ]
        size = f"{row['size']}²" + (" *" if row["options"] else "")
        name = f"`{row['network']}`"
        kinds.append([row["kind"], name, size, *marks, *cells, f"{row['seconds']:.0f}"])
    header = ["kind", "network", "images", *checks]
    header += ["operations left", "parameters left", "layers", "ONNX difference", "seconds"]
    reasons = [
        f"- `{row['network']}`, {what}: {reason}"
        for row in rows
        for what, reason in row["failed"].items()
    ]
    options = ", ".join(f"`{name}={value}`" for name, value in results["compress"].items())
    first = rows[0]
    said = {words_of(row["versions"]) for row in rows}
    source = (
        f"`{results['command']}`, seed {results['seed']}: `ed.compress` with "
        f"`budget=ed.Budget(macs={results['budget']:g})`, {options} on {results['images']} random "
        f"images. Seconds are those of the whole row on one thread of a machine that did other "
        f"work. {'; '.join(sorted(said))}, {words_of(first['libraries'])}."
    )
    missing = results["networks"] - len(rows)
    rest = f"; {missing} of the {results['networks']} have not been run yet" if missing else ""
    parts = [f"**{whole} of {len(rows)} pass every check{rest}.**", table(header, kinds, words=9)]
    if reasons:
        parts += ["Where a check failed, the reason:", "\n".join(reasons)]
    return "\n\n".join([*parts, source])


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "demo": ("demo.json", demo),
    "demo-loss": ("demo.json", demo_loss),
    "demo-layers": ("demo.json", demo_layers),
    "calibration": ("demo.json", calibration),
    "curvature-cost": ("curvature_cost.json", curvature_cost),
    "resnet20-cifar10": ("resnet20_cifar10.json", resnet20_cifar10),
    "auto-cifar10": ("auto_cifar10.json", auto_cifar10),
    "planning": ("planning.json", planning),
    "training-cifar10": ("training_cifar10.json", training_cifar10),
    "curvature-memory": ("curvature_memory.json", curvature_memory),
    "latency-budgets": ("latency_budgets.json", latency_budgets),
    "compare": ("compare.json", compare),
    "coverage": ("coverage.json", coverage),
    "peers-short": ("peers.json", lambda results: peers_tables.short(results, table)),
    "peers-untrained": ("peers.json", lambda results: peers_tables.render(results, 0, table)),
    "peers-trained": ("peers.json", lambda results: peers_tables.render(results, 2, table)),
    "headline": (
        "wide_resnet32.json",
        lambda results: peers_tables.headline(results, table),
    ),
    "score-cost": ("score_cost.json", lambda results: cost_tables.score_cost(results, table)),
    "sentence-encoder": (
        "sentence_encoder.json",
        lambda results: cost_tables.sentence_encoder(results, table),
    ),
    "latency-peers": (
        "latency_peers.json",
        lambda results: latency_tables.render(results, table),
    ),
    "growth": ("growth.json", lambda results: cost_tables.growth(results, table)),
    "simulated": ("growth.json", lambda results: cost_tables.simulated(results, table)),
    "language-models": ("language_models.json", language_models),
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
