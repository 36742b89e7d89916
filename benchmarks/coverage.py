"""Which networks are compressed whole: forty of timm and torchvision, each checked five times.

Each network is compressed to 0.6 of its MACs by ``auto``, in a process of its own with a limit of
time. Then: does it run forward, with outputs of the original's shapes; backward, with a gradient
for every parameter; is it within the budget by torch's own counter; is what was saved and loaded
bit for bit the same; does its ONNX file return the same. Rows that are in the results file stay as
they are unless ``--again`` is given. Needs timm and torchvision. Run

    python benchmarks/coverage.py
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from coverage_networks import NETWORKS, Network
from recording import add_row
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eigendamage as ed
from eigendamage.batch import tensors_in
from eigendamage.files import written_beside

BUDGET, IMAGES, SEED = 0.6, 24, 0
TOLERANCE = 1e-4
CHECKS = ("compress", "forward", "backward", "budget", "save", "onnx")
COMPRESS = {"refine": 0, "calibrate": False}
_OPERATORS: list[torch.library.Library] = []


class CheckError(Exception):
    """A check that was not passed; the message says what was found."""


def import_torchvision() -> None:
    """Import torchvision, also where its compiled part does not fit torch.

    Without that part it ends at two operators of box suppression, which no network here calls: it
    is enough that they exist.
    """
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(operators)  # they end with it
        import_module("torchvision")


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(tensors_in(model(x)))


def forward(small: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        found, expected = outputs(small, x), outputs(model, x)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise CheckError(f"outputs of shapes {shapes[0]}, the original's are {shapes[1]}")
    if not all(bool(t.isfinite().all()) for t in found):
        raise CheckError("an output is not finite")


def without_gradient(model: nn.Module, x: Tensor) -> set[str]:
    """Parameters that no finite gradient of the outputs reaches, in eval mode."""
    model.zero_grad(set_to_none=True)
    sum(t.square().mean() for t in outputs(model, x)).backward()
    lost = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.isfinite().all()))
    }
    model.zero_grad(set_to_none=True)
    return lost


def backward(small: nn.Module, model: nn.Module, x: Tensor) -> None:
    lost = without_gradient(small, x) - without_gradient(model, x)
    if lost:
        raise CheckError(f"no finite gradient for {', '.join(sorted(lost)[:3])}")


def flops(model: nn.Module, x: Tensor) -> int:
    """Operations by torch's counter, which knows attention in its plain form alone."""
    # A copy without gradients: the counter fails where a parameter is handed to a module.
    model = copy.deepcopy(model).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def within(small: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Any]:
    before, after = flops(model, x), flops(small, x)
    if after > BUDGET * before:
        raise CheckError(f"torch's counter finds {after / before:.4f} of the operations")
    return {"flops": [before, after]}


