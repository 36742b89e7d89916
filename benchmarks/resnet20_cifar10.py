"""ResNet-20 on CIFAR-10, one shot and without labels: our EigenDamage beside the bare paper.

The paper's rule is written down here once more, without the library's plan or surgery: factors,
eigenbasis, ½ w'² Λ_S Λ_A, one threshold, three stages where they are smaller. Both use the same
curvature and the same images, 2,000 of the training split without their labels; the test split is
only measured on. Run

    python benchmarks/resnet20_cifar10.py --data CIFAR10.zip --weights resnet20.safetensors
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
from pathlib import Path

import torch
from torch import nn

import eigendamage as ed
from eigendamage import zoo
from eigendamage.files import written_beside

BUDGETS = (0.8, 0.65, 0.5)


def paper(model: nn.Module, curvature: ed.Curvature, budget: float) -> nn.Module:
    """The bare rule, at the mildest ratio that leaves no more than ``budget`` of the MACs."""
    layers = [n for n in curvature if n not in curvature.classifier]
    basis, loss = {}, {}
    for name in layers:
        S, A = curvature[name].S.double(), curvature[name].A.double()
        (ds, qs), (da, qa) = torch.linalg.eigh(S), torch.linalg.eigh(A)
        weight = model.get_submodule(name).weight.detach().double()
        core = torch.einsum("op,oihw,iq->pqhw", qs, weight, qa)
        value = 0.5 * core.square().sum((2, 3)) * ds.clamp_min(0)[:, None] * da.clamp_min(0)
        basis[name], loss[name] = (qs, core, qa), value
    units = torch.cat([torch.cat([v.sum(0), v.sum(1)]) for v in loss.values()]).sort().values

    def build(index: int) -> nn.Module:
        small = copy.deepcopy(model)
        for name in layers:
            conv, (qs, core, qa) = model.get_submodule(name), basis[name]
            rows, columns = (
                _keep(loss[name].sum(1), units[index]),
                _keep(loss[name].sum(0), units[index]),
            )
            stages = [qa[:, columns].T[:, :, None, None], core[rows][:, columns], qs[:, rows]]
            stages[2] = stages[2][:, :, None, None]
            if sum(s.numel() for s in stages) >= conv.weight.numel():
                continue
            parent = small.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _sequence(conv, stages))
        return small

    low, high = 0, len(units) - 1
    one = torch.zeros(1, 3, 32, 32)
    limit = budget * ed.count(model, one).macs
    while low < high:
        middle = (low + high) // 2
        if ed.count(build(middle), one).macs <= limit:
            high = middle
        else:
            low = middle + 1
    return build(low)


def _keep(price: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    keep = price > threshold
    if float((~keep).double().mean()) > 0.95:
        keep = price > price.sort().values[int(0.95 * len(price))]
    if not bool(keep.any()):
        keep[price.argmax()] = True
    return keep


def _sequence(conv: nn.Conv2d, stages: list[torch.Tensor]) -> nn.Sequential:
    convs = [
        nn.Conv2d(stages[0].shape[1], stages[0].shape[0], 1, bias=False),
        nn.Conv2d(
            stages[1].shape[1],
            stages[1].shape[0],
            conv.kernel_size,
            conv.stride,
            conv.padding,
            bias=False,
        ),
        nn.Conv2d(stages[2].shape[1], stages[2].shape[0], 1, bias=False),
    ]
    for new, stage in zip(convs, stages, strict=True):
        new.weight.data.copy_(stage)
    return nn.Sequential(*convs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder, zip or npz")
    parser.add_argument("--weights", required=True, help="trained weights of zoo.resnet20")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    here = Path(__file__).parent / "results" / "resnet20_cifar10.json"
    parser.add_argument("--out", type=Path, default=here)
    arguments = parser.parse_args()

    model = zoo.resnet20().eval()
    zoo.load_weights(model, arguments.weights)
    held_out = zoo.load_images(arguments.data, "test").batches(200)
    base = ed.evaluate(model, held_out, progress=False)
    total = ed.count(model, torch.zeros(1, 3, 32, 32))
    rows = []
    for seed in arguments.seeds:
        images = zoo.load_images(arguments.data, "train", limit=arguments.examples, seed=seed)
        unlabeled = zoo.ImageSet(images.images).batches(125)
        curvature = ed.estimate_curvature(model, unlabeled, seed=seed)
        for budget in BUDGETS:
            candidates: dict[str, tuple[nn.Module, float | None]] = {
                "paper, written down bare": (paper(model, curvature, budget), None)
            }
            for label, eigenvalues, form in (
                ("ours as the paper: Λ_S Λ_A, three stages", "kfac", "three"),
                ("ours, λ, three stages", "ekfac", "three"),
                ("ours (default): λ, cheapest form", "ekfac", "cheapest"),
            ):
                plan = ed.make_plan(
                    model,
                    curvature,
                    ed.Budget(macs=budget),
                    method="eigendamage",
                    eigenvalues=eigenvalues,
                    form=form,
                )
                candidates[label] = (ed.apply_plan(model, plan, curvature), plan.price)
            for label, (small, predicted) in candidates.items():
                cut = ed.evaluate(small, held_out, progress=False)
                ed.recalibrate_batchnorm(small, unlabeled, progress=False)
                after = ed.evaluate(small, held_out, progress=False)
                cost = ed.count(small, torch.zeros(1, 3, 32, 32))
                rows.append(
                    {
                        "method": label,
                        "seed": seed,
                        "budget": budget,
                        "macs": cost.macs / total.macs,
                        "parameters": cost.parameters / total.parameters,
                        "accuracy_after_surgery": cut.accuracy,
                        "accuracy_recalibrated": after.accuracy,
                        "predicted": predicted,
                        "measured_rise": (after.loss or 0.0) - (base.loss or 0.0),
                    }
                )
                print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/resnet20_cifar10.py --data CIFAR10.zip --weights "
        "resnet20.safetensors",
        "machine": {"system": platform.machine(), "cores": os.cpu_count()},
        "seed": arguments.seeds,
        "examples": arguments.examples,
        "versions": {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "eigendamage": ed.__version__,
        },
        "base": {"accuracy": base.accuracy, "loss": base.loss},
        "rows": rows,
    }
    with written_beside(arguments.out) as beside:
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
