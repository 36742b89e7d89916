"""How time and memory of `compress` grow with width, depth, resolution and samples.

A plain CNN with random weights, one axis drawn out at a time, each size in a process of its own:
seconds of every stage, and by how much the resident memory peaks above what is resident when the
call starts: Python, the network and its data. What peaked before is forgotten, by /proc of Linux.
The exponent is the slope of a line through the logarithms. Then, from rates measured here, what a
language model of 7 billion parameters would take. Run

    python benchmarks/growth.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from recording import machine, record, versions
from torch import Tensor, nn

import eigendamage as ed

Result = TypeVar("Result")


@dataclass(frozen=True)
class Size:
    """Of a network and its data: channels, layers of 3 x 3, pixels a side, images."""

    width: int = 64
    depth: int = 8
    pixels: int = 16
    samples: int = 320


AXES: dict[str, Sequence[int]] = {
    "width": (32, 64, 128, 256),
    "depth": (4, 8, 16, 32),
    "pixels": (16, 32, 64),
    "samples": (160, 320, 640, 1280, 2560),
}
THEORY: dict[str, dict[str, str]] = {
    "width": {"curvature": "2 (convolutions) to 3 (9w × 9w eigenproblems)", "repair": "2 to 3"},
    "depth": {"curvature": "1", "repair": "1 to 2 (each layer's predecessors run again)"},
    "pixels": {"curvature": "2, and a constant for eigenproblems", "repair": "2"},
    "samples": {"curvature": "1, and a constant for eigenproblems", "repair": "1"},
}


def network(size: Size) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(size.depth):
        layers += [
            nn.Conv2d(channels, size.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(size.width),
            nn.ReLU(),
        ]
        channels = size.width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def peak_above_start(run: Callable[[], Result]) -> tuple[Result, int]:
    """What a call returns, and by how many bytes the resident memory peaks above that before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be taken up again, and not be seen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets earlier peaks
    before = _kilobytes("VmRSS")
    result = run()
    return result, (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def compressed(model: nn.Module, data: list[Tensor]) -> ed.Compressed:
    return ed.compress(
        model,
        data,
        budget=ed.Budget(macs=0.6),
        eval_data=data[:1],
        refine=0,
        calibrate=False,
        progress=False,
    )


def measured(size: Size) -> dict[str, Any]:
    """The stages of one call, in this process, which has compressed something small before."""
    torch.manual_seed(0)
    small = network(Size(width=8, depth=2)).eval()
    compressed(small, list(torch.randn(16, 3, 8, 8).split(8)))
    model = network(size).eval()
    data = list(torch.randn(size.samples, 3, size.pixels, size.pixels).split(16))
    ed.recalibrate_batchnorm(model, data, progress=False)
    model(data[0].clone()).logsumexp(1).sum().backward()
    model.zero_grad()
    start = time.perf_counter()
    result, peak = peak_above_start(lambda: compressed(model, data))
    whole = time.perf_counter() - start
    seconds = {k: v for k, v in result.report.seconds.items() if k != "measurement"}
    return {"seconds": seconds, "whole": whole, "peak_above_start": peak}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Of the line through the logarithms, by least squares; None where something is not there."""
    if len(xs) < 2 or min(ys) <= 0:
        return None
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.mean(a), statistics.mean(b)
    up = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return up / sum((x - mean_a) ** 2 for x in a)


def rates() -> dict[str, Any]:
    """Multiply-adds a second of products, and seconds of eigenproblems and SVDs, as they grow."""

    def least(run: Any, times: int = 3) -> float:
        run()
        found = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return min(found)

    n = 1024
    a, b = torch.randn(4096, n), torch.randn(n, n)
    product = 4096 * n * n / least(lambda: a @ b)
    sizes = (256, 512, 1024)
    eigen, svd = [], []
    for size in sizes:
        m = torch.randn(size, size, dtype=torch.float64)
        s = m @ m.T
        eigen.append(least(lambda s=s: torch.linalg.eigh(s), 1))
        svd.append(least(lambda m=m: torch.linalg.svd(m), 1))
    return {
        "multiply_adds_a_second": product,
        "sizes": sizes,
        "eigh_seconds": eigen,
        "svd_seconds": svd,
        "eigh_exponent": slope(sizes, eigen),
        "svd_exponent": slope(sizes, svd),
        # An eigenproblem as so many multiply-adds of a product of the same size, at the largest.
        "eigh_products": eigen[-1] * product / sizes[-1] ** 3,
        "svd_products": svd[-1] * product / sizes[-1] ** 3,
    }


def seven_billion(found: dict[str, Any], *, tokens: int, flops: float, gpus: int) -> dict[str, Any]:
    """A Llama of 32 layers, 4096 wide with MLPs of 11008, on paper.

    Products and decompositions are counted, an eigenproblem as so many products as here, and all of
    it done at a tenth of ``flops`` multiply-adds a second for decompositions and a half for
    products. Memory is in float32, of one group of layers at a time where that is said.
    """
    d, m, layers = 4096, 11008, 32
    linear = [(d, d)] * 4 + [(m, d)] * 2 + [(d, m)]
    weights = layers * sum(o * i for o, i in linear)
    passes = 2 * 3 * weights * tokens  # twice forward and, to inputs and outputs, backward
    factors = layers * sum(o * o + i * i for o, i in linear) * tokens
    corrected = layers * sum(o * o * i + i * i * o for o, i in linear) * (tokens // 512)
    eigen = layers * sum(o**3 + i**3 for o, i in linear) * found["eigh_products"]
    svds = layers * sum(max(o, i) * min(o, i) ** 2 for o, i in linear) * found["svd_products"]
    repair = layers * sum(i**3 for _, i in linear) + 2 * weights * tokens
    fast, slow = 0.5 * flops, 0.1 * flops
    seconds = {
        "forward and backward passes": passes / fast / gpus,
        "S and A": factors / fast / gpus,
        "λ in the eigenbasis": corrected / fast / gpus,
        "eigendecompositions": eigen / slow / gpus,
        "menus: singular values": svds / slow / gpus,
        "repair (not shared out)": repair / fast,
    }
    every = layers * sum(o * o + i * i for o, i in linear) * 4
    return {
        "gpus": gpus,
        "tokens": tokens,
        "seconds": seconds,
        "gigabytes": {
            "weights in bfloat16": 2 * weights / 1e9,
            "S, A and bases of all layers, on the CPU": 2 * every / 1e9,
            "of one block at a time, on the GPU": 2 * every / layers / 1e9,
            "λ of all layers, on the CPU": 4 * weights / 1e9,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent / "results" / "growth.json"
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--only", help="one size as JSON, in this process; prints its row")
    given = parser.parse_args()
    if given.only is not None:
        print(json.dumps(measured(Size(**json.loads(given.only)))))
        return
    rows, known = [], {}
    for axis, values in AXES.items():
        for value in values:
            size = replace(Size(), **{axis: value})
            if size not in known:
                command = [sys.executable, __file__, "--only", json.dumps(asdict(size))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                known[size] = json.loads(done.stdout)
            rows.append({"axis": axis, "value": value, **known[size]})
            print(rows[-1], flush=True)
    exponents: dict[str, dict[str, float | None]] = {}
    for axis in AXES:
        of_axis = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in of_axis]
        stages = dict.fromkeys(stage for row in of_axis for stage in row["seconds"])
        exponents[axis] = {
            stage: slope(values, [row["seconds"].get(stage, 0.0) for row in of_axis])
            for stage in stages
        }
        exponents[axis]["whole"] = slope(values, [row["whole"] for row in of_axis])
        exponents[axis]["peak memory"] = slope(values, [row["peak_above_start"] for row in of_axis])
    found = rates()
    result = {
        "command": "python benchmarks/growth.py",
        "seed": 0,
        "budget": 0.6,
        "from": asdict(Size()),
        "rows": rows,
        "exponents": exponents,
        "theory": THEORY,
        "rates": found,
        "simulated": [
            seven_billion(found, tokens=131072, flops=150e12, gpus=gpus) for gpus in (1, 8)
        ],
        "machine": machine(),
        "versions": versions(),
    }
    record(given.out, result)


if __name__ == "__main__":
    main()
