"""Calls of this package in a block of code, held against the signatures without running it."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType

import eigendamage as ed

_NOTHING = object()


def names_in(tree: ast.Module) -> dict[str, object]:
    """What the imports of this package in a block bind; `ed` always."""
    names: dict[str, object] = {"ed": ed}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eigendamage"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


def mistakes(tree: ast.Module, names: dict[str, object]) -> list[str]:
    """Names of this package that do not exist, and calls that do not fit what they call."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _resolve(node, names) is _NOTHING:
            found.append(f"line {node.lineno}: there is no {ast.unparse(node)}")
        if isinstance(node, ast.Call):
            called = _resolve(node.func, names)
            if callable(called) and called is not _NOTHING:
                found += _misfits(node, called)
    return found


def _resolve(node: ast.expr, names: dict[str, object]) -> object:
    """What a dotted name of this package is, `_NOTHING` if it lacks it, None if it is another's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        parent = _resolve(node.value, names)
        if isinstance(parent, ModuleType | type):
            return getattr(parent, node.attr, _NOTHING)
    return None


def _misfits(call: ast.Call, called: object) -> list[str]:
    if any(isinstance(each, ast.Starred) for each in call.args):
        return []
    keywords = {each.arg: None for each in call.keywords if each.arg is not None}
    try:
        inspect.signature(called).bind_partial(*call.args, **keywords)  # type: ignore[arg-type]
    except TypeError as error:
        return [f"line {call.lineno}: {ast.unparse(call.func)}: {error}"]
    return []
