"""docs/troubleshooting.md has every message that the library raises or warns with, and no other.

A message is compared by its fixed words. What is put in at run time is "…", in the code's strings
and on the page: `f"{name} must be an int, got {value!r}"` is "… must be an int, got …".
An entry of the page is a heading, which quotes a part of a message, with a cause and a remedy below
it; a line "Also:" quotes more messages of the same cause.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "…"
# Calls that take a message, beside those of exceptions, and which argument it is.
TAKERS = {"warn": 0, "_warn": -1, "note": 0, "fail": 0, "_fail": 0, "unless_done": 0, "detach": 0}
# Functions that return messages, or the end of one.
GIVERS = {
    *("_refusal", "refusal", "disagreement", "_unsupported", "_hangs", "_engine", "_engines"),
    *("_triton_missing", "why_not", "why_no_products", "fault", "reason", "keeps_precision"),
}
# Not for users: errors of ours, and what a mapping or an attribute says by its name alone.
INTERNAL = {"AssertionError", "NotImplementedError", "StopIteration", "KeyError"}
# What has fewer fixed letters says nothing by itself: its words come from a TAKER or a GIVER.
LEAST = 12

Strings = Mapping[str, ast.expr]


class Reader:
    """Reads the messages of modules.

    Args:
        trees: of the modules, by name.
    """

    def __init__(self, trees: Mapping[str, ast.Module]) -> None:
        self._trees = trees
        self._shared: dict[str, tuple[Strings, ast.expr]] = {}
        for tree in trees.values():
            own = _assigned(tree)
            self._shared |= {name: (own, value) for name, value in own.items() if name.isupper()}

    def messages(self) -> dict[str, str]:
        """Each message, and where it is made."""
        found = {}
        for name, tree in self._trees.items():
            for node, strings in _expressions(tree, _assigned(tree)):
                for part in (node.body, node.orelse) if isinstance(node, ast.IfExp) else (node,):
                    text = self._text(part, strings)
                    if len(re.sub(r"\W", "", text)) >= LEAST:
                        found[text] = f"{name}:{node.lineno}"
        return found

    def _text(self, node: ast.expr, strings: Strings) -> str:
        """The fixed words, with "…" for the rest."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return re.sub(r"\{[^{}]*\}", HOLE, node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self._text(part, strings) for part in node.values)
        if isinstance(node, ast.FormattedValue) and node.conversion == -1:  # not {value!r}
            return self._text(node.value, strings)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._text(node.left, strings) + self._text(node.right, strings)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("format", "replace"):
            assert isinstance(node.func, ast.Attribute)
            return self._text(node.func.value, strings)
        if isinstance(node, ast.Name) and node.id in strings:
            return self._text(strings[node.id], {k: v for k, v in strings.items() if k != node.id})
        if isinstance(node, ast.Name) and node.id in self._shared:
            return self._text(self._shared[node.id][1], self._shared[node.id][0])
        return HOLE


def _assigned(tree: ast.Module | ast.FunctionDef) -> Strings:
    """What the names of a module or function stand for, where each is assigned once."""
    found: dict[str, ast.expr] = {}
    nodes = ast.walk(tree) if isinstance(tree, ast.FunctionDef) else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found[name] = ast.Constant(None) if name in found else node.value
    return found


def _expressions(
    tree: ast.AST, strings: Strings, giver: bool = False
) -> Iterator[tuple[ast.expr, Strings]]:
    """What is raised, warned with, noted as a reason or returned as one."""
    for node in ast.iter_child_nodes(tree):
        inner, gives = strings, giver
        if isinstance(node, ast.FunctionDef):
            inner, gives = {**strings, **_assigned(node)}, node.name in GIVERS
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if node.exc.args and getattr(node.exc.func, "id", "") not in INTERNAL:
                yield node.exc.args[0], inner
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in TAKERS and node.args:
                yield node.args[TAKERS[name]], inner
        elif isinstance(node, ast.Return) and giver and node.value is not None:
            value = node.value
            if isinstance(value, ast.List) and value.elts:
                value = value.elts[0]
            if isinstance(value, ast.Call) and value.args and isinstance(value.func, ast.Name):
                value = value.args[0]  # of an exception
            yield value, inner
        yield from _expressions(node, inner, gives)


def read_sources() -> dict[str, str]:
    """Every message of the library, and where it is made."""
    files = sorted((ROOT / "fusedaccum").rglob("*.py"))
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in files
    }
    return Reader(trees).messages()


def read_page(text: str) -> dict[str, list[str]]:
    """What each entry of the page quotes, by its heading."""
    found = {}
    for entry in re.split(r"^### ", text, flags=re.M)[1:]:
        heading, _, rest = entry.partition("\n")
        rest = rest.split("\n## ")[0]
        also = re.match(r"\s*Also: (.*?)\n\n", rest, re.S)
        quoted = re.findall(r"`(.+?)`", heading) + re.findall(r"`([^`]+)`", also[1] if also else "")
        found[heading] = quoted = [" ".join(quote.split()) for quote in quoted]
        assert quoted, f"{heading}: a heading quotes a message"
        for part in ("**Cause.** ", "**What to do.** "):
            assert rest.count(f"\n{part}") == 1, f"{heading}: has one paragraph that begins {part}"
    return found


MESSAGES = read_sources()
ENTRIES = read_page(PAGE.read_text(encoding="utf-8"))
QUOTED = [quote for quotes in ENTRIES.values() for quote in quotes]


def matches(quote: str, message: str) -> bool:
    """Whether the message has the quoted words, beside one another."""
    return quote in message


def test_every_message_has_an_entry() -> None:
    missing = [
        f"{where}: {message}"
        for message, where in MESSAGES.items()
        if not any(matches(quote, message) for quote in QUOTED)
    ]
    assert missing == [], "docs/troubleshooting.md quotes none of these"


def test_every_entry_is_of_a_message() -> None:
    unknown = [quote for quote in QUOTED if not any(matches(quote, m) for m in MESSAGES)]
    assert unknown == [], "no message of the library has these words"


def test_quotations_say_enough() -> None:
    short = [quote for quote in QUOTED if len(re.sub(r"\W", "", quote)) < LEAST]
    assert short == []
    assert len(set(QUOTED)) == len(QUOTED)
    for quote in QUOTED:
        assert sum(matches(quote, message) for message in MESSAGES) < 10, f"{quote} is too general"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('raise ValueError(f"it must be a number, got {x!r}")', "it must be a number, got …"),
        ('WHY = "a longer reason"\nraise TypeError(f"{WHY}: {1}")', "a longer reason: …"),
        ('def f():\n    why = "a longer reason"\n    raise TypeError(why)', "a longer reason"),
        ('warnings.warn("it is slow " + "today", RuntimeWarning)', "it is slow today"),
        ('self.fail(TEXT.format(1))\nTEXT = "the shape is {}, then"', "the shape is …, then"),
        ('def _refusal(x):\n    return "with mixed precision"', "with mixed precision"),
        ('def f():\n    raise AssertionError("of ours alone, never seen")', None),
        ('def f(x):\n    raise ValueError(x)', None),
    ],
)  # fmt: skip
def test_a_message_is_read(code: str, message: str | None) -> None:
    assert [*Reader({"x": ast.parse(code)}).messages()] == ([] if message is None else [message])
