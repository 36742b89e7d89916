"""What became of other networks: language models, and those of timm and torchvision."""

from __future__ import annotations

import math

from cells import Results, percent, short, table, words_of


def language_models(results: Results) -> str:
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


def coverage(results: Results) -> str:
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
