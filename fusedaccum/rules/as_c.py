"""The elements' function of a rule as C, translated from its Triton text, statement by statement.

Operations stay in their order. The loop around them is `backends/compiled/source.py`.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

_CALLS = {"sqrt": "sqrtf", "abs": "fabsf"}
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPARISONS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


class Loop(NamedTuple):
    """The inside of a loop over elements, where `param` and `grad` are there.

    Attributes:
        states, scalars: names under which the body finds them.
        body: statements that leave the new parameter in `param`.
        results: an expression for each new state.
    """

    states: list[str]
    scalars: list[str]
    body: list[str]
    results: list[str]


def translate(function: ast.FunctionDef) -> Loop:
    """The function of a rule's elements in C.

    Raises:
        ValueError: naming what is no straight-line arithmetic.
    """
    unpacked: dict[str, list[str]] = {"states": [], "scalars": []}
    declared = {"param", "grad"}
    body: list[str] = []
    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Tuple):
            param, states = statement.value.elts
            if not (isinstance(param, ast.Name) and param.id == "param"):
                raise _unsupported(function, statement)
            results = states.elts if isinstance(states, ast.Tuple) else []
            expressions = [_expression(function, result) for result in results]
            return Loop(unpacked["states"], unpacked["scalars"], body, expressions)
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _unsupported(function, statement)
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Name):
            names = [element.id for element in target.elts if isinstance(element, ast.Name)]
            unpacked[value.id] = names
            declared.update(names)
        elif isinstance(target, ast.Name):
            kind = "" if target.id in declared else "float "
            declared.add(target.id)
            body.append(f"{kind}{target.id} = {_expression(function, value)};")
        else:
            raise _unsupported(function, statement)
    raise _unsupported(function, function)


def _expression(function: ast.FunctionDef, node: ast.expr) -> str:
    """A Python expression as C, in the same order of operations."""

    def c(child: ast.expr) -> str:
        return _expression(function, child)

    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return f"{float(node.value)!r}f"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return f"(-{c(node.operand)})"
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return f"({c(node.left)} {_OPERATORS[type(node.op)]} {c(node.right)})"
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        return f"({c(node.left)} {_COMPARISONS[type(node.ops[0])]} {c(node.comparators[0])})"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name, arguments = node.func.attr, [c(a) for a in node.args]
        if name in _CALLS:
            return f"{_CALLS[name]}({arguments[0]})"
        if name == "where":
            return f"({arguments[0]} ? {arguments[1]} : {arguments[2]})"
        if name in ("maximum", "minimum"):
            sign = ">" if name == "maximum" else "<"
            a, b = arguments
            return f"({a} {sign} {b} ? {a} : {b})"
    raise _unsupported(function, node)


def _unsupported(function: ast.FunctionDef, node: ast.AST) -> ValueError:
    return ValueError(
        f"rule {function.name}: {ast.unparse(node)!r} cannot be translated to C; a rule is "
        "assignments of + - * /, comparisons and tl.sqrt, abs, maximum, minimum, where"
    )
