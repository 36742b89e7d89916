"""What a score of every unit costs: ours beside Torch-Pruning's, in passes over the same images.

Every way runs once a round, in an order drawn anew, and its ratio is to the plain forward and
backward pass of that round. Random weights and images: times do not depend on them. Run

    python benchmarks/score_cost.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from competitors import with_convolved_shortcuts
from recording import machine, record, versions
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eigendamage as ed
from eigendamage import zoo

IMAGES, BATCH = 256, 64
Ways = dict[str, Callable[[], object]]


def importances(model: nn.Module, example: Tensor, importance: Any) -> int:
    """Torch-Pruning's scores of all groups; how many units there are."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    units = 0
    for group in graph.get_all_groups(ignored_layers=[model.linear]):
        found = importance(group)
        units += 0 if found is None else len(found)
    return units


def ways_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Ways:
    inputs = [x for x, _ in data]
    example = inputs[0][:1]
    convolved = with_convolved_shortcuts(model)

    def gradients() -> None:
        convolved.zero_grad()
        for x, y in data:
            cross_entropy(convolved(x), y).backward()

    def taylor() -> object:
        gradients()
        return importances(convolved, example, tp.importance.GroupTaylorImportance())

    def hessian() -> object:
        importance = tp.importance.GroupHessianImportance()
        for images, labels in data:
            # Alone: out of a batch's graph each would take a backward pass of the whole batch.
            for x, y in zip(images.split(1), labels.split(1), strict=True):
                convolved.zero_grad()
                cross_entropy(convolved(x), y).backward()
                importance.accumulate_grad(convolved)
        return importances(convolved, example, importance)

    def curvature(*also: Any) -> ed.Curvature:
        return ed.estimate_curvature(model, inputs, also=also, progress=False)

    def plan(method: str, *also: Any) -> object:
        known = curvature(*also)
        return ed.make_plan(model, known, ed.Budget(macs=0.5), method=method)

    return {
        "forward and backward pass": gradients,
        "Torch-Pruning, GroupTaylor": taylor,
        "Torch-Pruning, Hessian": hessian,
        "ours, curvature alone": curvature,
        "ours, eigendamage to a plan": lambda: plan("eigendamage"),
        "ours, kron-obs to a plan": lambda: plan("kron-obs", "patches", "channels"),
        "ours, auto to a plan": lambda: plan("auto", *ed.needs("auto")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--rounds", type=int, default=5)
    here = Path(__file__).parent / "results" / "score_cost.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()
    rows = []
    order = random.Random(0)
    for network in given.networks:
        torch.manual_seed(0)
        model = zoo.get(network)().eval()
        images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,))
        data = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        ways = ways_of(model, data)
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(given.rounds + 1):
            names = list(ways)
            order.shuffle(names)
            seconds = {}
            for name in names:
                start = time.perf_counter()
                ways[name]()
                seconds[name] = time.perf_counter() - start
            if number:  # the first one warms up
                for name, spent in seconds.items():
                    ratios[name].append(spent / seconds["forward and backward pass"])
        for name, found in ratios.items():
            row = {
                "network": network,
                "way": name,
                "ratio": statistics.median(found),
                "least": min(found),
                "most": max(found),
            }
            rows.append(row)
            print(row, flush=True)
    result = {
        "command": "python benchmarks/score_cost.py",
        "seed": 0,
        "images": IMAGES,
        "rounds": given.rounds,
        "rows": rows,
        "machine": machine(),
        "versions": {**versions(), "torch-pruning": tp.__version__},
    }
    record(given.out, result)


if __name__ == "__main__":
    main()
