"""The tables of what the method itself costs, for tables.py: scores, growth, a simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Results = Mapping[str, Any]
Table = Callable[..., str]


def _source(results: Results) -> str:
    with_versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    machine = results["machine"]
    return (
        f"`{results['command']}`, seed {results['seed']}; {machine['cores']} cores, "
        f"{machine['threads']} threads; {with_versions}."
    )


def score_cost(results: Results, table: Table) -> str:
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


def growth(results: Results, table: Table) -> str:
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


def simulated(results: Results, table: Table) -> str:
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


def sentence_encoder(results: Results, table: Table) -> str:
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
