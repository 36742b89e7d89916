"""A model that becomes smaller where it is, and the optimizers that go on with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eigendamage.compress import Compressed
from eigendamage.errors import EigenDamageError
from eigendamage.layers import FactoredConv2d, FactoredLinear, origin_of, set_following, set_origin
from eigendamage.plan import Mask
from eigendamage.surgery import made_by, set_made

_STAGES = 3  # the most that a factored layer has


@torch.no_grad()
def adopt(model: nn.Module, result: Compressed, optimizers: Iterable[Optimizer]) -> None:
    """Make a model in training what `compress` made of it, in place.

    The module object stays, and so does every submodule and every parameter whose shape stays:
    they take new values, and their optimizer state is kept. What is factored or sliced is replaced,
    and its optimizer state starts anew. A new parameter goes to the group of the one whose place it
    takes, and is trained if that was.

    Args:
        model: as it was when it was compressed.
        result: what became of a copy of it.
        optimizers: of any of its parameters; their groups are changed in place, so schedulers go
            on.

    Raises:
        EigenDamageError: if an optimizer keeps its parameters in another way than by groups, or if
            the method masks weights. The model is then as it was.
    """
    optimizers = tuple(optimizers)
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise EigenDamageError(
                "LBFGS keeps a history of one fixed set of parameters, which a round changes; "
                "train with another optimizer"
            )
    if any(isinstance(layer.action, Mask) for layer in result.plan.layers.values()):
        raise EigenDamageError(
            f"method '{result.plan.method}' masks weights and makes nothing smaller, and masks "
            f"cannot be put on a model in training; take a method that shrinks layers"
        )
    before = dict(model.named_parameters())
    _take(model, result.model)
    for path, module in result.model.named_modules():
        origin = origin_of(module)
        for attribute in () if origin is None else origin.counts:
            set_following(model.get_submodule(path), attribute, getattr(module, attribute))
    if (made := made_by(result.model)) is not None:
        set_made(model, made)
    after = dict(model.named_parameters())
    for name, parameter in after.items():
        parameter.requires_grad_(before[predecessor(name, before)].requires_grad)
        parameter.grad = None
    for optimizer in optimizers:
        follow(optimizer, before, after)


def follow(
    optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Put a network's new parameters where its old ones were in an optimizer's groups.

    Args:
        optimizer: its parameters that are not among those before stay.
        before: by dotted path.
        after: likewise.
    """
    names = {old: name for name, old in before.items()}
    heirs: dict[str, list[str]] = {}
    for name in after:
        heirs.setdefault(predecessor(name, before), []).append(name)
    for group in optimizer.param_groups:
        given: list[str] | None = group.get("param_names")
        params: list[nn.Parameter] = []
        param_names: list[str] = []
        for index, old in enumerate(group["params"]):
            mine = names.get(old)
            params += [old] if mine is None else [after[heir] for heir in heirs.get(mine, ())]
            if given is not None:
                # Their names may start at another module than ours.
                prefix = given[index].removesuffix(mine or "")
                param_names += (
                    [given[index]] if mine is None else [prefix + h for h in heirs.get(mine, ())]
                )
        group["params"][:] = params
        if given is not None:
            given[:] = param_names
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for old in [old for old in optimizer.state if id(old) not in held]:
        del optimizer.state[old]


def predecessor(name: str, before: Mapping[str, nn.Parameter]) -> str:
    """The parameter whose place another takes, by their dotted paths.

    The bias of the last stage of ``conv1`` takes the place of ``conv1.bias``, every other parameter
    of a stage that of ``conv1.weight``. Where the layer had stages before, and has more or fewer
    now, it is that of one of them.

    Raises:
        EigenDamageError: if there is none.
    """
    if name in before:
        return name
    path, _, leaf = name.rpartition(".")
    above = path.split(".")
    places = [".".join(above[:depth]) for depth in range(len(above), -1, -1)]
    stages = [f"{at}.{index}" for at in places[:2] if at for index in range(_STAGES)]
    kinds = (leaf, "weight")
    candidates = [f"{place}.{kind}".lstrip(".") for place in places for kind in kinds]
    candidates += [f"{stage}.{kind}" for kind in kinds for stage in stages]
    for candidate in candidates:
        if candidate in before:
            return candidate
    raise EigenDamageError(f"parameter '{name}' takes no other's place")


def _take(model: nn.Module, smaller: nn.Module) -> None:
    """Give each submodule the tensors of its counterpart, or put that in its place."""
    replaced: list[str] = []
    for path, new in smaller.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{root}.") for root in replaced):
            continue
        old = model.get_submodule(path)
        if _alike(old, new):
            _take_tensors(old, new)
            if (origin := origin_of(new)) is not None:
                set_origin(old, origin)
        else:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new.train(old.training))
            replaced.append(path)


def _take_tensors(mine: nn.Module, its: nn.Module) -> None:
    """Give a module the parameters and buffers of another of its class, without those below."""
    old, new = _own(mine), _own(its)
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        _take_sizes(mine, its)
    for name in {**old, **new}:
        if name in old and name in new and old[name].shape == new[name].shape:
            old[name].copy_(new[name])
        else:
            setattr(mine, name, new.get(name))


def _own(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = (
        module.named_parameters(recurse=False),
        module.named_buffers(recurse=False),
    )
    return {**dict(parameters), **dict(buffers)}


def _take_sizes(mine: nn.Module, its: nn.Module) -> None:
    """Numbers of features and the like, which follow the shapes of a layer's tensors."""
    for name, value in vars(its).items():
        if isinstance(value, int | tuple) and not isinstance(value, bool):
            setattr(mine, name, value)


def _alike(mine: nn.Module, its: nn.Module) -> bool:
    """Whether one can take the tensors of the other."""
    names = ([name for name, _ in module.named_children()] for module in (mine, its))
    if type(mine) is not type(its) or next(names) != next(names):
        return False
    if isinstance(mine, FactoredLinear | FactoredConv2d):
        return _shapes(mine) == _shapes(its)
    return True


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    state: dict[str, Tensor] = module.state_dict()
    return {name: tensor.shape for name, tensor in state.items()}