def saved(small: ed.Compressed, again: nn.Module, x: Tensor, folder: Path) -> None:
    ed.save(small, folder / "saved")
    loaded = ed.load(again, folder / "saved").eval()
    with torch.no_grad():
        pairs = zip(outputs(small.model, x), outputs(loaded, x), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise CheckError("the loaded model returns something else")
    mine, its = small.model.state_dict(), loaded.state_dict()
    if mine.keys() != its.keys() or not all(torch.equal(mine[k], its[k]) for k in mine):
        raise CheckError("the loaded model has other weights")


def exported(small: nn.Module, model: nn.Module, x: Tensor, folder: Path) -> dict[str, Any]:
    """Export it; where that fails, say whether the original can be exported."""
    try:
        written = ed.export(small, folder / "small.onnx", x, tolerance=TOLERANCE, progress=False)
    except ed.ExportError as error:
        try:
            ed.export(model, folder / "model.onnx", x, tolerance=TOLERANCE, progress=False)
        except ed.ExportError:
            raise CheckError(f"the original cannot be exported either: {error}") from error
        raise
    return {"difference": written.max_difference, "batch": written.batch}


def described(network: Network) -> dict[str, Any]:
    return {
        "network": network.name,
        "kind": network.kind,
        "size": network.size,
        "options": dict(network.options),
    }


def one_row(network: Network) -> dict[str, Any]:
    """Compress one network and check it; every check that is not passed has its reason."""
    row: dict[str, Any] = {**described(network), "failed": {}}
    start = time.perf_counter()

    def check(what: str, does: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        try:
            found = does()
        except Exception as error:  # noqa: BLE001 (any failure is a row of the table)
            traceback.print_exc()
            reason = " ".join(str(error).split())
            known = isinstance(error, ed.EigenDamageError | CheckError)
            row["failed"][what] = reason if known else f"{type(error).__name__}: {reason}"
            return None
        finally:
            row.setdefault("took", {})[what] = round(time.perf_counter() - begun, 1)
            row["seconds"] = round(time.perf_counter() - start, 1)
        if isinstance(found, dict):
            row.update(found)
        return found

    model = network.make(SEED)
    data = network.images(IMAGES, SEED + 1)
    small = check(
        "compress",
        lambda: ed.compress(
            model, data, budget=ed.Budget(macs=BUDGET), seed=SEED, progress=False, **COMPRESS
        ),
    )
    if small is None:
        return row
    kinds = [layer.action.kind for layer in small.plan.layers.values()]
    row["macs"] = list(small.plan.macs)
    row["parameters"] = list(small.plan.parameters)
    row["changed"] = {kind: kinds.count(kind) for kind in sorted(set(kinds) - {"keep"})}
    row["kept"] = kinds.count("keep")
    row["notes"] = list(small.report.notes)
    truth = small.report.truth
    row["divergence"] = None if truth is None else truth.measured
    x = data[0][:2]
    with tempfile.TemporaryDirectory() as folder:
        check("forward", lambda: forward(small.model, model, x))
        check("backward", lambda: backward(small.model, model, x))
        check("budget", lambda: within(small.model, model, x))
        check("save", lambda: saved(small, network.make(SEED + 2), x, Path(folder)))
        check("onnx", lambda: exported(small.model, model, x, Path(folder)))
    return row


def warm() -> None:
    """Import, and let the exporter build, what every process would take seconds for by itself."""
    for name in ("timm", "torch_pruning"):
        import_module(name)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with tempfile.TemporaryDirectory() as folder:
        ed.export(small, Path(folder) / "small.onnx", torch.zeros(2, 3, 8, 8), progress=False)


def in_a_process(network: Network, limit: float) -> dict[str, Any]:
    """`one_row` in a process of its own; a row with the reason where that does not end well."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        # Forked: what takes long to import is there already.
        process = multiprocessing.get_context("fork").Process(target=write_row, args=(network, out))
        process.start()
        process.join(limit)
        reason = f"no result within {limit:g} seconds"
        if process.is_alive():
            process.kill()
            process.join()
        else:
            reason = f"the process ended with {process.exitcode}"
        if out.exists():
            return json.loads(out.read_text(encoding="utf-8"))
    seconds = round(time.perf_counter() - start, 1)
    return {**described(network), "failed": {"compress": reason}, "seconds": seconds}


def write_row(network: Network, out: Path) -> None:
    with written_beside(out) as beside:
        beside.write_text(json.dumps(one_row(network)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent / "results" / "coverage.json"
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--networks", nargs="+", default=["*"], help="shell patterns")
    parser.add_argument("--limit", type=float, default=300, help="seconds a network")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_torchvision()
    warm()
    head = {
        "command": "python benchmarks/coverage.py",
        "seed": SEED,
        "networks": len(NETWORKS),
        "budget": BUDGET,
        "images": IMAGES,
        "tolerance": TOLERANCE,
        "compress": COMPRESS,
    }
    libraries = {name: version(name) for name in ("timm", "torchvision", "onnxruntime")}
    there = options.out.exists()
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if there else []
    done = {row["network"] for row in rows}
    wanted = [n for p in options.networks for n in NETWORKS if fnmatchcase(n.name, p)]
    for network in wanted:
        if network.name in done and not options.again:
            continue
        row = in_a_process(network, options.limit)
        failed = "; ".join(f"{k}: {v}" for k, v in row["failed"].items())
        print(f"{network.name}: {row['seconds']} s, {failed or 'passed'}", flush=True)
        add_row(options.out, head, {**row, "libraries": libraries}, ("network",))


if __name__ == "__main__":
    main()
