"""Which layers of a model can be compressed, and why the others cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from eigendamage.errors import EigenDamageError, LayerError
from eigendamage.layers._cost import Cost, LayerShape
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear
from eigendamage.layers._fused import goes_past_its_block
from eigendamage.layers._geometry import ConvGeometry

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps its hooks."""
ON_REQUEST = "left alone on request"
# Forwards that compute what nn.Linear's does: timm's differs from it in TorchScript alone.
_AS_LINEAR = ("timm.layers.linear.Linear.forward",)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that can be compressed, seen as a weight of shape (o, i, K).

    Attributes:
        name: its dotted path (the first one, if the module is registered under several).
        names: all its dotted paths.
        module: the module itself: Linear, Conv2d, or a factored form of one.
        outputs: o.
        inputs: i.
        geometry: how a convolution reads its input; None for Linear.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    outputs: int
    inputs: int
    geometry: ConvGeometry | None

    @property
    def offsets(self) -> int:
        """K, the number of kernel taps; 1 for Linear."""
        return 1 if self.geometry is None else self.geometry.offsets

    def weight(self) -> Float[Tensor, "o i K"]:
        """The dense weight, detached. Factored layers are multiplied out."""
        return self.dense_weight().detach().reshape(self.outputs, self.inputs, self.offsets)

    def bias(self) -> Float[Tensor, " o"] | None:
        """The bias, detached."""
        bias = self.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    def shape(self, positions_in: float, positions_out: float) -> LayerShape:
        """What its cost depends on, at the given numbers of positions an example."""
        return LayerShape(
            self.outputs,
            self.inputs,
            self.offsets,
            self.bias() is not None,
            positions_in,
            positions_out,
            next(self.module.parameters()).element_size(),
        )

    def cost(self, shape: LayerShape) -> Cost:
        """What the layer costs as it is now, dense or factored."""
        if isinstance(self.module, FactoredConv2d | FactoredLinear):
            form, rank_out, rank_in = self.module.layout
            return shape.factored(rank_out, rank_in, form)
        return shape.dense()

    def spans(self) -> tuple[Float[Tensor, "o ro"] | None, Float[Tensor, "i ri"] | None]:
        """Orthonormal columns that the weight's outputs and its inputs lie in; None for all.

        Those of a factored layer's outer stages, in float64. Without a kernel both stages of a
        pair limit both sides.
        """
        if not isinstance(self.module, FactoredConv2d | FactoredLinear):
            return None, None
        parts = cast("list[nn.Conv2d | nn.Linear]", list(self.module))
        stages = [part.weight.detach().double().flatten(1) for part in parts]
        form = self.module.layout[0]
        both = self.offsets == 1 or form in ("three", "depthwise")
        out = stages[-1] if both or form == "merge_in" else None
        into = stages[0].T if both or form == "merge_out" else None
        return _orthonormal(out, self.outputs), _orthonormal(into, self.inputs)

    @property
    def factored(self) -> bool:
        """Whether it is made of stages already."""
        return isinstance(self.module, FactoredConv2d | FactoredLinear)

    @property
    def channels_last(self) -> bool:
        """Whether its weights lie in memory as torch.channels_last has them.

        Asked of the parameters: the product of a factored layer's stages lies as it came out.
        """
        return any(p.ndim == 4 and not p.is_contiguous() for p in self.module.parameters())

    def dense_weight(self) -> Tensor:
        """The weight as the module has it; the product of its stages if it is factored."""
        weight = self.module.weight
        if not isinstance(weight, Tensor):
            raise LayerError(self.name, "its weight is not a tensor")
        return weight


def _orthonormal(columns: Float[Tensor, "c r"] | None, size: int) -> Tensor | None:
    """An orthonormal basis of what the columns span, None if they could span everything."""
    if columns is None or columns.shape[1] >= size:
        return None
    return torch.linalg.qr(columns).Q


@dataclass(frozen=True)
class Layers:
    """What `find_layers` found: nothing with parameters is missing from both.

    Attributes:
        compressible: the layers that can be compressed, by dotted path, in registration order.
        left_alone: the reason for every other module that holds parameters.
    """

    compressible: Mapping[str, Layer]
    left_alone: Mapping[str, str]


