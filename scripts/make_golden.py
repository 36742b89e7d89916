"""Extract what the parity tests compare with from the recorded runs of the official code.

python scripts/make_golden.py FOLDER

FOLDER holds vgglike.pt and resnet_small.pt: numbers that the official EigenDamage code computed
for two small networks, tests/parity/README.md says how. Taken are the paper's own method and its
four baselines that remove whole channels; of what these share, one copy.
"""

from __future__ import annotations

import argparse
import itertools
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
CHANNEL_METHODS = ("c_obd", "c_obs", "kron_obd", "kron_obs")
SURGERY = {"weight_post_surgery": "weight", "bias_post_surgery": "bias"}
JOINT = "CORRECTED_joint_Wb"  # not official: the optimum for the rows that stay
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
        for method in CHANNEL_METHODS:
            found |= channel_tensors_of(run[kind], kind, method)
    check_shared(run)
    for name, layer in run["emp"]["c_obs"]["layers"].items():
        found[f"full/{name}/m_aa"] = layer["m_aa"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def channel_tensors_of(run: dict[str, Any], kind: str, method: str) -> dict[str, Tensor]:
    """A baseline's arrays, by names like ``emp/c_obs/conv1/out_imp``.

    Of the weights after surgery, the rows that stay, in the layers that lose some.
    """
    found: dict[str, Tensor] = {}
    for name, layer in run[method]["layers"].items():
        for what in ("out_imp", "CORRECTED_out_imp", "fisher_sum"):
            if what in layer:
                found[f"{kind}/{method}/{name}/{what}"] = layer[what]
    for ratio in RATIOS:
        recorded, prefix = run[method][f"ratio_{ratio}"], f"{kind}/{method}/ratio_{ratio}"
        found[f"{prefix}/outputs"] = recorded["outputs"]
        for name, layer in recorded["layers"].items():
            for what, parameter in SURGERY.items():
                if what in layer and len(layer["kept_out"]) < len(layer[what]):
                    found[f"{prefix}/{name}/{parameter}"] = layer[what][layer["kept_out"]]
            if JOINT in layer:
                found[f"{prefix}/{name}/{JOINT}"] = layer[JOINT][layer["kept_out"]]
    return found


def check_shared(run: dict[str, Any]) -> None:
    """That one copy will do: of A over patches, of m_gg, and of layers that lose no filter.

    Kron-OBD went over all examples in one batch, so its sums are smaller by the number of batches.
    """
    batches = len(run["inputs"]) // run["batch_size"]
    for kind in KINDS:
        for method in ("c_obs", "kron_obd", "kron_obs"):
            times = batches if method == "kron_obd" else 1
            for name, layer in run[kind][method]["layers"].items():
                shared = {
                    "m_aa": run["emp"]["c_obs"]["layers"][name]["m_aa"],
                    "m_gg": run[kind][METHOD]["layers"][name]["m_gg"],
                }
                for what, kept in shared.items():
                    if float((times * layer[what] - kept).abs().max() / kept.abs().max()) > 1e-13:
                        raise SystemExit(f"{kind}, {method}, {name}: {what} is another one")
        for method, ratio in itertools.product(("c_obs", "kron_obs"), RATIOS):
            for name, layer in run[kind][method][f"ratio_{ratio}"]["layers"].items():
                for what, parameter in SURGERY.items():
                    if what in layer and len(layer["kept_out"]) == len(layer[what]):
                        before = run["weights"][f"{name}.{parameter}"].double()
                        if not torch.equal(layer[what].double(), before):
                            raise SystemExit(f"{kind}, {method}, {ratio}, {name}: changed")


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
        "channels": {
            kind: {
                method: {
                    str(r): channel_decisions_of(run[kind][method][f"ratio_{r}"]) for r in RATIOS
                }
                for method in CHANNEL_METHODS
            }
            for kind in KINDS
        },
    }


def channel_decisions_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a baseline kept at one ratio: output channels by layer."""
    return {
        "threshold": recorded["threshold"],
        "n_params": recorded["n_params"],
        "kept": {
            name: layer["kept_out"].tolist()
            for name, layer in recorded["layers"].items()
            if "kept_out" in layer
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
