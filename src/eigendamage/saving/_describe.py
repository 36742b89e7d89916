"""From a model to its structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from eigendamage.errors import EigenDamageError, LayerError
from eigendamage.layers import (
    FactoredConv2d,
    FactoredLinear,
    Origin,
    join,
    origin_of,
    own_tensors,
    saved_tensors,
)
from eigendamage.saving._structure import (
    ConvStage,
    LinearStage,
    ModuleForm,
    Shape,
    Stage,
    Stages,
    Structure,
)


def describe(model: nn.Module) -> Structure:
    """The structure of a model, by what surgery noted on its modules and by how they are now.

    Raises:
        EigenDamageError: if the model has state that is no tensor, or a sparse one, or one without
            values.
        LayerError: if a stage of a factored layer is no plain layer any more.
    """
    original: dict[str, Shape] = {}
    modules: dict[str, ModuleForm] = {}
    described: set[int] = set()
    inside: str | None = None  # of a changed module, whose parts the original had not
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is not None and path.startswith(inside):
            continue
        inside = None
        origin = origin_of(module)
        if origin is not None and origin.tensors is not None:
            original.update({join(path, name): shape for name, shape in origin.tensors.items()})
            inside = f"{path}." if path else ""
        else:
            original.update({join(path, n): tuple(t.shape) for n, t in own_tensors(module)})
        if origin is not None and id(module) not in described:
            described.add(id(module))
            form = _form(path, module, origin)
            if form != ModuleForm():
                modules[path] = form
    ties, layouts = _ties_and_layouts(model)
    return Structure(
        model=type(model).__name__,
        original=original,
        modules=modules,
        ties=ties,
        layouts=layouts,
    )


def _form(path: str, module: nn.Module, origin: Origin) -> ModuleForm:
    tensors, stages = origin.tensors or {}, None
    if isinstance(module, FactoredConv2d | FactoredLinear):
        form, rank_out, rank_in = module.layout
        parts = [_stage(join(path, name), part) for name, part in module.named_children()]
        stages = Stages(form=form, ranks=(rank_out, rank_in), layers=tuple(parts))
    elif isinstance(module, nn.Linear | nn.Conv2d) and "weight" not in tensors:
        # The original was factored, and what became of it was multiplied out.
        stages = Stages(form=None, ranks=None, layers=(_stage(path, module),))
    elif "weight" in tensors and not hasattr(module, "weight"):
        raise LayerError(
            path,
            f"it was a layer and is a {type(module).__name__} now, which cannot be rebuilt; save "
            f"the model that compress returned, not what ed.plain made of it",
        )
    outputs, inputs = origin.channels or (0, 0)
    biased = isinstance(getattr(module, "bias", None), Tensor)
    return ModuleForm(
        stages=stages,
        dropped_outputs=_dropped(origin.outputs, outputs),
        dropped_inputs=_dropped(origin.inputs, inputs),
        added_bias=stages is None and "weight" in tensors and "bias" not in tensors and biased,
        masked=is_masked(module) and "weight" in tensors,
        counts={name: (value, int(getattr(module, name))) for name, value in origin.counts.items()},
    )


def is_masked(module: nn.Module) -> bool:
    """Whether a module's weight has a mask of ``torch.nn.utils.prune``."""
    return prune.is_pruned(module) and hasattr(module, "weight_mask")


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides fill memory without gaps and without overlap, in any order of axes."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True


def _stage(path: str, part: nn.Module) -> Stage:
    names = {name for name, _ in saved_tensors(part)}
    if not isinstance(part, nn.Linear | nn.Conv2d) or not names <= {"weight", "bias"}:
        raise LayerError(
            path,
            f"it is a stage of a factored layer and holds {', '.join(sorted(names)) or 'nothing'}; "
            f"only plain Linear and Conv2d layers can be saved there. Undo what was put on it "
            f"(parametrizations, adapters), or densify the model first",
        )
    bias = isinstance(part.bias, Tensor)
    if isinstance(part, nn.Linear):
        return LinearStage(inputs=part.in_features, outputs=part.out_features, bias=bias)
    padding = part.padding if isinstance(part.padding, str) else _pair(part.padding)
    return ConvStage(
        inputs=part.in_channels,
        outputs=part.out_channels,
        bias=bias,
        kernel=_pair(part.kernel_size),
        stride=_pair(part.stride),
        padding=cast(tuple[int, int] | Literal["same", "valid"], padding),
        dilation=_pair(part.dilation),
        groups=part.groups,
        padding_mode=part.padding_mode,
    )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _dropped(kept: Shape | None, count: int) -> Shape:
    return () if kept is None else tuple(sorted(set(range(count)) - set(kept)))


def _by_rows(tensor: Tensor) -> bool:
    # Not is_contiguous: it is blind to axes of size 1, by whose strides kernels choose a format.
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _ties_and_layouts(model: nn.Module) -> tuple[dict[str, str], dict[str, Shape]]:
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    layouts: dict[str, Shape] = {}
    for name, tensor in saved_tensors(model):
        if tensor.layout != torch.strided or tensor.is_meta:
            what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
            raise EigenDamageError(f"'{name}' is {what}; only dense tensors with values are saved")
        known = first.setdefault(id(tensor), name)
        if known != name:
            ties[name] = known
        elif not _by_rows(tensor) and is_dense(tensor.shape, tensor.stride()):
            layouts[name] = tensor.stride()
    stored = set(first.values())
    extra = [name for name in model.state_dict() if name not in stored and name not in ties]
    if extra:
        raise EigenDamageError(
            f"the model's state has '{extra[0]}', which is no parameter or buffer; only tensors "
            f"can be saved without running code when they are loaded"
        )
    return ties, layouts
