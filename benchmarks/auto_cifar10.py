"""`compress` as it comes, on CIFAR-10 ResNets: no labels, no training, predicted and measured.

2,000 training images without labels for everything that is decided; the whole test split is only
measured on. Every row is one call of `compress`, curvature included. Run, for each network,

    python benchmarks/auto_cifar10.py --network resnet20 --data CIFAR10.zip \
        --weights resnet20.safetensors

Rows of other networks, seeds and budgets in the results file stay.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from recording import add_row

import eigendamage as ed
from eigendamage import zoo

EXAMPLES = 2000
COMMAND = (
    "python benchmarks/auto_cifar10.py --network NETWORK --data CIFAR10.zip "
    "--weights NETWORK.safetensors"
)


def one_row(
    model: torch.nn.Module, name: str, budget: float, seed: int, data: str
) -> dict[str, Any]:
    images = zoo.load_images(data, "train", limit=EXAMPLES, seed=seed)
    start = time.perf_counter()
    result = ed.compress(
        model,
        zoo.ImageSet(images.images).batches(125),
        budget=ed.Budget(macs=budget),
        eval_data=zoo.load_images(data, "test").batches(200),
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    report, truth = result.report, result.report.truth
    assert truth is not None
    return {
        "network": name,
        "budget": budget,
        "seed": seed,
        "macs": report.macs[1] / report.macs[0],
        "parameters": report.parameters[1] / report.parameters[0],
        "base": report.original.accuracy,
        "cut": report.compressed.accuracy,
        "repaired": report.final.accuracy,
        "divergence": report.final.divergence,
        "priced": truth.priced,
        "calibrated": truth.calibrated,
        "quadratic": truth.quadratic,
        "held_out_cut": truth.before_repair,
        "held_out_repaired": truth.after_repair,
        "channels": sum(isinstance(p.action, ed.Channels) for p in result.plan.layers.values()),
        "seconds": round(seconds - report.seconds["measurement"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", help="of the zoo")
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder, zip or npz")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    here = Path(__file__).parent / "results" / "auto_cifar10.json"
    parser.add_argument("--out", type=Path, default=here)
    arguments = parser.parse_args()

    model = zoo.get(arguments.network)().eval()
    zoo.load_weights(model, arguments.weights)
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            row = one_row(model, arguments.network, budget, seed, arguments.data)
            print(row, flush=True)
            head = {"command": COMMAND, "examples": EXAMPLES}
            add_row(arguments.out, head, row, ("network", "seed", "budget"))


if __name__ == "__main__":
    main()
