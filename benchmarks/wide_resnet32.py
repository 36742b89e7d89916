"""The paper's headline: a wide network to 10 times fewer parameters and 8 times fewer MACs.

A network is trained from scratch on CIFAR-10. Then, each in rounds with the same fine-tuning:
`auto`; Torch-Pruning's GroupTaylor; the official rule (EigenDamage with Λ_S Λ_A and three stages);
and EigenDamage as this library does it. The last epoch counts everywhere; the test split is only
measured on.

    python benchmarks/wide_resnet32.py --data CIFAR10.zip --work FOLDER

Everything goes on from ``--work`` where it was stopped, so on a machine that is lent for minutes
run it as ``timeout 480 python …`` again and again. It trains in bfloat16 (``--precision no`` where
a processor has none), channels_last; on a GPU with the images there. ``--network resnet20x2`` is
for a CPU: a ResNet-20 of twice the usual width.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from competitors import (
    Gradients,
    closest,
    shortcut_macs,
    shortcut_parameters,
    torch_pruned,
    with_convolved_shortcuts,
)
from recording import add_row, known_rows
from safetensors.torch import load_file, save_file
from torch import nn

import eigendamage as ed
from eigendamage import zoo

EXAMPLES = 2000
TRAINING = ("train_epochs", "train_rate", "images", "precision")
TUNING = ("rounds", "epochs", "last_epochs", "rate")
KEYS = ("network", "seed", *TRAINING, *TUNING, "method")
COMMAND = "python benchmarks/wide_resnet32.py --network NETWORK --data CIFAR10.zip --work FOLDER"


@dataclass(frozen=True)
class Goal:
    """A network, and the fractions of it to leave."""

    make: Callable[[], nn.Module]
    macs: float
    params: float


GOALS = {
    "wide_resnet32": Goal(zoo.wide_resnet32, 1 / 8, 1 / 10),
    "vgg19": Goal(zoo.vgg19, 1 / 8.8, 1.0),
    "resnet20x2": Goal(partial(zoo.resnet20, width=32), 1 / 8, 1 / 10),
}


class Run:
    """One network with its data and what has been done of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.goal = given, GOALS[given.network]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base_work = given.work / "-".join(self.settings("network", "seed", *TRAINING))
        self.work = self.base_work / "-".join(self.settings(*TUNING))
        self.work.mkdir(parents=True, exist_ok=True)
        self.train = self.images("train", given.images)
        self.test = self.images("test", None).batches(250)
        few = self.train.take(slice(0, EXAMPLES))
        self.labelled = few.batches(125)
        self.unlabeled = zoo.ImageSet(few.images).batches(125)
        self.example = few.images[:1]

    def settings(self, *keys: str) -> list[str]:
        return [str(vars(self.given)[key]) for key in keys]

    def images(self, split: str, limit: int | None) -> zoo.ImageSet:
        found = zoo.load_images(self.given.data, split, limit=limit, seed=self.given.seed)
        pixels = found.images.to(self.device, memory_format=torch.channels_last)
        return zoo.ImageSet(pixels, None if found.labels is None else found.labels.to(self.device))

    def config(self, epochs: int, rate: float) -> ed.FinetuneConfig:
        return ed.FinetuneConfig(
            epochs=epochs,
            learning_rate=rate,
            held_out=0.0,
            precision=self.given.precision,
            seed=self.given.seed,
        )

    def batches(self) -> zoo.ImageBatches:
        return self.train.batches(128, shuffle_seed=self.given.seed, augment=True)

    def tuned(
        self, model: nn.Module, epochs: int, rate: float, name: str, original: nn.Module | None
    ) -> None:
        """Train in place, from its checkpoint if there is one."""
        ed.finetune(
            model,
            self.batches(),
            self.config(epochs, rate),
            original=original,
            checkpoint=self.work / f"{name}.checkpoint",
        )

    def accuracy(self, model: nn.Module) -> float | None:
        return ed.evaluate(model, self.test, progress=False).accuracy

    def base(self) -> nn.Module:
        """The network trained from scratch."""
        torch.manual_seed(self.given.seed)
        model = self.goal.make().to(self.device, memory_format=torch.channels_last)
        kept = self.base_work / "base.safetensors"
        if not kept.exists():
            self.tuned(model, self.given.train_epochs, self.given.train_rate, "base", None)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, kept)
        model.load_state_dict(load_file(kept, device=str(self.device)))
        return model.eval()

    def ours(self, model: nn.Module, **options: Any) -> nn.Module:
        name = "-".join(str(value) for value in options.values())
        small = ed.compress(
            model,
            self.unlabeled,
            budget=ed.Budget(macs=self.goal.macs, params=self.goal.params),
            rounds=self.given.rounds,
            epochs=self.given.epochs,
            train_data=self.batches(),
            finetuning=self.config(self.given.epochs, self.given.rate),
            eval_data=self.labelled,
            directory=self.work / name,
            seed=self.given.seed,
            **options,
        ).model
        return self.finished(small, model, name)

    def torch_pruning(self, model: nn.Module) -> nn.Module:
        """GroupTaylor over all channels at once, in as many steps, geometrically as ours."""
        whole = ed.count(model, self.example)
        small = with_convolved_shortcuts(model)
        for done in range(1, self.given.rounds + 1):
            share = done / self.given.rounds
            kept = self.work / f"torch-pruning-{done}.safetensors"
            if not kept.exists():
                known = Gradients(small, self.labelled)
                make = partial(
                    torch_pruned, small, self.example, lambda k=known: k, "GroupTaylor", "global"
                )

                def left(cut: nn.Module, share: float = share) -> float:
                    counted = ed.count(cut, self.example)
                    macs = counted.macs - shortcut_macs(cut, self.example)
                    params = counted.parameters - shortcut_parameters(cut)
                    return max(
                        macs / whole.macs / self.goal.macs**share,
                        params / whole.parameters / self.goal.params**share,
                    )

                small = closest(make, left)
                ed.recalibrate_batchnorm(small, self.unlabeled, progress=False)
                name = f"torch-pruning-{done}"
                self.tuned(small, self.given.epochs, self.given.rate, name, model)
                save_file({k: v.contiguous() for k, v in small.state_dict().items()}, kept)
            small = resized(small, load_file(kept, device=str(self.device)))
        return self.finished(small, model, "torch-pruning")

    def finished(self, small: nn.Module, model: nn.Module, name: str) -> nn.Module:
        """The last fine-tuning, the same for all."""
        self.tuned(small, self.given.last_epochs, self.given.rate, f"{name}-last", model)
        return small

    def row(self, method: str, small: nn.Module, base: float | None, start: float) -> None:
        counted = ed.count(small, self.example)
        whole = ed.count(self.goal.make().to(self.device), self.example)
        row = {
            "network": self.given.network,
            "seed": self.given.seed,
            "method": method,
            "macs": (counted.macs - shortcut_macs(small, self.example)) / whole.macs,
            "parameters": (counted.parameters - shortcut_parameters(small)) / whole.parameters,
            "base": base,
            "accuracy": self.accuracy(small),
            **{key: vars(self.given)[key] for key in (*TRAINING, *TUNING)},
            "device": str(self.device),
            "seconds_since_the_last_start": round(time.perf_counter() - start, 1),
        }
        print(row, flush=True)
        add_row(self.given.out, {"command": COMMAND, "examples": EXAMPLES}, row, KEYS)


