"""The same seed on the same machine: the same plan and weights, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import eigendamage as ed

WAYS: dict[str, dict[str, object]] = {
    "auto, polished": {"polish": 1, "refine": 2},
    "rounds of random": {"method": "random", "rounds": 2, "epochs": 1},
}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 3),
    ).eval()


def digests(seed: int = 5) -> dict[str, str]:
    """Of each way's plans and weights."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(6, 2, 6, 6, generator=generator), torch.arange(6) % 3) for _ in range(5)
    ]
    found: dict[str, str] = {}
    for name, options in WAYS.items():
        torch.manual_seed(len(found) + os.getpid())  # what the caller drew before is no input
        result = ed.compress(
            network(), batches, budget=ed.Budget(macs=0.6), seed=seed, progress=False, **options
        )
        content = hashlib.sha256()
        for plan in (*result.earlier, result.plan):
            content.update(plan.model_dump_json().encode())
        for key, tensor in result.model.state_dict().items():
            content.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.numpy().tobytes())
        found[name] = content.hexdigest()
    return found


def test_two_processes_make_the_same_bits_and_another_seed_makes_others() -> None:
    """The other process also hashes strings otherwise, and so has sets in another order."""
    here = digests()
    program = f"import json; from {__name__} import digests; print(json.dumps(digests()))"
    root = Path(__file__).parents[2]
    there = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "123"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(there.stdout.splitlines()[-1]) == here
    other = digests(seed=6)
    assert all(other[name] != here[name] for name in WAYS)


def test_the_report_says_what_else_the_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = ed.compress(
        network(),
        [torch.randn(8, 2, 6, 6)],
        budget=ed.Budget(macs=0.6),
        method="magnitude",
        seed=4,
        progress=False,
    ).report.environment
    assert environment.seed == 4
    assert environment.threads == torch.get_num_threads()
    assert environment.torch == torch.__version__
    assert environment.processes == 1
    assert environment.kernels == torch.backends.cpu.get_cpu_capability()
    assert environment.processor
