"""What others do to a network, to the same budget: Torch-Pruning, Tucker-2 and SVD.

Each takes a trained network and gives a smaller one of no more than so many MACs. The budget is
met as closely as the method can, by bisection over its own knob.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import tensorly
import torch
import torch_pruning as tp
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import eigendamage as ed
from eigendamage.zoo._resnet import ZeroPadShortcut

Labelled = Iterable[tuple[Tensor, Tensor]]
STEPS = 9
"""Of the bisection: the knob is known to 1 part in 512."""
NEAR = 0.98
"""Of the budget: a bisection that ends below it is not trusted."""
GRID = 40
GOLDEN = (5**0.5 - 1) / 2
"""Whose multiples lie evenly between whole numbers."""


def closest(make: Callable[[float], nn.Module], macs: Callable[[nn.Module], float]) -> nn.Module:
    """The largest network within the budget; ``macs`` is relative to it, the knob from 0 to 1.

    By bisection, and where that ends far below the budget by a grid: with widths in multiples
    Torch-Pruning leaves alone what it would round to nothing, so a smaller knob may leave more.
    """
    low, high = 0.0, 1.0
    left, found = 0.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        small = make(middle)
        now = macs(small)
        if now <= 1:
            low = middle
            if now > left:
                left, found = now, small
        else:
            high = middle
    for step in range(1, GRID) if left < NEAR else ():
        small = make(step / GRID)
        now = macs(small)
        if left < now <= 1:
            left, found = now, small
    if found is None:
        raise ValueError("no network that this method makes is within the budget")
    return found


def with_convolved_shortcuts(model: nn.Module) -> nn.Module:
    """The same function without shortcuts that pad channels, which Torch-Pruning cannot follow.

    A 1 x 1 convolution that copies each channel takes their place. Its MACs are not counted
    (`shortcut_macs`): in what one would deploy it is an index.
    """
    model = copy.deepcopy(model)
    widths = {
        name: block.conv1.in_channels
        for name, block in model.named_modules()
        if isinstance(getattr(block, "shortcut", None), ZeroPadShortcut)
    }
    for name, i in widths.items():
        block = model.get_submodule(name)
        old = block.shortcut
        o = old.before + i + old.after
        conv = nn.Conv2d(i, o, 1, old.stride, bias=False)
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[torch.arange(i) + old.before, torch.arange(i)] = 1.0
        block.shortcut = CopiedChannels(conv)
    return model.eval()


class CopiedChannels(nn.Module):
    """A 1 x 1 convolution that stands for a copy of channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class IndexedShortcut(nn.Module):
    """What a shortcut that copies channels is where it is deployed: a choice of channels, or zero.

    Args:
        conv: a convolution each of whose outputs copies one input or none.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride
        copied = conv.weight.detach()[:, :, 0, 0]
        if not bool(((copied == 0) | (copied == 1)).all() and (copied.sum(1) <= 1).all()):
            raise ValueError("this shortcut does more than copy channels")
        nothing = torch.full((len(copied),), conv.in_channels)
        self.register_buffer("index", torch.where(copied.any(1), copied.argmax(1), nothing))

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :: self.stride[0], :: self.stride[1]]
        return pad(kept, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)


def with_indexed_shortcuts(model: nn.Module) -> nn.Module:
    """The same function, as one would deploy it: without the stand-ins that only copy."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, CopiedChannels):
            put(model, name, IndexedShortcut(module.conv))
    return model


def shortcut_macs(model: nn.Module, example: Tensor) -> int:
    """The MACs of the convolutions that stand for a copy."""
    macs = 0

    def add(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() * module.conv.in_channels

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, CopiedChannels)]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return macs


def shortcut_parameters(model: nn.Module) -> int:
    return sum(m.conv.weight.numel() for m in model.modules() if isinstance(m, CopiedChannels))


# --- Torch-Pruning -------------------------------------------------------------------------------


