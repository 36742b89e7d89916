"""From the original model and a structure to the smaller model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from eigendamage.errors import EigenDamageError, FileFormatError, MismatchError
from eigendamage.layers import (
    FOLLOWING,
    ConvGeometry,
    FactoredConv2d,
    FactoredLinear,
    copy_model,
    recounted_origin,
    reshaped_origin,
    saved_tensors,
    set_following,
    set_origin,
    sides,
    slice_channels,
)
from eigendamage.saving._describe import is_masked
from eigendamage.saving._structure import ConvStage, ModuleForm, Shape, Stage, Stages, Structure


def check_original(model: nn.Module, original: Mapping[str, Shape]) -> None:
    """Refuse a model that is not what a structure was made of.

    Raises:
        MismatchError: naming the first parameter or buffer that does not fit, and both shapes.
    """
    found: set[str] = set()
    for name, tensor in saved_tensors(model):
        found.add(name)
        if nn.parameter.is_lazy(tensor):
            raise MismatchError(f"'{name}' of the model has no shape yet; run the model once first")
        if name not in original:
            raise MismatchError(
                f"the model has '{name}' of shape {tuple(tensor.shape)}, which the saved model's "
                f"original had not; give the model as it was before it was compressed"
            )
        if tuple(tensor.shape) != original[name]:
            raise MismatchError(
                f"'{name}' of the model has shape {tuple(tensor.shape)}, the saved model's "
                f"original had {original[name]}"
            )
    for name, shape in original.items():
        if name not in found:
            raise MismatchError(
                f"the model has no '{name}', the saved model's original had it, of shape {shape}"
            )


def rebuild(model: nn.Module, structure: Structure) -> nn.Module:
    """A copy of the original in which every module has the saved form; weights are on no device.

    Raises:
        MismatchError: if the model is not the original.
        FileFormatError: if the structure is not one of this model; the module is named.
    """
    check_original(model, structure.original)
    for path, form in structure.modules.items():
        try:
            _check(path, model.get_submodule(path), form)
        except AttributeError as error:
            raise FileFormatError(f"'{path}' is no module of the model: {error}") from error
    nowhere: dict[int, nn.Parameter | Tensor] = {}
    for _, tensor in saved_tensors(model):
        if id(tensor) not in nowhere:
            nowhere[id(tensor)] = _nowhere(tensor)
    replaced: dict[int, nn.Module] = {}
    for path, form in structure.modules.items():
        if form.stages is not None:
            old = model.get_submodule(path)
            replaced[id(old)] = _module(path, form.stages, old)
    smaller = copy_model(model, {**nowhere, **replaced})
    for path, form in structure.modules.items():
        try:
            _change(path, smaller.get_submodule(path), model.get_submodule(path), form)
        except EigenDamageError as error:
            raise FileFormatError(
                f"'{path}' cannot have the form that is saved: {error}"
            ) from error
    return smaller


def _nowhere(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter


def _check(path: str, module: nn.Module, form: ModuleForm) -> None:
    for attribute, (before, _) in form.counts.items():
        if attribute not in FOLLOWING:
            raise FileFormatError(
                f"'{attribute}' of '{path}' is said to follow what goes, which is known of "
                f"{', '.join(FOLLOWING)} alone"
            )
        now = vars(module).get(attribute)
        if not isinstance(now, int) or now != before:
            raise MismatchError(
                f"'{attribute}' of '{path}' is {now!r}, the saved model's original had "
                f"{type(now)(before) if isinstance(now, int) else before!r}"
            )
    if form.stages is not None:
        conv = isinstance(form.stages.layers[0], ConvStage)
        fitting = (nn.Conv2d, FactoredConv2d) if conv else (nn.Linear, FactoredLinear)
        if not isinstance(module, fitting):
            raise MismatchError(
                f"'{path}' is a {type(module).__name__}, which the saved "
                f"{form.stages.layers[0].kind} stages cannot replace"
            )


def _module(path: str, stages: Stages, old: nn.Module) -> nn.Module:
    """The stages as a module on no device, in the old one's place.

    Raises:
        FileFormatError: if they do not follow one another, or are not laid out as they say.
        MismatchError: if the old module reads its inputs in another way.
    """
    for before, after in zip(stages.layers, stages.layers[1:], strict=False):
        if before.outputs != after.inputs:
            raise FileFormatError(
                f"the stages of '{path}' do not fit: one returns {before.outputs} channels, the "
                f"next reads {after.inputs}"
            )
    layers = [_layer(path, stage) for stage in stages.layers]
    for layer in layers:
        layer.requires_grad_(cast(Tensor, old.weight).requires_grad)
    if isinstance(old.bias, Tensor) and isinstance(layers[-1].bias, Tensor):
        layers[-1].bias.requires_grad_(old.bias.requires_grad)
    if stages.form is None:
        module = layers[0]
    elif isinstance(layers[0], nn.Linear):
        module = FactoredLinear(*layers)
    else:
        module = FactoredConv2d(*layers)
    if isinstance(module, FactoredLinear | FactoredConv2d):
        form, *ranks = module.layout
        if (form, tuple(ranks)) != (stages.form, stages.ranks):
            raise FileFormatError(
                f"'{path}' is said to be {stages.form} of ranks {stages.ranks}, but its stages "
                f"are {form} of ranks {tuple(ranks)}"
            )
    if not isinstance(module, nn.Linear | FactoredLinear):
        now, then = (_geometry(each) for each in (old, module))
        if now != then:
            raise MismatchError(f"'{path}' of the model reads by {now}, the saved one by {then}")
    return module.train(old.training)


def _geometry(conv: nn.Module) -> ConvGeometry:
    core = conv.core if isinstance(conv, FactoredConv2d) else conv
    return ConvGeometry.of(cast(nn.Conv2d, core))


def _layer(path: str, stage: Stage) -> nn.Linear | nn.Conv2d:
    try:
        if isinstance(stage, ConvStage):
            return nn.Conv2d(
                stage.inputs,
                stage.outputs,
                stage.kernel,
                stride=stage.stride,
                padding=stage.padding,
                dilation=stage.dilation,
                groups=stage.groups,
                bias=stage.bias,
                padding_mode=stage.padding_mode,
                device="meta",
            )
        return nn.Linear(stage.inputs, stage.outputs, bias=stage.bias, device="meta")
    except (RuntimeError, ValueError) as error:
        raise FileFormatError(f"a stage of '{path}' cannot be built: {error}") from error


def _change(path: str, module: nn.Module, old: nn.Module, form: ModuleForm) -> None:
    """What a form asks for beyond stages, in place; and the note of what the module was."""
    reshaped = form.model_copy(update={"counts": {}}) != ModuleForm()
    if reshaped:
        have = sides(old, name=path)
        outputs = _kept(path, "outputs", form.dropped_outputs, have.outputs)
        inputs = _kept(path, "inputs", form.dropped_inputs, have.inputs)
        if form.stages is None:
            slice_channels(module, outputs=outputs, inputs=inputs, name=path)
        left = tuple(
            count if kept is None else len(kept)
            for kept, count in zip((outputs, inputs), have, strict=True)
        )
        if left != tuple(sides(module, name=path)) and form.stages is not None:
            raise FileFormatError(
                f"its stages have {tuple(sides(module, name=path))} outputs and inputs, what is "
                f"dropped leaves {left}"
            )
        if form.added_bias:
            _add_bias(path, module)
        if form.masked and not is_masked(module):
            _add_mask(path, module)
        set_origin(module, reshaped_origin(old, outputs=outputs, inputs=inputs))
    for attribute, (before, after) in form.counts.items():
        counted = recounted_origin(module, attribute, before)
        set_origin(module, counted)
        set_following(module, attribute, after)


def _kept(path: str, side: str, dropped: Shape, count: int) -> list[int] | None:
    gone = set(dropped)
    if len(gone) != len(dropped) or not gone <= set(range(count)):
        raise FileFormatError(f"the {side} that '{path}' drops are not distinct ones below {count}")
    return [index for index in range(count) if index not in gone] if gone else None


def _add_bias(path: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear | nn.Conv2d) or isinstance(module.bias, Tensor):
        raise FileFormatError(f"'{path}' cannot be given a bias, or has one")
    weight = module.weight
    bias = nn.Parameter(weight.new_empty(len(weight)), requires_grad=weight.requires_grad)
    module.register_parameter("bias", bias)


def _add_mask(path: str, module: nn.Module) -> None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise FileFormatError(
            f"'{path}' is a {type(module).__name__} without a weight of its own, which cannot have "
            f"the mask that is saved"
        )
    prune.custom_from_mask(module, "weight", torch.ones_like(weight))
