"""Learning rates of what peers.py trains, compared on training images that are held out.

Ours and the best of Torch-Pruning at half the MACs are fine-tuned as in peers.py at each rate, on
the training split less a tenth. Accuracy is that on this tenth, which also chooses the epoch. It
is no new data to the original, which was trained on it, nor to the choice of what is removed, as
some of the 2,000 images for that are among it. Run

    python benchmarks/learning_rates.py --data CIFAR10.zip --weights resnet20.safetensors
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from peers import Harness
from recording import add_row, known_rows
from tuning import LEARNING_RATE, fine_tune

import eigendamage as ed

RATES = (0.01, 0.02, 0.05)
METHODS = ("ours, auto", "Torch-Pruning GroupTaylor, global")
KEYS = ("network", "seed", "budget", "epochs", "precision", "method", "rate")
COMMAND = "python benchmarks/learning_rates.py --data CIFAR10.zip --weights resnet20.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", help="of the zoo")
    parser.add_argument("--data", required=True, help="CIFAR-10")
    parser.add_argument("--weights", help="trained weights")
    parser.add_argument("--budget", type=float, default=0.5, help="of MACs")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    here = Path(__file__).parent / "results" / "learning_rates.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()
    harness = Harness(given, given.seed)
    order = torch.randperm(len(harness.train), generator=torch.Generator().manual_seed(given.seed))
    tenth = len(order) // 10
    held, images = harness.train.take(order[:tenth]), harness.train.take(order[tenth:])
    candidates = harness.candidates()
    done = {tuple(row[key] for key in KEYS) for row in known_rows(given.out)}
    for method in METHODS:
        rows = [
            {
                "network": given.network,
                "seed": given.seed,
                "budget": given.budget,
                "epochs": given.epochs,
                "precision": given.precision,
                "method": method,
                "rate": rate,
            }
            for rate in given.rates
        ]
        missing = [row for row in rows if tuple(row[key] for key in KEYS) not in done]
        if not missing:
            continue
        small = candidates[method](given.budget).to(memory_format=torch.channels_last)
        for row in missing:
            start = time.perf_counter()
            learner = copy.deepcopy(small)
            fine_tune(
                learner,
                harness.model,
                images,
                epochs=given.epochs,
                precision=given.precision,
                seed=given.seed,
                rate=row["rate"],
                held_out=held,
            )
            judged = ed.evaluate(learner, held.batches(200), progress=False)
            row["held_out"] = judged.accuracy
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(row, flush=True)
            add_row(given.out, {"command": COMMAND, "of_peers": LEARNING_RATE}, row, KEYS)


if __name__ == "__main__":
    main()