class Gradients:
    """Of the loss by the true labels: its gradient, and the mean square over single examples."""

    def __init__(self, model: nn.Module, data: Labelled) -> None:
        model = copy.deepcopy(model).eval().requires_grad_(True)
        parameters = dict(model.named_parameters())
        self.mean = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.square = {n: torch.zeros_like(p) for n, p in parameters.items()}
        count = 0
        for images, labels in data:
            for x, y in zip(images.split(1), labels.split(1), strict=True):
                one = cross_entropy(model(x), y)
                found = torch.autograd.grad(one, list(parameters.values()))
                for name, g in zip(parameters, found, strict=True):
                    self.mean[name] += g
                    self.square[name] += g.square()
                count += 1
        for name in parameters:
            self.mean[name] /= count
            self.square[name] /= count


Known = Callable[[], Gradients]
"""Gradients when they are asked for."""


def taylor(model: nn.Module, known: Known) -> tp.importance.Importance:
    for name, p in model.named_parameters():
        p.grad = known().mean[name].clone()
    return tp.importance.GroupTaylorImportance()


def hessian(model: nn.Module, known: Known) -> tp.importance.Importance:
    """Its importance takes squares of gradients that are handed to it one by one; one is enough."""
    importance = tp.importance.GroupHessianImportance()
    for name, p in model.named_parameters():
        p.grad = known().square[name].sqrt()
    importance.accumulate_grad(model)
    return importance


IMPORTANCES: dict[str, Callable[[nn.Module, Known], tp.importance.Importance]] = {
    "GroupMagnitude": lambda m, k: tp.importance.GroupMagnitudeImportance(),
    "GroupTaylor": taylor,
    "BNScale": lambda m, k: tp.importance.BNScaleImportance(),
    "LAMP": lambda m, k: tp.importance.LAMPImportance(),
    "Hessian": hessian,
}


def torch_pruned(
    model: nn.Module,
    example: Tensor,
    known: Known,
    name: str,
    which: str,
    kept: float,
    multiple: int | None = None,
) -> nn.Module:
    """Channels removed in one step by one of Torch-Pruning's importances.

    Args:
        model: with convolutions for shortcuts that pad; what they weigh stays as it is in training.
        example: an input.
        known: what the importance may need.
        name: of the importance.
        which: ``global`` over all channels, ``isomorphic`` among layers of a kind, or ``inner``:
            global over those channels of a block that no shortcut passes on.
        kept: the fraction of channels to leave.
        multiple: what widths are multiples of.
    """
    small = copy.deepcopy(model)
    whole: list[nn.Module] = [small.linear]
    if which == "inner":
        whole += [small.conv1, *(m.conv2 for m in small.modules() if hasattr(m, "conv2"))]
        whole += [m.conv for m in small.modules() if isinstance(m, CopiedChannels)]
    pruner = tp.pruner.BasePruner(
        small,
        example,
        importance=IMPORTANCES[name](small, known),
        global_pruning=True,
        isomorphic=which == "isomorphic",
        pruning_ratio=1 - kept,
        ignored_layers=whole,
        round_to=multiple,
    )
    pruner.step()
    small.zero_grad()
    for module in small.modules():
        if isinstance(module, CopiedChannels):
            module.requires_grad_(False)
    return small


# --- low rank ------------------------------------------------------------------------------------


