"""The text of update rules: found and parsed.

A rule is written once, as Triton functions of straight-line arithmetic (`kernels/rules.py` says
what may stand in it). Triton compiles those, `as_c` makes C of their text and `as_torch` torch
functions.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from functools import cache
from pathlib import Path


@cache
def read(module: str) -> ast.Module:
    """A module's syntax tree, which is not to be changed. Triton need not be there.

    Raises:
        LookupError: if the module has no source file.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: __main__ has no spec
        spec = None
    text = _source(spec.loader, module) if spec else _main(module)
    if text is None:
        raise LookupError(
            f"module {module!r} has no source file; update rules are read as text, so they must "
            "be in a .py file that can be imported by that name"
        )
    return ast.parse(text)


def _source(loader: object, module: str) -> str | None:
    """What its own loader has: a module may lie in a zip file, and be in another encoding."""
    get_source = getattr(loader, "get_source", None)
    try:
        text: str | None = get_source(module) if get_source else None
    except (ImportError, OSError):
        return None
    return text


def _main(module: str) -> str | None:
    origin = getattr(sys.modules.get(module), "__file__", None)
    if origin is None or not Path(origin).is_file():
        return None
    return Path(origin).read_text(encoding="utf-8")


@cache
def _functions(module: str) -> dict[str, ast.FunctionDef]:
    nodes = read(module).body
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def function(module: str, name: str) -> ast.FunctionDef:
    """One function at the top of a module.

    Raises:
        LookupError: if it is not there, naming those that are.
    """
    found = _functions(module)
    if name not in found:
        raise LookupError(f"{module} has no function {name!r}; it has: {', '.join(found)}")
    return found[name]


def n_unpacked(function: ast.FunctionDef, argument: str) -> int | None:
    """Into how many names a function unpacks `argument`, or None if it does not."""
    for node in function.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == argument:
            (target,) = node.targets
            return len(target.elts) if isinstance(target, ast.Tuple) else None
    return None
