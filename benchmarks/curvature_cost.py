"""What the curvature costs in time and memory, against a plain forward and backward pass.

Run ``python benchmarks/curvature_cost.py`` with the ``benchmark`` extra installed; packages that
are missing are skipped with a note. Where others use the machine, set ``OMP_WAIT_POLICY=passive``.

Time: every variant goes over the same images once a round, in an order drawn anew each round, and
its ratio is to the plain pass of that round. Memory: by how much the resident size of a fresh
process peaks above what it was after the same pass over a few images, median of several processes;
there malloc gives freed tensors back at once, so that the peak is that of live ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from curvature_variants import NOTES, VARIANTS, Pass
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eigendamage import zoo

BATCH, SIZE, CLASSES, FEW = 128, 32, 10, 16
MEMORY_BATCHES, MEMORY_RUNS = 3, 3
BARS = {"ours: S and A": 1.5, "ours: λ": 2.5}
MEMORY_BAR = 1.5
PACKAGES = ("torch", "eigendamage", "curvlinops-for-pytorch", "kronfluence")
QUIET_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def prepare(variant: str, network: str, batches: int, seed: int) -> Pass:
    """The pass of a variant over ``batches`` batches; over a few images if that is 0."""
    torch.manual_seed(seed)
    model = getattr(zoo, network)(CLASSES)
    sizes = [FEW, *[BATCH] * batches]
    few, *images = [(torch.randn(n, 3, SIZE, SIZE), torch.randint(CLASSES, (n,))) for n in sizes]
    return VARIANTS[variant](model, images or [few], [few])


def available() -> tuple[list[str], dict[str, str]]:
    """The variants whose packages are here, and the reasons for the others."""
    skipped: dict[str, str] = {}
    for variant in VARIANTS:
        try:
            prepare(variant, "resnet20", 0, 0)
        except ImportError as error:
            skipped[variant] = f"skipped: {error}"
    return [v for v in VARIANTS if v not in skipped], skipped


def timed(network: str, variants: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and seconds of processor time, of every variant in interleaved rounds."""
    passes = {v: prepare(v, network, options.batches, options.seed) for v in variants}
    wall: dict[str, list[float]] = {v: [] for v in variants}
    cpu: dict[str, list[float]] = {v: [] for v in variants}
    order = random.Random(options.seed)
    for index in range(options.rounds + 1):
        for variant in order.sample(variants, len(variants)):
            start = time.perf_counter(), time.process_time()
            passes[variant]()
            if index:  # the first round warms up
                wall[variant].append(time.perf_counter() - start[0])
                cpu[variant].append(time.process_time() - start[1])
        print(f"{network}: round {index} of {options.rounds}", file=sys.stderr)
    return {
        v: {
            "seconds": wall[v],
            "cpu_seconds": cpu[v],
            "ratio": ratio(wall[v], wall["plain"]),
            "cpu_ratio": ratio(cpu[v], cpu["plain"]),
        }
        for v in variants
    }


def ratio(times: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(times, to, strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return {
        "median": median,
        "quartiles": [low, high],
        "range": [min(each), max(each)],
        "of_fastest": min(times) / min(to),
    }


def memory(variant: str, network: str, seed: int) -> dict[str, Any]:
    """Peak extra memory and the size of what is kept, of fresh processes, in bytes."""
    program = [sys.executable, __file__, "--memory-of", variant]
    arguments = ["--networks", network, "--seed", str(seed)]
    runs: list[dict[str, int]] = []
    for _ in range(MEMORY_RUNS):
        done = subprocess.run(
            [*program, *arguments],
            env={**os.environ, **QUIET_MALLOC},
            stdout=subprocess.PIPE,
            check=True,
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    extra = [r["extra"] for r in runs]
    return {"extra": statistics.median(extra), "each": extra, "factors": runs[0]["factors"]}


def memory_here(variant: str, network: str, seed: int) -> dict[str, int]:
    prepare(variant, network, 0, seed)()
    run = prepare(variant, network, MEMORY_BATCHES, seed)
    before = peak_bytes()
    factors = held_bytes(run())
    return {"extra": peak_bytes() - before, "factors": factors}


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage of a child starts at the parent's peak on Linux
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_bytes(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, Mapping):
        return sum(held_bytes(x) for x in item.values())
    if isinstance(item, list | tuple):
        return sum(held_bytes(x) for x in item)
    return held_bytes(vars(item)) if hasattr(item, "__dict__") else 0


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Each variant's memory in units of the plain pass, and whether ours meet their bars."""
    unit = found["plain"]["memory"]["extra"]
    for variant, values in found.items():
        kept = values["memory"]
        kept["ratio_less_factors"] = (kept["extra"] - kept["factors"]) / unit
        if variant in BARS:
            values["meets_time_bar"] = values["ratio"]["median"] <= BARS[variant]
            values["meets_memory_bar"] = kept["ratio_less_factors"] <= MEMORY_BAR
    return found


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average_at_start": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def show(network: str, found: Mapping[str, Any], skipped: Mapping[str, str]) -> None:
    table = Table(
        "variant", "seconds", "ratio", "quartiles", "cpu ratio", "peak MiB", "factors MiB"
    )
    table.title = f"{network}, batch {BATCH}, {SIZE} x {SIZE}; ratios to the plain pass"
    for variant, values in found.items():
        r, kept = values["ratio"], values["memory"]
        table.add_row(
            variant,
            f"{statistics.median(values['seconds']):.2f}",
            f"{r['median']:.2f}",
            "{:.2f} to {:.2f}".format(*r["quartiles"]),
            f"{values['cpu_ratio']['median']:.2f}",
            f"{kept['extra'] / 2**20:.0f} (x {kept['ratio_less_factors']:.2f})",
            f"{kept['factors'] / 2**20:.1f}",
        )
    for variant, reason in skipped.items():
        table.add_row(variant, reason)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/curvature_cost.json"))
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of, options.networks[0], options.seed)))
        return
    variants, skipped = available()
    result: dict[str, Any] = {
        "command": "python benchmarks/curvature_cost.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions(),
        "seed": options.seed,
        "work": {
            "batch": BATCH,
            "batches": options.batches,
            "rounds": options.rounds,
            "size": SIZE,
        },
        "bars": {"time": BARS, "memory_less_factors": MEMORY_BAR},
        "variants": NOTES,
        "skipped": skipped,
        "networks": {},
    }
    for network in options.networks:
        found = timed(network, variants, options)
        for variant in variants:
            found[variant]["memory"] = memory(variant, network, options.seed)
        result["networks"][network] = judged(found)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        show(network, found, skipped)


if __name__ == "__main__":
    main()
