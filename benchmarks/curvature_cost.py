"""What the curvature costs, in time and memory, against a plain forward and backward pass.

Run ``python benchmarks/curvature_cost.py`` with the ``benchmark`` extra installed; packages that are
missing are skipped with a note. On a machine that others use, set ``OMP_WAIT_POLICY=passive``.

Time: every variant goes over the same images once a round, in an order drawn anew each round; its
ratio is to the plain pass of the same round. Memory: the peak resident size of a fresh process over
its size after a small forward pass, for one batch gone through three times.

Not all do the same work: the input factor A is over channels here (i × i), over whole patches in
curvlinops and kronfluence (iK × iK), which also compute weight gradients or keep patches for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from eigendamage import zoo
from eigendamage.curvature import estimate_curvature

BATCH, SIZE, CLASSES, FEW = 128, 32, 10, 16
BARS = {"ours: S and A": 1.5, "ours: λ": 2.5, "memory less factors": 1.5}
PACKAGES = ("torch", "eigendamage", "curvlinops-for-pytorch", "kronfluence")
MEMORY_RUNS, MEMORY_PASSES = 3, 3

Images = list[tuple[Tensor, Tensor]]
Run = Callable[[], Any]
"""One pass over the images; returns whatever holds the factors."""


def base(model: nn.Module, images: Images, few: Images) -> Run:
    def run() -> None:
        model.train()
        for x, y in images:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()

    return run


def ours_factors(model: nn.Module, images: Images, few: Images) -> Run:
    return lambda: estimate_curvature(model, images, eigenvalues="kfac", progress=False)


def ours_fixed_part(model: nn.Module, images: Images, few: Images) -> Run:
    return ours_factors(model, [(x[:2], y[:2]) for x, y in few], few)


def ours_eigenvalues(model: nn.Module, images: Images, few: Images) -> Run:
    basis = estimate_curvature(model, few, eigenvalues="kfac", progress=False)

    def run() -> Any:
        found = estimate_curvature(model, images, basis=basis, progress=False)
        return [layer.eigenvalues for layer in found.values()]  # the rest is the basis given

    return run


def curvlinops_arguments(model: nn.Module, images: Images) -> dict[str, Any]:
    """What spares it every pass but the one wanted."""
    layers = [m for m in model.eval().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {
        "model_func": model,
        "loss_func": nn.CrossEntropyLoss(),
        "params": [layer.weight for layer in layers],
        "data": images,
        "fisher_type": "mc",
        "kfac_approx": "expand",
        "check_deterministic": False,
        "num_per_example_loss_terms": 1,
        "num_data": sum(len(x) for x, _ in images),
    }


def curvlinops_factors(model: nn.Module, images: Images, few: Images) -> Run:
    from curvlinops import KFACLinearOperator

    def run() -> Any:
        operator = KFACLinearOperator(**curvlinops_arguments(model, images))
        operator.compute_kronecker_factors()
        return operator.state_dict()["input_covariances"], operator.state_dict()[
            "gradient_covariances"
        ]

    return run


def curvlinops_eigenvalues(model: nn.Module, images: Images, few: Images) -> Run:
    from curvlinops import EKFACLinearOperator

    data = list(few)
    operator = EKFACLinearOperator(**curvlinops_arguments(model, data))
    operator.compute_eigenvalue_correction()
    data[:] = images  # the eigenbasis is there: from now on only λ is summed

    def run() -> Any:
        operator.compute_eigenvalue_correction()
        return operator.state_dict()["corrected_eigenvalues"]

    return run


def kronfluence_arguments(model: nn.Module) -> dict[str, Any]:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            if sample:
                y = logits.detach().softmax(1).multinomial(1).flatten()
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    return {
        "model": prepare_model(model, task),
        "state": State(cpu=True),
        "task": task,
        "factor_args": FactorArguments(strategy="ekfac"),
        "disable_tqdm": True,
    }


def kronfluence_factors(model: nn.Module, images: Images, few: Images) -> Run:
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

    arguments = kronfluence_arguments(model)
    return lambda: fit_covariance_matrices_with_loader(loader=images, **arguments)


def kronfluence_eigenvalues(model: nn.Module, images: Images, few: Images) -> Run:
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

    arguments = kronfluence_arguments(model)
    _, factors = fit_covariance_matrices_with_loader(loader=few, **arguments)
    others = {k: v for k, v in arguments.items() if k != "task"}
    basis = perform_eigendecomposition(factors, **others)
    return lambda: fit_lambda_matrices_with_loader(loader=images, eigen_factors=basis, **arguments)


VARIANTS: dict[str, Callable[[nn.Module, Images, Images], Run]] = {
    "base": base,
    "ours: S and A": ours_factors,
    "ours: S and A of 2 images (the fixed part)": ours_fixed_part,
    "ours: λ": ours_eigenvalues,
    "curvlinops: K-FAC": curvlinops_factors,
    "curvlinops: λ": curvlinops_eigenvalues,
    "kronfluence: K-FAC": kronfluence_factors,
    "kronfluence: λ": kronfluence_eigenvalues,
}


def prepare(variant: str, network: str, batches: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model = getattr(zoo, network)(CLASSES)
    shape = (BATCH, 3, SIZE, SIZE)
    images = [(torch.randn(shape), torch.randint(CLASSES, (BATCH,))) for _ in range(batches)]
    few = [(images[0][0][:FEW], images[0][1][:FEW])]
    with torch.no_grad():
        model.eval()(few[0][0])
    return VARIANTS[variant](model, images, few)


def timed(network: str, variants: Iterable[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and seconds of processor time, of every variant in interleaved rounds."""
    runs = {v: prepare(v, network, options.batches, options.seed) for v in variants}
    found = {v: {"seconds": list[float](), "cpu_seconds": list[float]()} for v in runs}
    order = random.Random(options.seed)
    for index in range(options.rounds + 1):
        for variant in order.sample(list(runs), len(runs)):
            wall, cpu = time.perf_counter(), time.process_time()
            runs[variant]()
            if index:  # the first round warms up
                found[variant]["seconds"].append(time.perf_counter() - wall)
                found[variant]["cpu_seconds"].append(time.process_time() - cpu)
        print(f"{network}: round {index} of {options.rounds}", file=sys.stderr)
    return {
        v: {**times, "ratio": ratio(times, found["base"], "seconds")}
        | {"cpu_ratio": ratio(times, found["base"], "cpu_seconds")}
        for v, times in found.items()
    }


