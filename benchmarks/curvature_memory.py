"""Peak memory of estimate_curvature under its memory options.

Each setting runs in a process of its own, whose resident memory at its highest is compared with
that before the call (after a forward and backward pass like those of the estimate). Random weights
and inputs, on the CPU. Run

    python benchmarks/curvature_memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from recording import add_row

import eigendamage as ed
from eigendamage import zoo

NETWORK, IMAGES, BATCH, POSITIONS = "vgg19", 32, 16, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "S, A and λ": {},
    "S, A and λ, `max_memory='50MB'`": {"max_memory": "50MB"},
    "with patches": {"also": ("patches",)},
    "with patches, `max_memory='500MB'`": {"also": ("patches",), "max_memory": "500MB"},
    "with patches, `max_memory='200MB'`": {"also": ("patches",), "max_memory": "200MB"},
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(options: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    model = zoo.get(NETWORK)().eval()
    data = list(torch.randn(IMAGES, 3, 32, 32).split(BATCH))
    passes = 0

    class Counted:
        def __iter__(self) -> Any:
            nonlocal passes
            yield from data
            passes += 1

    model.requires_grad_(False)
    model(data[0].clone().requires_grad_(True)).logsumexp(1).sum().backward()
    before, start = peak_bytes(), time.perf_counter()
    found = ed.estimate_curvature(
        model, Counted(), patch_positions=POSITIONS, progress=False, **options
    )
    seconds, more = time.perf_counter() - start, peak_bytes() - before
    kept = sum(
        t.numel() * t.element_size()
        for layer in found.values()
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor)
    )
    return {"peak": more, "result": kept, "passes": passes, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent / "results" / "curvature_memory.json"
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--only", help="One setting, in this process; prints its row.")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(measured(SETTINGS[arguments.only])))
        return
    head = {
        "command": "python benchmarks/curvature_memory.py",
        "seed": 0,
        "network": NETWORK,
        "images": IMAGES,
        "batch": BATCH,
        "positions": POSITIONS,
    }
    for name in SETTINGS:
        command = [sys.executable, __file__, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = {"setting": name, **json.loads(done.stdout)}
        print(row, flush=True)
        add_row(arguments.out, head, row, ("setting",))


if __name__ == "__main__":
    main()
