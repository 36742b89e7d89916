"""Original models by name, and a program that loads what was saved of them, for a new process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import eigendamage as ed
from tests.cases import CASES
from tests.networks import NETWORKS
from tests.transformer_networks import Fused, transformer

EXPECTED = "expected.safetensors"


def fresh(name: str) -> nn.Module:
    """The original model of that name, the same every time."""
    if name in CASES:
        return CASES[name].model()
    if name in NETWORKS:
        torch.manual_seed(0)
        return NETWORKS[name].build().double().eval()
    return transformer(Fused("by kind", counted=True))


def main(root: Path) -> None:
    """Load each folder, named MODEL/METHOD, and compare with the file beside it.

    Raises:
        SystemExit: naming the first folder of which anything differs.
    """
    torch.set_num_threads(1)
    count = 0
    for expected in sorted(root.glob(f"*/*/{EXPECTED}")):
        tensors = load_file(expected)
        model = ed.load(fresh(expected.parents[1].name), expected.parent)
        x, y = tensors.pop("input").clone(), tensors.pop("output")  # aligned as it was
        found = model.state_dict()
        if set(found) != set(tensors):
            raise SystemExit(f"{expected.parent}: other names")
        for name, value in found.items():
            if not torch.equal(value, tensors[name]) or value.dtype != tensors[name].dtype:
                raise SystemExit(f"{expected.parent}: {name} differs")
        # Libraries of linear algebra may round otherwise in another process, by a bit or two.
        if not torch.allclose(model(x), y, rtol=0, atol=1e-13):
            raise SystemExit(f"{expected.parent}: outputs differ by {(model(x) - y).abs().max()}")
        count += 1
    print(count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
