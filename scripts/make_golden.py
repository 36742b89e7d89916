"""Extract what the parity tests compare with from the recorded runs of the official code.

python scripts/make_golden.py FOLDER

FOLDER holds vgglike.pt and resnet_small.pt: numbers that the official EigenDamage code computed
for two small networks, tests/parity/README.md says how. Only the paper's own method is taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET = Path(__file__).resolve().parents[1] / "tests" / "parity"
NETWORKS = ("vgglike", "resnet_small")
KINDS = ("emp", "true")
METHOD = "eigendamage_patch"
RATIOS = (0.3, 0.5, 0.7, 0.9)
FACTORS = ("m_aa", "m_gg")
EIGEN = ("d_a", "d_g", "in_imp", "out_imp")  # the last layer has factors only
SOURCE = "alecwangcq/EigenDamage-Pytorch @ 0e2174f (MIT), torch 2.13.0, CPU, float64, one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where vgglike.pt and resnet_small.pt are")
    folder: Path = parser.parse_args().folder
    for network in NETWORKS:
        run = torch.load(folder / f"{network}.pt", weights_only=True)
        target = TARGET / f"golden_{network}.safetensors"
        beside = target.with_suffix(".partial")
        facts = json.dumps(facts_of(run), separators=(",", ":"))
        save_file(tensors_of(run), beside, metadata={"facts": facts})
        beside.replace(target)
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


def tensors_of(run: dict[str, Any]) -> dict[str, Tensor]:
    """The arrays, by names like ``emp/conv1/m_aa`` and ``emp/ratio_0.3/outputs``."""
    found = {
        "inputs": exactly_float32(run["inputs"]),
        "labels": run["labels"],
        "labels_sampled": run["labels_sampled"],
        "outputs_unpruned": run["outputs_unpruned"],
    }
    for name, tensor in run["weights"].items():
        wide = tensor.is_floating_point()
        found[f"weights/{name}"] = exactly_float32(tensor) if wide else tensor
    for kind in KINDS:
        recorded = run[kind][METHOD]
        for name, layer in recorded["layers"].items():
            for what in (*FACTORS, *(e for e in EIGEN if e in layer)):
                found[f"{kind}/{name}/{what}"] = layer[what]
        for ratio in RATIOS:
            for what in ("outputs", "outputs_border_exact"):
                found[f"{kind}/ratio_{ratio}/{what}"] = recorded[f"ratio_{ratio}"][what]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def facts_of(run: dict[str, Any]) -> dict[str, Any]:
    """The numbers and index sets, for the header."""
    batches, rest = divmod(len(run["inputs"]), run["batch_size"])
    if rest:
        raise SystemExit("the batches were not of equal size, which the tests' scaling relies on")
    return {
        "source": SOURCE,
        "batch_size": run["batch_size"],
        "batches": batches,
        "max_ratio": run["prune_ratio_limit"],
        "ratios": {
            kind: {str(r): decisions_of(run[kind][METHOD][f"ratio_{r}"]) for r in RATIOS}
            for kind in KINDS
        },
    }


def decisions_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """What one ratio made of each layer; indices are of eigenvectors by ascending eigenvalue."""
    return {
        "threshold": recorded["threshold"],
        "n_params": recorded["n_params"],
        "layers": {
            name: {
                "kept_out": layer["kept_out"].tolist(),
                "kept_in": layer["kept_in"].tolist(),
                "replaced": layer["replaced"],
            }
            for name, layer in recorded["layers"].items()
        },
    }


def exactly_float32(tensor: Tensor) -> Tensor:
    """The tensor in half the space, if nothing is lost."""
    narrow = tensor.float()
    if not torch.equal(narrow.double(), tensor.double()):
        raise SystemExit("a tensor that should be float32 at heart is not")
    return narrow


if __name__ == "__main__":
    main()
