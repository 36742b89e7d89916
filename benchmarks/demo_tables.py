"""The demo's results as tables."""

from __future__ import annotations

from cells import Results, percent, rise, short, table
from pictures import demo_reports

LAYERS_OF = "macs 0.5"


def demo(results: Results) -> str:
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


def demo_source(results: Results) -> str:
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


def demo_loss(results: Results) -> str:
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


def demo_layers(results: Results) -> str:
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


def calibration(results: Results) -> str:
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
