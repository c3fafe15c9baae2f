"""Update rules as plain torch, made from their Triton text.

They say what a rule means: in float64 they are held against `torch.optim`, in fp32 they are what
the torch backend runs where there are no compiled loops.
"""

from __future__ import annotations

import ast
import copy
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import text


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


def _language(dtype: torch.dtype) -> SimpleNamespace:
    """What a rule may call, for Python floats and for tensors of `dtype`."""

    def where(condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, Tensor):
            return a if condition else b
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            # Of two numbers torch would make a tensor of its default dtype.
            a = torch.tensor(a, dtype=dtype, device=condition.device)
        return torch.where(condition, a, b)

    return SimpleNamespace(
        abs=abs,
        constexpr=lambda value: value,
        exp=_number(torch.exp, math.exp),
        log=_number(torch.log, math.log),
        maximum=lambda a, b: where(a > b, a, b),
        minimum=lambda a, b: where(a < b, a, b),
        sqrt=_number(torch.sqrt, math.sqrt),
        where=where,
    )


@cache
def as_torch(module: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """A module's functions as plain Python: elements are tensors of `dtype`, scalars are floats."""
    body: list[ast.stmt] = []
    for node in text.read(module).body:
        if isinstance(node, ast.FunctionDef):
            plain = copy.copy(node)
            plain.decorator_list = []
            body.append(plain)
        elif isinstance(node, ast.Assign) and _is_constant(node.value):
            body.append(node)
    namespace: dict[str, Any] = {"tl": _language(dtype)}
    exec(compile(ast.Module(body, []), f"<{module} in torch>", "exec"), namespace)
    return SimpleNamespace(**namespace)


def _is_constant(node: ast.expr) -> bool:
    """`0.5`, `-0.5` or `tl.constexpr(0.5)`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.constexpr":
        (node,) = node.args
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant)
