"""The text of update rules: found, parsed, and made into plain torch.

A rule is written once, as Triton functions of straight-line arithmetic (`kernels/rules.py` says
what may stand in it). Triton compiles those; `backends/cgen.py` makes C of the same text; and
`as_torch` makes torch functions of it, for rules that come without a reference of their own.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@cache
def functions(module: str) -> dict[str, ast.FunctionDef]:
    """The functions at the top of a module, by name. Read as text: Triton need not be there.

    Raises:
        LookupError: if the module has no source file.
    """
    nodes = ast.parse(_source(module)).body
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def _source(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: __main__ has no spec
        spec = None
    origin = spec.origin if spec else getattr(sys.modules.get(module), "__file__", None)
    if origin is None or not Path(origin).is_file():
        raise LookupError(
            f"module {module!r} has no source file; update rules are read as text, so they must "
            "be in a .py file that can be imported by that name"
        )
    return Path(origin).read_text(encoding="utf-8")


def function(module: str, name: str) -> ast.FunctionDef:
    """One function of a module.

    Raises:
        LookupError: if it is not there, naming those that are.
    """
    found = functions(module)
    if name not in found:
        raise LookupError(f"{module} has no function {name!r}; it has: {', '.join(found)}")
    return found[name]


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            # Of two numbers torch would make a tensor of its default dtype.
            a = torch.tensor(a, dtype=torch.float32, device=condition.device)
        return torch.where(condition, a, b)
    return a if condition else b


def _number(of_tensor: Any, of_float: Any) -> Any:
    """A function of tensors, and of floats the way IEEE has it: NaN and inf instead of errors."""

    def apply(x: Any) -> Any:
        if isinstance(x, Tensor):
            return of_tensor(x)
        try:
            return of_float(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return -math.inf if x == 0 else math.nan

    return apply


# What a rule may call, for tensors and for Python floats.
_LANGUAGE = SimpleNamespace(
    abs=abs,
    constexpr=lambda value: value,
    exp=_number(torch.exp, math.exp),
    log=_number(torch.log, math.log),
    maximum=lambda a, b: _where(a > b, a, b),
    minimum=lambda a, b: _where(a < b, a, b),
    sqrt=_number(torch.sqrt, math.sqrt),
    where=_where,
)


@cache
def as_torch(module: str) -> SimpleNamespace:
    """A module's functions as plain Python: elements are tensors, scalars are floats."""
    body: list[ast.stmt] = []
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
            body.append(node)
        elif isinstance(node, ast.Assign) and _is_constant(node.value):
            body.append(node)
    namespace: dict[str, Any] = {"tl": _LANGUAGE}
    exec(compile(ast.Module(body, []), f"<{module} in torch>", "exec"), namespace)
    return SimpleNamespace(**namespace)


def _is_constant(node: ast.expr) -> bool:
    """`0.5`, `-0.5` or `tl.constexpr(0.5)`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.constexpr":
        (node,) = node.args
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant)
