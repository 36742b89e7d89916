"""Accuracy against measured milliseconds: ours by MACs and by latency, beside others.

The candidates of one network are made first and then timed together, taking turns, in every way of
running them: eager, channels_last, torch.compile and onnxruntime, at batches of 1 and 64. Batch
norm's statistics are measured again for all but the repaired ones. Accuracy is
that on the test split. Torch-Pruning's shortcuts are timed as choices of channels, not as the
convolutions that stand for them while it prunes. Both are asked for widths of any number and for
multiples of 8; plain Tucker-2 is there too, with ranks of any number. With ``--epochs`` those that
``--train`` names are then fine-tuned as in peers.py, whose result is taken where it has trained the
same candidate. On a machine that does nothing else from when the script says so until it says that
the times are taken, run

    python benchmarks/latency_peers.py
    python benchmarks/latency_peers.py --network NETWORK --data DATA --weights WEIGHTS

Rows of other networks in the results file stay.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import onnxruntime
import torch
from competitors import competitors
from recording import add_row, known_rows, record
from torch import Tensor, nn
from tuning import fine_tune

import eigendamage as ed
from eigendamage import zoo
from eigendamage.measure._timing import samples_of

EXAMPLES = 2000
OTHERS = ("Torch-Pruning GroupTaylor, global", "Torch-Pruning GroupTaylor, inner")
LOW_RANK = "Tucker-2"  # whose ranks are not asked for in multiples
COMMAND = "python benchmarks/latency_peers.py --network NETWORK --data DATA --weights WEIGHTS"
ROUNDS = 31
KEYS = ("network", "seed", "candidate")
TRAINING_THREADS = 1  # what one run of peers.py has, and small networks hardly use more
SAMPLE = 5e-3
"""Seconds. Long enough that threads which the one before left spinning have gone to sleep."""


def images(given: argparse.Namespace, split: str, limit: int | None) -> zoo.ImageSet:
    if given.network == "demo_network":
        return zoo.fashion_mnist(split).take(slice(0, limit))
    return zoo.load_images(given.data, split, limit=limit, seed=0)


def candidates(given: argparse.Namespace, model: nn.Module) -> dict[str, nn.Module | str]:
    """By name the networks, or why one could not be made."""
    few = images(given, "train", EXAMPLES)
    unlabeled = zoo.ImageSet(few.images).batches(125)
    example = few.images[:1]
    curvature = ed.estimate_curvature(
        model, unlabeled, also=("patches", "gradients", "channels"), progress=False
    )
    others = competitors(model, example, few.batches(125), curvature)
    found: dict[str, nn.Module | str] = {"original": copy.deepcopy(model)}

    def ours(name: str, budget: ed.Budget, **options: Any) -> nn.Module | str:
        print(f"making {name}", flush=True)
        try:
            return ed.compress(
                model,
                unlabeled,
                budget=budget,
                eval_data=few.take(slice(0, 50)).batches(50),
                progress=False,
                **options,
            ).model
        except ed.BudgetError as error:
            return str(error)

    for budget, multiple in product(given.budgets, (1, 8)):
        end = f"{', multiples of 8' if multiple == 8 else ''}, macs {budget:g}"
        macs = ed.Budget(macs=budget)
        found[f"auto{end}"] = ours(f"auto{end}", macs, multiple=multiple)
        if multiple == 1:
            name = f"auto, channels alone{end}"
            found[name] = ours(name, macs, actions=("channels",))
        options: dict[str, Any] = {} if multiple == 1 else {"multiple": multiple}
        for name in OTHERS if options else (*OTHERS, LOW_RANK):
            print(f"making {name}{end}", flush=True)
            try:
                small = others[name](budget, **options)
            except ValueError as error:
                found[f"{name}{end}"] = str(error)
                continue
            ed.recalibrate_batchnorm(small, unlabeled, progress=False)
            found[f"{name}{end}"] = small
    # The last, as they are measured while they are made.
    print("from here on nothing else should run", flush=True)
    torch.set_num_threads(given.threads)
    for budget, batch in product(given.latencies, (1, 64)):
        name = f"auto, latency {budget:g} at batch {batch}"
        found[name] = ours(name, ed.Budget(latency=budget), latency_batch=batch)
    return found


def session(model: nn.Module, x: Tensor, folder: str, number: int) -> Callable[[], object]:
    """One call of onnxruntime, with as many threads as torch has."""
    path = Path(folder) / f"{number}-{len(x)}.onnx"
    ed.export(model, path, format="onnx", example=x, progress=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Each session has threads of its own; those of the others must not wait at full speed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs: dict[str, np.ndarray] = {run.get_inputs()[0].name: x.numpy()}
    return partial(run.run, None, inputs)


def compiled(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One call of torch.compile.

    What was compiled is kept by code object, and all that is kept for one is tried in turn at every
    call: so each model gets a code object of its own.
    """

    def call() -> object:
        return model(x)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own)