def find_layers(model: nn.Module, *, ignore: Iterable[str] = ()) -> Layers:
    """List a model's compressible layers, and every other module with parameters with its reason.

    Args:
        model: any module. It is only looked at.
        ignore: shell patterns over dotted paths (``"head*"``, ``"*.shortcut"``) to leave alone.

    Raises:
        LayerError: if a lazy module has not been initialised.
        EigenDamageError: if a pattern matches no module with parameters, or the model is compiled.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(f"a torch.nn.Module was expected, found {type(model).__name__}")
    _require_not_compiled(model)
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    matched: set[str] = set()
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
    owners = _weight_owners(model)
    opaque = _children_read_directly(model)

    compressible: dict[str, Layer] = {}
    left_alone: dict[str, str] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        factored = isinstance(module, FactoredConv2d | FactoredLinear)
        if factored:
            inside.update(id(m) for m in module.modules())
        elif not _has_parameters(module):
            continue
        elif parametrize.is_parametrized(module):
            inside.update(id(m) for m in cast("nn.Module", module.parametrizations).modules())
        names = tuple(paths[id(module)])
        hits = [p for p in patterns if any(fnmatchcase(n, p) for n in names)]
        matched.update(hits)
        if hits:
            left_alone[path] = f"{ON_REQUEST} (pattern '{hits[0]}')"
            continue
        reason = _why_not(path, module, owners, opaque)
        if reason is not None:
            left_alone[path] = reason
        else:
            compressible[path] = _describe(path, names, module)
    unmatched = [p for p in patterns if p not in matched]
    if unmatched:
        known = ", ".join([*compressible, *left_alone][:8])
        raise EigenDamageError(
            f"ignore pattern '{unmatched[0]}' matches no layer; layers are: {known}, …"
        )
    return Layers(compressible, left_alone)


def _require_not_compiled(model: nn.Module) -> None:
    """Refuse what runs as a compiled graph, in which layers cannot be watched.

    Raises:
        EigenDamageError: if the model or a part of it was compiled.
    """
    if hasattr(model, "_orig_mod"):
        raise EigenDamageError(
            "the model was compiled with torch.compile, which hides its layers; pass the original "
            "(model._orig_mod) and compile the result"
        )
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        if (
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            what = f"'{path}'" if path else "the model"
            raise EigenDamageError(
                f"{what} was compiled in place (torch.compile, or compile() of the module), which "
                f"hides its layers; compress the model as it was before, and compile the result"
            )


def _has_parameters(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False))
    return own or parametrize.is_parametrized(module)


def _describe(path: str, names: tuple[str, ...], module: nn.Module) -> Layer:
    if isinstance(module, nn.Linear | FactoredLinear):
        return Layer(path, names, module, module.out_features, module.in_features, None)
    assert isinstance(module, nn.Conv2d | FactoredConv2d)
    core = module.core if isinstance(module, FactoredConv2d) else module
    geometry = ConvGeometry.of(core)
    return Layer(path, names, module, module.out_channels, module.in_channels, geometry)


def _is_ours(hook: object) -> bool:
    """Whether a hook or a forward is one that this library puts up for as long as a call takes."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).split(".")[0] == __name__.split(".")[0]


def _why_not(
    path: str, module: nn.Module, owners: Mapping[int, list[str]], opaque: Mapping[int, str]
) -> str | None:
    kind = type(module).__name__
    own = dict(module.named_parameters(recurse=False))
    if any(isinstance(p, UninitializedParameter) for p in own.values()):
        raise LayerError(path, f"{kind} is lazy and not initialised; run the model once first")
    if isinstance(module, FactoredConv2d | FactoredLinear):
        return None
    if not isinstance(module, nn.Linear | nn.Conv2d):
        if kind == "Conv1D" and type(module).__module__.startswith("transformers."):
            return (
                "transformers' Conv1D is a Linear layer with its weight transposed; make it one "
                "with eigendamage.integrations.huggingface.plain_linears(model)"
            )
        matrix = any(p.ndim >= 2 for p in own.values())
        return f"{kind} is not a Linear or Conv2d" if matrix else f"{kind} has no weight matrix"
    if any(p.is_complex() for p in own.values()):
        return "its weight is complex, of which the curvature is not known"
    if id(module) in opaque:
        return f"its weight is read directly by {opaque[id(module)]}, past its forward"
    if _is_replaced(vars(module).get("forward"), module):
        return "its forward was replaced on the module itself, which would be lost with it"
    if overrides_forward(module):
        base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        return f"{kind} overrides the forward of {base.__name__}"
    if parametrize.is_parametrized(module) or "weight" not in own:
        mend = "; parametrize.remove_parametrizations makes it plain"
        return (
            f"the weight of {kind} is computed from other parameters (parametrized or masked)"
            f"{mend if parametrize.is_parametrized(module) else ''}"
        )
    hooked = _why_not_with_hooks(module)
    if hooked is not None:
        return hooked
    others = [o for o in owners[id(module.weight)] if o != f"{path}.weight"]
    if others:
        return f"its weight is shared with {others[0]}"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return (
            f"grouped convolution (groups={module.groups}): rotating its channels would mix "
            f"what the groups keep apart"
        )
    return None


def _why_not_with_hooks(module: nn.Module) -> str | None:
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    if any(_is_ours(hook) for hook in hooks):
        return (
            "another call of this library is at work on the model, in another thread perhaps: wait "
            "until it ends, or give each a copy"
        )
    if hooks:
        return "it carries hooks, which would be lost with it; remove them to compress it"
    return None


def _is_replaced(forward: object, module: nn.Module) -> bool:
    """Whether what lies on a module in the place of its class's forward does something else."""
    same = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not same and not _is_ours(forward)


def overrides_forward(module: nn.Linear | nn.Conv2d) -> bool:
    """Whether its class computes something else than the layer of torch, as far as is known."""
    forward = type(module).forward
    if isinstance(module, nn.Linear):
        known = f"{forward.__module__}.{forward.__qualname__}" in _AS_LINEAR
        return forward is not nn.Linear.forward and not known
    return forward is not nn.Conv2d.forward


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter, the names under which distinct modules hold it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append(f"{path}.{name}")
    return owners


def _children_read_directly(model: nn.Module) -> dict[int, str]:
    return {
        id(child): type(parent).__name__
        for parent in model.modules()
        if isinstance(parent, nn.MultiheadAttention) or goes_past_its_block(parent)
        for child in parent.children()
    }
