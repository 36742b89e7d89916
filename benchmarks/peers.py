"""Our methods beside Torch-Pruning, Tucker-2 and SVD at equal MACs, untrained and fine-tuned.

All see the same 2,000 images of the training split: ours and the SVD without labels,
Torch-Pruning's Taylor and Hessian with them. Every competitor's batch norm is measured anew on
those images, which is its result without training (of `auto` it is the repaired model). With
``--epochs`` each is trained alike: on the training split less a tenth, which is held out to choose
the epoch by; labels and distillation, crops and flips, in bfloat16 (``--precision no`` where a
processor has none), which gives a row without training too. The test split is only measured on.
Run

    python benchmarks/peers.py --network resnet20 --data CIFAR10.zip --weights resnet20.safetensors

Rows that the results file has already are not done again, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from competitors import competitors
from recording import add_row, known_rows
from torch import nn
from tuning import LEARNING_RATE, fine_tune

import eigendamage as ed
from eigendamage import zoo
from eigendamage.plan import ACTIONS, ActionKind

EXAMPLES = 2000
BUDGETS = (0.75, 0.5, 0.35, 0.25)
FAMILY = ("eigendamage", "kron-obs", "kron-obd", "c-obs", "c-obd")
KEYS = ("network", "seed", "budget", "epochs", "method")
OF_TRAINING = ("precision", "tuned", "training_seconds")
COMMAND = (
    "python benchmarks/peers.py --network NETWORK --data DATA --weights NETWORK.safetensors "
    "--epochs EPOCHS"
)


def idx(folder: str, split: str) -> zoo.ImageSet:
    """The whole of Fashion-MNIST, normalised as the bundled part is."""
    name = {"train": "train", "test": "t10k"}[split]
    pixels, labels = (
        np.frombuffer(gzip.decompress((Path(folder) / f"{name}-{end}").read_bytes()), np.uint8)
        for end in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    )
    images = torch.from_numpy(pixels[16:].copy()).reshape(-1, 1, 28, 28).float() / 255
    return zoo.ImageSet((images - 0.286) / 0.353, torch.from_numpy(labels[8:].copy()).long())


def load(
    network: str, data: str, split: str, limit: int | None = None, seed: int = 0
) -> zoo.ImageSet:
    if network != "demo_network":
        return zoo.load_images(data, split, limit=limit, seed=seed)
    images = idx(data, split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images if limit is None else images.take(order[:limit])


class Harness:
    """One network with its images, and what all methods share."""

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        self.network, self.seed = given.network, seed
        self.model = zoo.get(given.network)().eval()
        if given.weights is not None:
            zoo.load_weights(self.model, given.weights)
        self.given = given
        few = load(given.network, given.data, "train", EXAMPLES, seed)
        self.labelled = few.batches(125)
        self.unlabeled = zoo.ImageSet(few.images).batches(125)
        self.test = load(given.network, given.data, "test").batches(200)
        self.example = few.images[:1]
        self.base = ed.evaluate(self.model, self.test, progress=False).accuracy
        self.whole = ed.count(self.model, self.example)

    @cached_property
    def train(self) -> zoo.ImageSet:
        return load(self.network, self.given.data, "train")

    @cached_property
    def curvature(self) -> ed.Curvature:
        return ed.estimate_curvature(
            self.model,
            self.unlabeled,
            also=("patches", "gradients", "channels"),
            seed=self.seed,
            progress=False,
        )

    def candidates(self) -> dict[str, Callable[[float], nn.Module]]:
        others = competitors(self.model, self.example, self.labelled, self.curvature)
        return {
            "ours, auto": self.auto,
            "ours, channels alone": partial(self.auto, actions=("channels",)),
            **{f"ours, {method}": self.of_family(method) for method in FAMILY},
            **{name: self.recalibrated(make) for name, make in others.items()},
        }

    def auto(self, budget: float, actions: Sequence[ActionKind] = ACTIONS) -> nn.Module:
        return ed.compress(
            self.model,
            self.unlabeled,
            budget=ed.Budget(macs=budget),
            actions=actions,
            eval_data=self.labelled_of_one(),
            seed=self.seed,
            progress=False,
        ).model

    def of_family(self, method: str) -> Callable[[float], nn.Module]:
        def make(budget: float) -> nn.Module:
            return ed.compress(
                self.model,
                self.unlabeled,
                budget=ed.Budget(macs=budget),
                method=method,
                curvature=self.curvature,
                eval_data=self.labelled_of_one(),
                calibration_examples=0,
                seed=self.seed,
                progress=False,
            ).model

        return make

    def recalibrated(self, make: Callable[[float], nn.Module]) -> Callable[[float], nn.Module]:
        def both(budget: float) -> nn.Module:
            small = make(budget)
            ed.recalibrate_batchnorm(small, self.unlabeled, progress=False)
            return small

        return both

    def labelled_of_one(self) -> zoo.ImageSet | Any:
        """What the report of a compression is about; it decides nothing."""
        return self.labelled.source.take(slice(0, 50)).batches(50)

    def tuned(self, small: nn.Module, epochs: int) -> float | None:
        precision = self.given.precision
        fine_tune(small, self.model, self.train, epochs=epochs, precision=precision, seed=self.seed)
        return ed.evaluate(small, self.test, progress=False).accuracy

    def row(
        self, method: str, make: Callable[[float], nn.Module], budget: float, epochs: int
    ) -> dict[str, Any]:
        start = time.perf_counter()
        small = make(budget)
        seconds = time.perf_counter() - start
        # On a CPU narrow convolutions run faster so; it is the same for all.
        small.to(memory_format=torch.channels_last)
        counted = ed.count(small, self.example)
        row = {
            "network": self.network,
            "seed": self.seed,
            "budget": budget,
            "epochs": epochs,
            "method": method,
            "macs": counted.macs / self.whole.macs,
            "parameters": counted.parameters / self.whole.parameters,
            "base": self.base,
            "untrained": ed.evaluate(small, self.test, progress=False).accuracy,
            "seconds": round(seconds, 1),
        }
        if epochs:
            start = time.perf_counter()
            row["precision"] = self.given.precision
            row["tuned"] = self.tuned(small, epochs)
            row["training_seconds"] = round(time.perf_counter() - start, 1)
        return row


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    done = set() if given.again else {tuple(r[k] for k in KEYS) for r in known_rows(given.out)}
    for seed in given.seeds:
        harness = Harness(given, seed)
        candidates = harness.candidates()
        for budget in given.budgets:
            for method, make in candidates.items():
                if not any(part in method for part in given.methods):
                    continue
                if (given.network, seed, budget, given.epochs, method) in done:
                    continue
                row = harness.row(method, make, budget, given.epochs)
                if given.epochs and (given.network, seed, budget, 0, method) not in done:
                    yield {key: row[key] for key in row if key not in OF_TRAINING} | {"epochs": 0}
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", help="of the zoo")
    parser.add_argument(
        "--data", required=True, help="CIFAR-10; for demo_network the folder of Fashion-MNIST"
    )
    parser.add_argument("--weights", help="trained weights; demo_network has its own")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=0, help="of training after each")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="of training")
    parser.add_argument("--methods", nargs="+", default=[""], help="only with this in their name")
    parser.add_argument("--again", action="store_true", help="also what has a row")
    here = Path(__file__).parent / "results" / "peers.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()
    for row in rows(given):
        print(row, flush=True)
        head = {"command": COMMAND, "examples": EXAMPLES, "learning_rate": LEARNING_RATE}
        add_row(given.out, head, row, KEYS)


if __name__ == "__main__":
    main()
