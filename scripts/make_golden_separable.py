"""Extract what the parity test of the depthwise separable variant compares with.

python scripts/make_golden_separable.py FOLDER

FOLDER holds vgglike_separable.pt: what the official EigenDamage code, with two fixes without which
its separable variant does not run, made of the network of golden_vgglike.safetensors. A CP is not
unique, so the factors that it found are taken, for the test to build the layers from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET = Path(__file__).resolve().parents[1] / "tests/parity/golden_vgglike_separable.safetensors"
RUNS = ("emp_ratio_0.5", "emp_ratio_0.7", "true_ratio_0.5", "true_ratio_0.7")
FACTORS = ("W_star", "U", "S", "V")
SOURCE = (
    "alecwangcq/EigenDamage-Pytorch @ 0e2174f (MIT), with two fixes, torch 2.13.0, CPU, float64"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where vgglike_separable.pt is")
    runs = torch.load(parser.parse_args().folder / "vgglike_separable.pt", weights_only=True)
    beside = TARGET.with_suffix(".partial")
    facts = json.dumps(facts_of(runs), separators=(",", ":"))
    save_file(tensors_of(runs), beside, metadata={"facts": facts})
    beside.replace(TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.0f} kB")


def tensors_of(runs: dict[str, Any]) -> dict[str, Tensor]:
    """The arrays, by names like ``emp_ratio_0.5/outputs`` and ``emp_ratio_0.5/feature.4/U``."""
    found: dict[str, Tensor] = {}
    for run in RUNS:
        found[f"{run}/outputs"] = runs[run]["outputs"]
        for layer, cp in runs[run]["cp"].items():
            found.update({f"{run}/{layer}/{what}": cp[what] for what in FACTORS})
    return {name: tensor.contiguous() for name, tensor in found.items()}


def facts_of(runs: dict[str, Any]) -> dict[str, Any]:
    """The numbers, for the header: replaced layers, parameters, the CPs' relative errors."""
    return {
        "source": SOURCE,
        "runs": {
            run: {
                "replaced": runs[run]["replaced"],
                "n_params": runs[run]["n_params"],
                "errors": {layer: cp["rel_err"] for layer, cp in runs[run]["cp"].items()},
            }
            for run in RUNS
        },
    }


if __name__ == "__main__":
    main()
