"""The elements' function of a rule as C, translated from its Triton text, statement by statement.

Operations stay in their order. The loop around them is `backends/compiled/source.py`. All names of
a rule but its arguments get a `_` at their end, so that none is a word of C or a name of the loop.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

ARGUMENTS = ("param", "grad", "states", "scalars")
_CALLS = {"sqrt": "sqrtf", "abs": "fabsf"}
_N_ARGUMENTS = {"sqrt": 1, "abs": 1, "where": 3, "maximum": 2, "minimum": 2}
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
        states, scalars: names under which the body finds them; one that comes twice is the last.
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
    if tuple(argument.arg for argument in function.args.args) != ARGUMENTS:
        raise _unsupported(function, function.args)
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
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Name) and value.id in unpacked:
            names = [_name(element) for element in target.elts if isinstance(element, ast.Name)]
            unpacked[value.id] = names
            declared.update(names)
        elif isinstance(target, ast.Name):
            name = _name(target)
            kind = "" if name in declared else "float "
            declared.add(name)
            body.append(f"{kind}{name} = {_expression(function, value)};")
        else:
            raise _unsupported(function, statement)
    raise _unsupported(function, function)


def _expression(function: ast.FunctionDef, node: ast.expr) -> str:
    """A Python expression as C, in the same order of operations."""

    def c(child: ast.expr) -> str:
        return _expression(function, child)

    if isinstance(node, ast.Name):
        return _name(node)
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
        if node.keywords or len(arguments) != _N_ARGUMENTS.get(name):
            raise _unsupported(function, node)
        if name in _CALLS:
            return f"{_CALLS[name]}({arguments[0]})"
        if name == "where":
            return f"({arguments[0]} ? {arguments[1]} : {arguments[2]})"
        if name in ("maximum", "minimum"):
            sign = ">" if name == "maximum" else "<"
            a, b = arguments
            return f"({a} {sign} {b} ? {a} : {b})"
    raise _unsupported(function, node)


def _name(node: ast.Name) -> str:
    return node.id if node.id in ARGUMENTS else f"{node.id}_"


def _unsupported(function: ast.FunctionDef, node: ast.AST) -> ValueError:
    return ValueError(
        f"rule {function.name}: {ast.unparse(node)!r} cannot be translated to C; a rule is "
        "assignments of + - * /, comparisons and tl.sqrt, abs, maximum, minimum, where"
    )
