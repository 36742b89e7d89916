"""What a polish and two epochs of training give back, on a CIFAR-10 ResNet.

Polish (``--epochs 0``): no labels, on the 2,000 images that the curvature saw. Fine-tuning: two
epochs over the training split less a tenth, which is held out to choose the epoch by; labels and
distillation, crops and flips, batches of 128. The test split is only measured on. Run

    python benchmarks/training_cifar10.py --data CIFAR10.zip --weights resnet20.safetensors

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
    "python benchmarks/training_cifar10.py --network NETWORK --data CIFAR10.zip "
    "--weights NETWORK.safetensors"
)


def one_row(
    model: torch.nn.Module, given: argparse.Namespace, budget: float, seed: int
) -> dict[str, Any]:
    few = zoo.load_images(given.data, "train", limit=EXAMPLES, seed=seed)
    test = zoo.load_images(given.data, "test").batches(200)
    result = ed.compress(
        model,
        zoo.ImageSet(few.images).batches(125),
        budget=ed.Budget(macs=budget),
        polish=0 if given.epochs else ed.PolishConfig(augment=ed.crops_and_flips()),
        eval_data=test,
        seed=seed,
        progress=False,
    )
    report = result.report
    assert report.repaired is not None
    row: dict[str, Any] = {
        "kind": "trained" if given.epochs else "polished",
        "network": given.network,
        "budget": budget,
        "seed": seed,
        "macs": report.macs[1] / report.macs[0],
        "base": report.original.accuracy,
        "repaired": report.repaired.accuracy,
        "accuracy": report.final.accuracy,
        "divergences": [report.repaired.divergence, report.final.divergence],
        "scores": None if report.polish is None else report.polish.scores,
        "compress_seconds": round(sum(report.seconds.values()) - report.seconds["measurement"], 1),
        "seconds": round(report.seconds.get("polish", 0.0), 1),
    }
    if given.epochs:
        train = zoo.load_images(given.data, "train", seed=seed)
        start = time.perf_counter()
        done = ed.finetune(
            result.model,
            train.batches(128, shuffle_seed=seed, augment=True),
            ed.FinetuneConfig(
                epochs=given.epochs,
                learning_rate=given.learning_rate,
                label_share=given.label_share,
                temperature=given.temperature,
                seed=seed,
            ),
            original=model,
            progress=False,
        )
        row["epochs"] = given.epochs
        row["seconds"] = round(time.perf_counter() - start, 1)
        row["scores"] = done.scores
        row["best"] = done.best
        row["accuracy"] = ed.evaluate(result.model, test, progress=False).accuracy
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", help="of the zoo")
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder, zip or npz")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of training; 0 for the polish alone")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--label-share", type=float, default=ed.FinetuneConfig.label_share)
    parser.add_argument("--temperature", type=float, default=ed.FinetuneConfig.temperature)
    here = Path(__file__).parent / "results" / "training_cifar10.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()

    model = zoo.get(given.network)().eval()
    zoo.load_weights(model, given.weights)
    for seed in given.seeds:
        for budget in given.budgets:
            row = one_row(model, given, budget, seed)
            print(row, flush=True)
            head = {"command": COMMAND, "examples": EXAMPLES}
            add_row(given.out, head, row, ("kind", "network", "budget", "seed"))


if __name__ == "__main__":
    main()
