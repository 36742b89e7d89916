"""What the values and layers of a program are called in Python."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterator

from torch import Tensor, fx

# Names that the lines of forward use for something else than an input.
_TAKEN = frozenset({"self", "torch", "nn", "F", "math", "operator", "device", "float"})


class Names:
    """What values are called: a name is free again once nothing further reads its value."""

    def __init__(
        self, nodes: list[fx.Node], attributes: dict[fx.Node, str], inputs: list[fx.Node]
    ) -> None:
        place = {node: index for index, node in enumerate(nodes)}
        self._last = {n: max((place[u] for u in n.users), default=-1) for n in nodes}
        self._names = {node: f"self.{name}" for node, name in attributes.items()}
        self._held: dict[str, fx.Node] = {}
        for node in inputs:
            name = node.name
            while keyword.iskeyword(name) or name in _TAKEN or name in self._held:
                name += "_"
            self._names[node] = name
            self._held[name] = node
        self.parameters = list(self._held)

    def of(self, node: fx.Node) -> str:
        """The name of a value."""
        return self._names[node]

    def assign(self, node: fx.Node, index: int) -> str:
        """A name for the value that line ``index`` computes: one that is free after it."""
        is_size = not isinstance(node.meta.get("val"), Tensor | tuple | list)
        for name in _candidates("n" if is_size else "xyzuvw"):
            holder = self._held.get(name)
            if holder is None or self._last[holder] <= index:
                self._names[node] = name
                self._held[name] = node
                return name
        raise AssertionError("there is no end of candidates")


def identifier(path: str) -> str:
    """A name alike to a path that Python reads as it is: not in another form, not as private."""
    plain = unicodedata.normalize("NFKC", path)
    name = "".join(c if f"_{c}".isidentifier() else "_" for c in plain)
    return name if name.isidentifier() and not name.startswith("__") else f"layer_{name}"


def _candidates(letters: str) -> Iterator[str]:
    yield from letters
    number = 1
    while True:
        yield f"{letters[0]}{number}"
        number += 1
