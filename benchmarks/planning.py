"""How long planning takes for all layers of a ResNet-50, from random curvature.

The 53 convolutions of ResNet-50 (He et al. 2015) at 224 x 224, with random weights and random
factors: neither a model nor data is run. The classifier is kept, as it always is. The first plan
includes the menus and refined bases; the later ones are made from the same menus. Run

    python benchmarks/planning.py
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from recording import machine, record, versions
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.curvature import Curvature, LayerCurvature
from eigendamage.layers import find_layers

EXAMPLES = 2000
BUDGETS = (
    ed.Budget(macs=0.5),
    ed.Budget(macs=0.35),
    ed.Budget(params=0.5),
    ed.Budget(macs=0.5, params=0.5),
)


@dataclass(frozen=True)
class Conv:
    """A convolution and the side of the image that it reads."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    side: int


def resnet50() -> Iterator[Conv]:
    yield Conv("conv1", 3, 64, 7, 2, 224)
    inputs, side = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            path = f"layer{stage + 1}_{block}_"
            yield Conv(f"{path}conv1", inputs, width, 1, 1, side)
            yield Conv(f"{path}conv2", width, width, 3, stride, side)
            yield Conv(f"{path}conv3", width, 4 * width, 1, 1, side // stride)
            if block == 0:
                yield Conv(f"{path}downsample", inputs, 4 * width, 1, stride, side)
            inputs, side = 4 * width, side // stride


def second_moment(size: int) -> Tensor:
    """Of random vectors with a spread of scales, of half the full rank."""
    x = torch.randn(size, max(8, size // 2)) * torch.linspace(0.1, 3, size)[:, None]
    return x @ x.T / x.shape[1]


def random_curvature(model: nn.Module, convs: list[Conv]) -> Curvature:
    layers: dict[str, LayerCurvature] = {}
    macs = 0.0
    found = find_layers(model).compressible
    for conv in convs:
        layer = found[conv.name]
        out = (conv.side // conv.stride) ** 2
        shape = layer.shape(conv.side**2 if conv.kernel > 1 else out, out)
        i, K = conv.inputs, conv.kernel**2
        patches = second_moment(i * K)
        A = patches.reshape(i, K, i, K).diagonal(dim1=1, dim2=3).mean(2)
        S, mean = second_moment(conv.outputs) * 1e-4, torch.zeros(i)
        made = LayerCurvature.from_factors(S, A, mean, EXAMPLES, EXAMPLES * out, shape)
        if K > 1:
            made = replace(made, patches=patches, patch_mean=torch.zeros(i * K))
        layers[conv.name] = made
        macs += shape.dense().macs
    parameters = sum(p.numel() for p in model.parameters())
    return Curvature(
        layers=layers, macs=macs, parameters=parameters, examples=EXAMPLES, extras=("patches",)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent / "results" / "planning.json"
    parser.add_argument("--out", type=Path, default=here)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    convs = list(resnet50())
    model = nn.Module()
    for c in convs:
        conv = nn.Conv2d(c.inputs, c.outputs, c.kernel, c.stride, c.kernel // 2, bias=False)
        model.register_module(c.name, conv)
    curvature = random_curvature(model, convs)

    rows: list[dict[str, object]] = []
    menus = None
    for budget in BUDGETS:
        start = time.perf_counter()
        if menus is None:
            menus = ed.make_menus(model, curvature, progress=False)
        plan = ed.make_plan(model, curvature, budget, menus=menus)
        seconds = time.perf_counter() - start
        left = {unit: plan.left(unit) for unit in budget.limits}
        rows.append(
            {
                "budget": budget.given,
                "left": left,
                "gap": plan.gap,
                "price": plan.price,
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/planning.py",
        "machine": machine(),
        "seed": 0,
        "layers": len(convs),
        "resident_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "versions": versions(),
        "rows": rows,
    }
    record(arguments.out, result)


if __name__ == "__main__":
    main()