def ratio(
    times: Mapping[str, list[float]], to: Mapping[str, list[float]], key: str
) -> dict[str, float]:
    each = sorted(a / b for a, b in zip(times[key], to[key], strict=True))
    best = min(times[key]) / min(to[key])
    return {"median": statistics.median(each), "min": each[0], "max": each[-1], "of_minima": best}


def held_bytes(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, Mapping):
        return sum(held_bytes(x) for x in item.values())
    if isinstance(item, list | tuple):
        return sum(held_bytes(x) for x in item)
    return held_bytes(vars(item)) if hasattr(item, "__dict__") else 0


def peak_bytes() -> int:
    """Highest resident size: of this program alone on Linux, where getrusage inherits a parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_here(variant: str, network: str, seed: int) -> dict[str, int]:
    run = prepare(variant, network, 1, seed)
    before = peak_bytes()
    held = [held_bytes(run()) for _ in range(MEMORY_PASSES)]
    return {"extra": peak_bytes() - before, "factors": held[-1]}


def memory(variant: str, network: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", variant, "--networks", network]
    runs: list[dict[str, int]] = []
    for _ in range(MEMORY_RUNS):
        done = subprocess.run(
            [*command, "--seed", str(seed)], stdout=subprocess.PIPE, check=True, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    extra = [r["extra"] for r in runs]
    return {"extra": int(statistics.median(extra)), "each": extra, "factors": runs[0]["factors"]}


if __name__ == "__main__":
    for v in VARIANTS:
        print(v, memory_here(v, "resnet20", 0)) if v == sys.argv[1] else 0
