"""What the method itself costs, as tables: curvature, scores, planning, memory, growth."""

from __future__ import annotations

import statistics

from cells import Results, percent, short, table, words_of


def _source(results: Results) -> str:
    with_versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    machine = results["machine"]
    return (
        f"`{results['command']}`, seed {results['seed']}; {machine['cores']} cores, "
        f"{machine['threads']} threads; {with_versions}."
    )


def score_cost(results: Results) -> str:
    """Of every way the time, in forward and backward passes over the same images."""
    rows = [
        [
            row["network"],
            row["way"],
            f"{row['ratio']:.2f} × ({row['least']:.2f} to {row['most']:.2f})",
        ]
        for row in results["rows"]
    ]
    return (
        f"{table(('network', 'way', 'time'), rows, words=2)}\n\nMedian and range of "
        f"{results['rounds']} interleaved rounds over {results['images']} images. "
        f"{_source(results)}"
    )


def growth(results: Results) -> str:
    """Fitted exponents, beside what theory says where it says something."""
    rows: list[list[str]] = []
    for axis, stages in results["exponents"].items():
        for stage, exponent in stages.items():
            theory = results["theory"].get(axis, {}).get(stage, "")
            measured = stage != "peak memory" or "peak_above_start" in results["rows"][0]
            if exponent is not None and measured:
                rows.append([axis, stage, theory, f"{exponent:.2f}", *_ends(results, axis, stage)])
    start = ", ".join(f"{name} {value}" for name, value in results["from"].items())
    return (
        f"{table(('axis', 'stage', 'theory', 'fitted', 'smallest', 'largest'), rows, words=3)}\n\n"
        f"One axis is changed at a time, from {start}; one run of each size. {_source(results)}"
    )


def _ends(results: Results, axis: str, stage: str) -> list[str]:
    """What was measured at the two ends of an axis."""
    rows = [row for row in results["rows"] if row["axis"] == axis]
    said: list[str] = []
    for row in (rows[0], rows[-1]):
        if stage == "peak memory":
            said.append(f"{row['peak_above_start'] / 1e6:.0f} MB at {row['value']}")
        else:
            spent = row["whole"] if stage == "whole" else row["seconds"].get(stage, 0.0)
            said.append(f"{spent:.2f} s at {row['value']}")
    return said


def simulated(results: Results) -> str:
    """Stages of a model of 7 billion parameters, on paper."""
    one, eight = results["simulated"]
    rows = [
        [stage, f"{seconds / 60:.1f}", f"{eight['seconds'][stage] / 60:.1f}"]
        for stage, seconds in one["seconds"].items()
    ]
    sums = [sum(each["seconds"].values()) / 60 for each in (one, eight)]
    rows.append(["together", *(f"{each:.1f}" for each in sums)])
    memory = [[what, f"{size:.0f}"] for what, size in one["gigabytes"].items()]
    return "\n\n".join(
        [
            table(("stage", "minutes, one GPU", "minutes, eight"), rows),
            table(("what lies in memory", "GB"), memory),
            f"{one['tokens']:,} tokens. Multiply-adds are counted; eigenproblems and SVDs as so "
            f"many products of matrices as they took here ({results['rates']['eigh_products']:.0f} "
            f"and {results['rates']['svd_products']:.0f}). A GPU is taken to do 75 T multiply-adds "
            f"a second in products and 15 T in decompositions. Nothing of this was run.",
        ]
    )


def sentence_encoder(results: Results) -> str:
    """How alike the embeddings of a smaller encoder stay."""
    rows = [
        [
            f"{100 * row['size']:g} %",
            row["method"],
            f"{100 * row['left']:.1f} %",
            f"{row['cosine']:.3f}",
            f"{100 * row['neighbours']:.1f} %",
            f"{row['seconds']:.0f} s",
        ]
        for row in results["rows"]
    ]
    header = ("layers left", "method", "exactly", "cosine", "neighbours kept", "took")
    first = results["rows"][0]
    return (
        f"{table(header, rows, words=2)}\n\n{first['sentences']} sentences of the held-out text: "
        f"the mean cosine of each one's embedding with the original's, and how many of its ten "
        f"nearest are the same. One curvature for all took {first['curvature_seconds']:.0f} s. "
        f"`{results['command']}`, seed {first['seed']}; {first['machine']['cores']} cores, "
        f"{first['machine']['threads']} threads, busy with other work; torch "
        f"{first['versions']['torch']}, eigendamage {first['versions']['eigendamage']}."
    )


def curvature_cost(results: Results) -> str:
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


def planning(results: Results) -> str:
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


def latency_budgets(results: Results) -> str:
    """What was asked for, and what the result takes when it is timed again."""
    rows: list[list[str]] = []
    for row in results["rows"]:
        start = [row["network"], f"{row['batch']}", percent(row["budget"])]
        if "error" in row:
            rows.append([*start, "refused", *["–"] * 6, f"{row['seconds']:.0f}"])
            continue
        before, after = row["milliseconds"]
        rows.append(
            [
                *start,
                percent(row["reported"]),
                percent(row["measured"]),
                f"{100 * row['spread']:.1f} %",
                f"{before:.1f} → {after:.1f}",
                percent(row["macs"]),
                f"{row['low_rank']}",
                f"{row['channels']}",
                f"{row['seconds']:.0f}",
            ]
        )
    header = ("network", "batch", "budget", "reported", "measured", "spread", "ms", "MACs left")
    first = results["rows"][0]
    source = (
        f"`{results['command']}`, seed {results['seed']}, {first['machine']['threads']} threads, "
        f"{words_of(first['versions'])}."
    )
    whole = table((*header, "low-rank layers", "layers with fewer channels", "seconds"), rows)
    return f"{whole}\n\n{source}"


def curvature_memory(results: Results) -> str:
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
