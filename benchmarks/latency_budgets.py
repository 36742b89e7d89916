"""Budgets of latency: what was asked for, and what the result takes when it is timed again.

Random weights and random inputs, as times do not depend on them. The result of `compress` is timed
whole beside the original, after and apart from the search that made it. Where a budget cannot be
met the row holds the error. Rows of other cases in the results file stay. On a machine that does
nothing else, run

    python benchmarks/latency_budgets.py
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from recording import add_row

import eigendamage as ed
from eigendamage import zoo

IMAGES, PART = 48, 8


def one_row(name: str, batch: int, budget: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = zoo.get(name)().eval()
    data = torch.randn(IMAGES, 3, 32, 32).split(PART)
    row: dict[str, Any] = {"network": name, "batch": batch, "budget": budget}
    start = time.perf_counter()
    try:
        result = ed.compress(
            model,
            data,
            budget=ed.Budget(latency=budget),
            latency_batch=batch,
            progress=False,
        )
    except ed.BudgetError as error:
        return {**row, "seconds": round(time.perf_counter() - start, 1), "error": str(error)}
    seconds = time.perf_counter() - start
    before, after = ed.latency([model, result.model], data, batch=batch, rounds=61)
    actions = [layer.action.kind for layer in result.plan.layers.values()]
    return {
        **row,
        "seconds": round(seconds, 1),
        "reported": result.report.latency,
        "measured": after.median / before.median,
        "spread": after.spread / before.median,
        "milliseconds": [before.median, after.median],
        "macs": result.plan.left("macs"),
        "low_rank": actions.count("lowrank"),
        "channels": actions.count("channels"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent / "results" / "latency_budgets.json"
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--networks", nargs="+", default=["wide_resnet32", "resnet20"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5])
    arguments = parser.parse_args()
    head = {"command": "python benchmarks/latency_budgets.py", "seed": 0}
    for case in product(arguments.networks, arguments.batches, arguments.budgets):
        row = one_row(*case)
        print(row, flush=True)
        add_row(arguments.out, head, row, ("network", "batch", "budget"))


if __name__ == "__main__":
    main()
