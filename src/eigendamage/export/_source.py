"""A program as Python: a module of torch.nn parts, with its weights as safetensors beside it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from eigendamage._version import __version__
from eigendamage.batch import Batch, tensors_in
from eigendamage.errors import ExportError
from eigendamage.export._compare import Run
from eigendamage.export._names import Names, identifier
from eigendamage.export._parts import Part, part_of
from eigendamage.export._statements import expression
from eigendamage.export._values import named_outputs, plain_output
from eigendamage.files import save_tensors

_TEMPLATE = '''"""A network of torch.nn parts, written by eigendamage {version} and not needing it.

``load()`` gives it with its weights, in eval mode. {inputs}
"""

import math
import operator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{parts}

    def forward(self, {parameters}):
{statements}
        return {returned}


def build():
    """The network with weights that were not trained."""
    return Model().eval()


def load(weights=Path(__file__).with_name("model.safetensors")):
    """The network with its weights."""
    model = build()
    model.load_state_dict(load_file(weights))
    return model
'''


def write_source(program: ExportedProgram, folder: Path) -> None:
    """Write ``model.py`` and ``model.safetensors`` into a folder. The program is tidied in place.

    Raises:
        ExportError: if the program has an operation that is not torch's own.
    """
    _tidy(program.graph)
    source = _Source(program)
    save_tensors(source.weights(), folder / "model.safetensors")
    (folder / "model.py").write_text(source.text(), encoding="utf-8")


def run_source(folder: Path) -> Run:
    """What runs the module that the folder's ``model.py`` loads."""
    path = folder / "model.py"
    # Not imported: that would leave a folder of bytecode beside it.
    names: dict[str, Any] = {"__name__": "eigendamage_plain_model", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    model: nn.Module = names["load"]()

    def run(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            output = model(*tensors_in([*batch.args, *batch.kwargs.values()]))
        return named_outputs(plain_output(output))

    return run


def _tidy(graph: fx.Graph) -> None:
    """Take out dropout, which does nothing here, checks of shapes, and what nothing reads."""
    for node in list(graph.nodes):
        name = str(node.target)
        if name == "aten.dropout.default" and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif re.match(r"aten\.(_assert|sym_constrain)", name):
            graph.erase_node(node)
    graph.eliminate_dead_code()


class _Source:
    """The parts of a program and its lines of Python."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        self._program = program
        self._nodes = list(program.graph.nodes)
        self._specs = {s.arg.name: s for s in signature.input_specs}
        self._parts: dict[str, Part] = {}
        self._called: dict[fx.Node, str] = {}
        self._owned: dict[fx.Node, str] = {}
        self._names: set[str] = set()
        for node in self._nodes:
            part = part_of(node) if node.op == "call_function" else None
            if part is not None and all(map(self._is_state, part.tensors.values())):
                self._add_part(node, part)
        self._loose = {
            node: self._attribute(self._specs[node.name].target or "tensor")
            for node in self._nodes
            if self._is_state(node) and node.users and node not in self._owned
        }

    def weights(self) -> dict[str, Tensor]:
        """All tensors by the names that the module has for them."""
        found = {place: self._tensor(node) for node, place in self._owned.items()}
        found |= {name: self._tensor(node) for node, name in self._loose.items()}
        for name, part in self._parts.items():
            if "running_mean" in part.tensors:
                found[f"{name}.num_batches_tracked"] = torch.tensor(0)
        return {name: t.detach().contiguous().clone() for name, t in found.items()}

    def text(self) -> str:
        """The whole file."""
        inputs = [n for n in self._nodes if self._is_input(n)]
        names = Names(self._nodes, {**self._owned, **self._loose}, inputs)
        statements = list(self._statements(names))
        returned = self._returned(names)
        if any(re.search(r"\bdevice\b", line) for line in statements):
            statements.insert(0, f"device = {names.parameters[0]}.device")
        shapes = ", ".join(
            f"``{name}`` {_shape(node)}"
            for name, node in zip(names.parameters, inputs, strict=True)
        )
        return _without_idle_imports(
            _TEMPLATE.format(
                version=__version__,
                inputs=f"Inputs: {shapes}.",
                parts=_indented(self._made()),
                parameters=", ".join(names.parameters),
                statements=_indented(statements),
                returned=returned,
            )
        )

    def _made(self) -> Iterator[str]:
        for name, part in self._parts.items():
            yield f"self.{name} = {part.made}"
        for node, name in self._loose.items():
            tensor = self._tensor(node)
            empty = f"torch.empty({list(tensor.shape)}, dtype={tensor.dtype})"
            if isinstance(tensor, nn.Parameter):
                yield f"self.{name} = nn.Parameter({empty})"
            else:
                yield f'self.register_buffer("{name}", {empty})'

    def _statements(self, names: Names) -> Iterator[str]:
        for index, node in enumerate(self._nodes):
            if node.op == "get_attr":
                raise ExportError(
                    f"the model has control flow ({node.target}), which has no plain form; use "
                    f"format='torch.export'"
                )
            if node.op != "call_function":
                continue
            called = self._called.get(node)
            if called is None:
                value = expression(node, names.of)
            else:
                value = f"self.{called}({names.of(self._parts_read(node))})"
            yield f"{names.assign(node, index)} = {value}"

    def _parts_read(self, node: fx.Node) -> fx.Node:
        part = part_of(node)
        assert part is not None  # it was one when it was added
        return part.reads

    def _returned(self, names: Names) -> str:
        flat = [
            names.of(value)
            for value, spec in zip(
                self._nodes[-1].args[0], self._program.graph_signature.output_specs, strict=True
            )
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        structure = self._program.call_spec.out_spec
        assert structure is not None  # a traced program has it
        return _nested(pytree.tree_unflatten(flat, structure))

    def _add_part(self, node: fx.Node, part: Part) -> None:
        weight = next(iter(part.tensors.values()))
        place = self._owned.get(weight, "").rpartition(".")[0]
        if place and self._parts[place].made == part.made:
            if self._parts[place].tensors == part.tensors:
                self._called[node] = place  # the same layer, once more
            return
        if any(n in self._owned for n in part.tensors.values()):
            return  # its weight is another layer's too: it is called as a function
        path = self._specs[weight.name].target or "part"
        name = self._attribute(path.removesuffix(".weight").removesuffix(".running_mean"))
        self._parts[name] = part
        self._called[node] = name
        self._owned |= {n: f"{name}.{tensor}" for tensor, n in part.tensors.items()}

    def _attribute(self, path: str) -> str:
        """A name for an attribute, alike to a dotted path, that no other has."""
        name = identifier(path)
        while keyword.iskeyword(name) or hasattr(nn.Module(), name) or name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def _is_state(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and self._specs[node.name].kind in (
            InputKind.PARAMETER,
            InputKind.BUFFER,
            InputKind.CONSTANT_TENSOR,
        )

    def _is_input(self, node: fx.Node) -> bool:
        """Whether a node is a tensor that the model is called with."""
        return (
            node.op == "placeholder"
            and self._specs[node.name].kind is InputKind.USER_INPUT
            and isinstance(node.meta.get("val"), Tensor)
        )

    def _tensor(self, node: fx.Node) -> Tensor:
        name = self._specs[node.name].target or ""
        state: dict[str, Any] = self._program.state_dict
        return cast(Tensor, state[name] if name in state else self._program.constants[name])


def _nested(item: Any) -> str:
    if isinstance(item, dict):
        return "{" + ", ".join(f"{k!r}: {_nested(v)}" for k, v in item.items()) + "}"
    if isinstance(item, tuple):
        items = [_nested(v) for v in cast("tuple[Any, ...]", item)]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    return str(item)


def _shape(node: fx.Node) -> str:
    value: Tensor = node.meta["val"]
    sizes = ["batch" if isinstance(s, torch.SymInt) else str(s) for s in value.shape]
    return f"({', '.join(sizes)}) of {str(value.dtype).removeprefix('torch.')}"


def _indented(lines: Any) -> str:
    return "\n".join(f"        {line}" for line in lines)


def _without_idle_imports(source: str) -> str:
    """The source without the imports that none of its lines needs."""
    for line, used in (
        ("import math\n", "math."),
        ("import operator\n", "operator."),
        ("import torch.nn.functional as F\n", "F."),
        ("import torch\n", "torch."),
    ):
        rest = source.replace(line, "", 1)
        body = rest.split("class Model", 1)[1]
        source = source if re.search(rf"(?<![\w.]){re.escape(used)}", body) else rest
    return source