def calls(models: list[nn.Module], x: Tensor, way: str, folder: str) -> list[Callable[[], object]]:
    if way == "onnxruntime":
        return [session(model, x, folder, number) for number, model in enumerate(models)]
    if way == "channels_last":
        models = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in models]
        x = x.contiguous(memory_format=torch.channels_last)
    if way == "torch.compile":
        return [compiled(copy.deepcopy(model), x) for model in models]
    return [partial(model, x) for model in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="demo_network", help="of the zoo, or resnet20x2")
    parser.add_argument("--data", help="CIFAR-10; the bundled images for demo_network")
    parser.add_argument("--weights", help="of resnet20x2 those that wide_resnet32.py trains")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.35], help="MACs")
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of timings")
    parser.add_argument("--epochs", type=int, default=0, help="of training after the timing")
    parser.add_argument("--train", nargs="+", default=[""], help="only with this in their name")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="of training")
    here = Path(__file__).parent / "results" / "latency_peers.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()

    wide = given.network == "resnet20x2"
    model = (zoo.resnet20(width=32) if wide else zoo.get(given.network)()).eval()
    if given.weights is not None:
        zoo.load_weights(model, given.weights)
    test = images(given, "test", None)
    whole = ed.count(model, test.images[:1]).macs
    made = candidates(given, model)
    models = {name: m.eval() for name, m in made.items() if isinstance(m, nn.Module)}
    times: dict[str, dict[str, float]] = {name: {} for name in models}
    spreads: dict[str, dict[str, float]] = {name: {} for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("eager", "channels_last", "torch.compile", "onnxruntime"):
            for batch in (1, 64):
                x = test.images[:batch].clone()
                print(f"preparing {way}, {batch}", flush=True)
                each = calls(list(models.values()), x, way, folder)
                with torch.no_grad():
                    for call in each:
                        call()
                print(f"timing {way}, {batch}", flush=True)
                samples = samples_of(each, torch.device("cpu"), ROUNDS, min_seconds=SAMPLE)
                low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75), axis=0)
                for number, name in enumerate(models):
                    times[name][f"{way}, {batch}"] = float(middle[number])
                    spreads[name][f"{way}, {batch}"] = float(high[number] - low[number])
    print("the times are taken", flush=True)
    head = {"command": COMMAND, "rounds": ROUNDS, "examples": EXAMPLES}
    others = [row for row in known_rows(given.out) if row["network"] != given.network]
    record(given.out, {**head, "rows": others})  # rows of two runs did not take turns
    for name, small in made.items():
        row: dict[str, Any] = {"network": given.network, "seed": 0, "candidate": name}
        if isinstance(small, str):
            row["refused"] = small
        else:
            row["macs"] = ed.count(small, test.images[:1]).macs / whole
            row["accuracy"] = ed.evaluate(small, test.batches(200), progress=False).accuracy
            row["milliseconds"] = times[name]
            row["interquartile_milliseconds"] = spreads[name]
        print(row, flush=True)
        add_row(given.out, head, row, KEYS)
    if given.epochs:
        train(given, model, models, head)


def train(
    given: argparse.Namespace, original: nn.Module, models: dict[str, nn.Module], head: Any
) -> None:
    """Add to rows what the networks are at after training."""
    torch.set_num_threads(TRAINING_THREADS)
    training = {
        "network": given.network,
        "seed": 0,
        "epochs": given.epochs,
        "precision": given.precision,
    }
    peers = {
        (_of_peers(row["method"], row["budget"]), row["untrained"]): row["tuned"]
        for row in known_rows(Path(__file__).parent / "results" / "peers.json")
        if training.items() <= row.items()
    }
    everything = images(given, "train", None)
    test = images(given, "test", None).batches(200)
    for name, small in models.items():
        rows = known_rows(given.out)
        (row,) = (r for r in rows if (r["network"], r["candidate"]) == (given.network, name))
        tuned = peers.get((name, row["accuracy"]))  # of the very same network
        if tuned is None and name != "original" and any(part in name for part in given.train):
            small.to(memory_format=torch.channels_last)
            fine_tune(small, original, everything, epochs=given.epochs, precision=given.precision)
            tuned = ed.evaluate(small, test, progress=False).accuracy
        if tuned is None:
            continue
        print(f"{name}, trained: {tuned}", flush=True)
        row.update(epochs=given.epochs, tuned=tuned)
        record(given.out, {**head, "rows": rows})


def _of_peers(method: str, budget: float) -> str:
    """What a method of peers.py at a budget is called here."""
    name = method.replace("ours, channels", "auto, channels").replace("ours, auto", "auto")
    return f"{name}, macs {budget:g}"


if __name__ == "__main__":
    main()
