"""Batch norm folded into the layer before it, where the graph proves that this changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

_aten = torch.ops.aten
_NORM = _aten.batch_norm.default
_LAYERS: dict[object, int] = {
    _aten.linear.default: 2,
    _aten.conv1d.default: 3,
    _aten.conv1d.padding: 3,
    _aten.conv2d.default: 4,
    _aten.conv2d.padding: 4,
    _aten.conv3d.default: 5,
    _aten.conv3d.padding: 5,
}
"""Layers whose output's axis 1 is the channel, and the axes of that output."""


@dataclass(frozen=True)
class _Pair:
    """A batch norm and the layer that it alone reads."""

    layer: fx.Node
    norm: fx.Node

    @property
    def weight(self) -> fx.Node:
        return cast(fx.Node, self.layer.args[1])

    @property
    def bias(self) -> fx.Node | None:
        return cast("fx.Node | None", self.layer.args[2] if len(self.layer.args) > 2 else None)

    @property
    def place(self) -> fx.Node | None:
        """The tensor that becomes the layer's bias: its own, the batch norm's, or the mean."""
        tensors = (self.bias, self.norm_argument(2), self.norm_argument(3))
        found = next((n for n in tensors if n is not None), None)
        return found if found is not None and len(found.users) == 1 else None

    def norm_argument(self, index: int) -> fx.Node | None:
        return cast("fx.Node | None", self.norm.args[index])


def batchnorms(program: ExportedProgram) -> list[fx.Node]:
    """The batch norms of a program."""
    return list(program.graph.find_nodes(op="call_function", target=_NORM))


def fold_batchnorm(program: ExportedProgram) -> int:
    """Fold every batch norm that can be into the Linear or convolution before it, in place.

    A batch norm y = γ(x − μ)/√(σ² + ε) + β goes if it has fixed statistics, nothing else reads its
    input x = W∗z + b, and nothing else reads W and b; the layer then has γ/√(σ² + ε) · W and
    γ(b − μ)/√(σ² + ε) + β. Of a factored layer that is the last stage, the expanding one. The
    arithmetic is in float64. Tensors of the model that was traced are not written to.

    Returns:
        How many were folded.
    """
    state = _State(program)
    folded = 0
    for norm in batchnorms(program):
        pair = _pair(norm, state)
        if pair is not None:
            _fold(pair, state)
            folded += 1
    state.drop_unused()
    program.graph.lint()
    program.graph_module.recompile()
    return folded


def folded_affine(
    weight: Float[Tensor, "o ..."],
    bias: Float[Tensor, " o"] | None,
    mean: Float[Tensor, " o"],
    variance: Float[Tensor, " o"],
    scale: Float[Tensor, " o"] | None,
    shift: Float[Tensor, " o"] | None,
    eps: float,
) -> tuple[Float[Tensor, "o ..."], Float[Tensor, " o"]]:
    """Weight and bias of a layer with the batch norm after it, computed in float64."""
    factor = (variance.double() + eps).rsqrt()
    if scale is not None:
        factor = factor * scale.double()
    offset = -mean.double() if bias is None else bias.double() - mean.double()
    moved = offset * factor
    if shift is not None:
        moved = moved + shift.double()
    wide = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return wide.to(weight.dtype), moved.to(weight.dtype)


class _State:
    """The tensors that a program's placeholders stand for."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._emptied: list[fx.Node] = []

    def holds(self, node: fx.Node) -> bool:
        """Whether a node is a tensor of the model."""
        return node.op == "placeholder" and self._name(node) in self._program.state_dict

    def __getitem__(self, node: fx.Node) -> Tensor:
        return cast(Tensor, self._program.state_dict[self._name(node)])

    def __setitem__(self, node: fx.Node, value: Tensor) -> None:
        name = self._name(node)
        was_parameter = isinstance(self._program.state_dict[name], nn.Parameter)
        self._program.state_dict[name] = (
            nn.Parameter(value, requires_grad=False) if was_parameter else value
        )

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let a node's readers, the program's output among them, read another; erase it."""
        self._emptied += [n for n in old.all_input_nodes if self.holds(n)]
        old.replace_all_uses_with(new)
        self._program.graph_signature.replace_all_uses(old.name, new.name)
        self._program.graph.erase_node(old)

    def drop_unused(self) -> None:
        """Remove from the program what only folded batch norms have read."""
        emptied = {n for n in self._emptied if not n.users}
        folders = {self._name(n).rpartition(".")[0] for n in emptied}
        counts = {f"{folder}.num_batches_tracked".lstrip(".") for folder in folders}
        for node in list(self._program.graph.find_nodes(op="placeholder")):
            name = self._name(node)
            if node in emptied or (name in counts and not node.users):
                self._program.graph.erase_node(node)
                self._program.graph_signature.input_specs.remove(self._specs[node.name])
                self._program.state_dict.pop(name, None)

    def _name(self, node: fx.Node) -> str:
        return self._specs[node.name].target or ""


def _pair(norm: fx.Node, state: _State) -> _Pair | None:
    layer, running, training = norm.args[0], norm.args[3:5], norm.args[5]
    if training or not isinstance(layer, fx.Node) or layer.target not in _LAYERS:
        return None
    pair = _Pair(layer, norm)
    read = [pair.weight, pair.bias, *running, pair.norm_argument(1), pair.norm_argument(2)]
    tensors = [n for n in read if isinstance(n, fx.Node)]
    output: Any = layer.meta.get("val")
    provable = (
        len(layer.users) == 1
        and not layer.kwargs
        and getattr(output, "ndim", 0) == _LAYERS[layer.target]
        and all(isinstance(n, fx.Node) for n in running)
        and all(state.holds(n) for n in tensors)
        and len(pair.weight.users) == 1
        and pair.place is not None
    )
    return pair if provable else None


def _fold(pair: _Pair, state: _State) -> None:
    nodes = [pair.bias, *(pair.norm_argument(n) for n in (3, 4, 1, 2))]
    bias, mean, variance, scale, shift = (None if n is None else state[n] for n in nodes)
    assert mean is not None  # checked by _pair
    assert variance is not None
    eps = cast(float, pair.norm.args[7])
    weight, bias = folded_affine(state[pair.weight], bias, mean, variance, scale, shift, eps)
    place = pair.place
    assert place is not None  # checked by _pair
    state[pair.weight] = weight
    state[place] = bias
    layer = pair.layer
    layer.args = (*layer.args[:2], place, *layer.args[3:])
    state.replace(pair.norm, layer)