def resized(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """A copy with the weights of a state dict, which may be of fewer channels."""
    small = copy.deepcopy(model)
    for name, module in small.named_modules():
        own = [*module._parameters, *module._buffers]
        for key in own:
            value = state.get(f"{name}.{key}" if name else key)
            if value is None:
                continue
            old = getattr(module, key)
            trained = isinstance(old, nn.Parameter) and old.requires_grad
            new = nn.Parameter(value, trained) if key in module._parameters else value
            setattr(module, key, new)
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(GOALS), default="wide_resnet32")
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder, zip or npz")
    parser.add_argument("--work", type=Path, required=True, help="folder to go on from")
    parser.add_argument("--train-epochs", type=int, default=60, help="from scratch")
    parser.add_argument("--train-rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="after each round")
    parser.add_argument("--last-epochs", type=int, default=20, help="in the end")
    parser.add_argument("--rate", type=float, default=0.02, help="of fine-tuning")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="of training")
    parser.add_argument("--images", type=int, default=50_000, help="of training, at most")
    parser.add_argument("--seed", type=int, default=0)
    here = Path(__file__).parent / "results" / "wide_resnet32.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()

    run = Run(given)
    model = run.base()
    base = run.accuracy(model)
    print(f"{given.network}, trained from scratch: {base}", flush=True)
    ways: dict[str, Callable[[], nn.Module]] = {
        "auto": lambda: run.ours(model, method="auto"),
        "Torch-Pruning GroupTaylor": lambda: run.torch_pruning(model),
        "eigendamage, the official rule": lambda: run.ours(
            model, method="eigendamage", eigenvalues="kfac", form="three"
        ),
        "eigendamage": lambda: run.ours(model, method="eigendamage"),
    }
    done = {tuple(row[key] for key in KEYS) for row in known_rows(given.out)}
    for method, make in ways.items():
        if tuple({**vars(given), "method": method}[key] for key in KEYS) in done:
            continue
        start = time.perf_counter()
        run.row(method, make(), base, start)


if __name__ == "__main__":
    main()
