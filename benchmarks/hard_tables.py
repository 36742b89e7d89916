"""What was tried to break the library, and what it ended in, as tables."""

from __future__ import annotations

from collections import Counter

from cells import Results, table, words_of

_RESULTS = ("met", "read")  # the others are names of errors


def soak(results: Results) -> str:
    """What random calls, and files that were spoilt, ended in; and what calls leave behind."""
    files: Counter[str] = Counter()
    for ends in results["spoilt_files"].values():
        files.update(ends)
    kinds = (("random compressions", results["outcomes"]), ("spoilt files", files))
    rows = [
        [what, str(sum(ends.values())), *_ends(ends), str(len(results["defects"]))]
        for what, ends in kinds
    ]
    header = ["what", "times", "a result", "an error with a name", "defects"]
    growth = results["growth_a_call"]
    return (
        f"{table(header, rows)}\n\nIn the end {results['hooks_left']} hooks and "
        f"{results['open_files_left']} open files are left, and "
        f"{len(results['files_half_written'])} half-written ones. Calls that were made before and "
        f"are made again leave {growth['resident_bytes'] / 1000:.1f} kB and "
        f"{growth['python_blocks']:.0f} small blocks of Python each. `{results['command']}`; "
        f"{words_of(results['machine'])}; {words_of(results['versions'])}."
    )


def _ends(ends: Results) -> list[str]:
    """How many ended in a result; which errors the others ended in."""
    well = sum(ends.get(name, 0) for name in _RESULTS)
    errors = sorted(((n, name) for name, n in ends.items() if name not in _RESULTS), reverse=True)
    return [str(well), ", ".join(f"{name} {n}" for n, name in errors)]


def killed(results: Results) -> str:
    """Whether a run that was killed is the one that was not."""
    moments = ", ".join(f"{kill['seconds']:.0f}" for kill in results["kills"])
    equal = "the same bit for bit" if results["equal"] else "NOT the same"
    return (
        f"A run of {results['seconds']:.0f} s in two rounds, killed {len(results['kills'])} times "
        f"(after {moments} s) and started again each time: its {results['tensors']} tensors are "
        f"{equal} as without. `{results['command']}`; {words_of(results['versions'])}."
    )