def factored(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All convolutions but the first, whose few inputs cost much to lose and little to keep."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return dict(list(found.items())[1:])


def rank_of(most: int | float, kept: float, index: int) -> int:
    """A fraction of the ranks of the layer of that number, rounded up in some and down in others.

    Where all rounded alike, all would go to the next rank at once, far past the budget.
    """
    return max(1, int(kept * most + index * GOLDEN % 1))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def conv_of(weight: Tensor, like: nn.Conv2d, bias: Tensor | None = None) -> nn.Conv2d:
    """A convolution with these weights; with the other's stride and padding if as wide as it."""
    o, i, *kernel = weight.shape
    wide = tuple(kernel) == like.kernel_size
    conv = nn.Conv2d(
        i,
        o,
        kernel,
        like.stride if wide else 1,
        like.padding if wide else 0,
        bias=bias is not None,
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
        if bias is not None:
            conv.bias.copy_(bias)
    return conv


def svd_of(conv: nn.Conv2d, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ and V of W M, where M Mᵀ is the second moment of patches, V taken back by M⁻¹."""
    W = conv.weight.detach().flatten(1).double()
    if moment is None:
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        return U, s, Vh
    values, Q = torch.linalg.eigh(moment.double())
    roots = values.clamp_min(1e-6 * float(values.mean())).sqrt()
    U, s, Vh = torch.linalg.svd(W @ (Q * roots), full_matrices=False)
    return U, s, Vh / roots @ Q.T


def low_rank(
    model: nn.Module, parts: dict[str, tuple[Tensor, Tensor, Tensor]], kept: float
) -> nn.Module:
    """Convolutions as K x K with few outputs and 1 x 1, to one fraction of their weights."""
    small = copy.deepcopy(model)
    for index, (name, conv) in enumerate(factored(model).items()):
        U, s, Vh = parts[name]
        o, columns = conv.weight.flatten(1).shape
        rank = rank_of(o * columns / (o + columns), kept, index)
        first = Vh[:rank].reshape(rank, *conv.weight.shape[1:])
        stages = (conv_of(first, conv), conv_of((U * s)[:, :rank, None, None], conv, conv.bias))
        if conv.kernel_size == (1, 1):
            stages[1].stride = (1, 1)
        put(small, name, nn.Sequential(*stages))
    return small


def tucker(model: nn.Module, kept: float) -> nn.Module:
    """Convolutions as 1 x 1, K x K and 1 x 1, both ranks to one fraction of their channels."""
    small = copy.deepcopy(model)
    for index, (name, conv) in enumerate(factored(model).items()):
        if conv.kernel_size == (1, 1):
            continue
        o, i, *_ = conv.weight.shape
        ranks = [min(o, rank_of(o, kept, 2 * index)), min(i, rank_of(i, kept, 2 * index + 1))]
        with tensorly.backend_context("numpy", local_threadsafe=True):
            (core, (of_o, of_i)), _ = partial_tucker(
                conv.weight.detach().double().numpy(), rank=ranks, modes=[0, 1], random_state=0
            )
        core, of_o, of_i = (torch.from_numpy(part) for part in (core, of_o, of_i))
        put(
            small,
            name,
            nn.Sequential(
                conv_of(of_i.T[:, :, None, None], conv),
                conv_of(core, conv),
                conv_of(of_o[:, :, None, None], conv, conv.bias),
            ),
        )
    return small


# --- all of them ---------------------------------------------------------------------------------


def competitors(
    model: nn.Module, example: Tensor, labelled: Labelled, curvature: ed.Curvature
) -> dict[str, Callable[[float], nn.Module]]:
    """By name, what makes the network to a fraction of the MACs."""
    whole = ed.count(model, example).macs
    convolved = with_convolved_shortcuts(model)
    gradients: list[Gradients] = []

    def known() -> Gradients:
        if not gradients:
            gradients.append(Gradients(convolved, labelled))
        return gradients[0]

    def fitted(make: Callable[[float], nn.Module], budget: float) -> nn.Module:
        def macs(small: nn.Module) -> float:
            counted = ed.count(small, example).macs - shortcut_macs(small, example)
            return counted / (budget * whole)

        return closest(make, macs)

    def pruned(name: str, which: str, budget: float, multiple: int | None = None) -> nn.Module:
        make = partial(torch_pruned, convolved, example, known, name, which, multiple=multiple)
        return with_indexed_shortcuts(fitted(make, budget))

    def by_svd(whitened: bool, budget: float) -> nn.Module:
        parts = {
            name: svd_of(conv, patches_of(curvature[name]) if whitened else None)
            for name, conv in factored(model).items()
        }
        return fitted(partial(low_rank, model, parts), budget)

    found: dict[str, Callable[[float], nn.Module]] = {
        f"Torch-Pruning {name}, {which}": partial(pruned, name, which)
        for name in IMPORTANCES
        for which in ("global", "isomorphic", "inner")
    }
    found["Tucker-2"] = lambda budget: fitted(partial(tucker, model), budget)
    found["SVD"] = partial(by_svd, False)
    found["input-whitened SVD"] = partial(by_svd, True)
    return found


def patches_of(layer: ed.LayerCurvature) -> Tensor:
    return layer.A if layer.patches is None else layer.patches
