"""The house rules that a reader of the tree relies on: which way imports point, that no room reads
another's private names, and how long files may be.

A room is a folder of `fusedaccum`, or a module beside them; `backends/compiled` is a part of
`backends`. A room may use the rooms that `ROOMS` lists for it and nothing else. Inside a room the
imports of its modules have no circle.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400

# Each room with the rooms that it may use, from the bottom to the top: only earlier ones.
ROOMS: dict[str, str] = {
    "kernels": "",
    "rules": "",
    "backends": "kernels rules",
    "functional": "kernels backends rules",
    "window": "backends",
    "options": "rules",
    "update": "kernels backends rules options window",
    "distributed": "backends options window",
    "integrations": "rules window update",
    "core": "backends rules options window update distributed integrations",
    "optimizer": "options update integrations core",
    "package": "functional optimizer rules",
    "doctor": "kernels backends rules package",
    "bench": "backends window doctor",
    "__main__": "package doctor bench",
}
KERNELS = "fusedaccum.kernels"
# What a module may import beside ours and the standard library, where that is not free.
THIRD_PARTY = {"fusedaccum.backends.reference": {"torch"}, "fusedaccum.kernels": {"triton"}}


def sources() -> dict[str, Path]:
    """Every module of ours, kernels included, by its dotted name."""
    found = {}
    for directory, subdirectories, files in os.walk(ROOT / "fusedaccum", followlinks=True):
        subdirectories[:] = [name for name in subdirectories if name != "__pycache__"]
        for file in files:
            path = Path(directory, file)
            if path.suffix == ".py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def room(module: str) -> str:
    """The room that `module` is in; the package's own names are the room "package"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "package"


def imported(module: str, text: str) -> list[tuple[str, tuple[str, ...]]]:
    """What `text` imports, anywhere in it: a module's absolute name, and the names taken from it.

    `from a.b import c` is the module `a.b.c` where that is one of ours, else `c` of `a.b`.
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if module in PACKAGES else node.level
                package = module.split(".")[: len(module.split(".")) - up]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_room = base == "fusedaccum" and alias.name in ROOMS
                is_module = inner in SOURCES or inner == KERNELS or is_room
                found.append((inner, ()) if is_module else (base, (alias.name,)))
    return found


def violations(module: str, text: str) -> list[str]:
    own = room(module)
    if own not in ROOMS:
        return [f"{module} is in no room: place {own!r} in ROOMS"]
    found = []
    for name, taken in imported(module, text):
        top = name.split(".")[0]
        if top == "kernels":
            found.append(f"{module} imports {name}: the kernels are imported as {KERNELS}")
        elif top == "fusedaccum":
            other = room(name)
            if other not in ROOMS:
                found.append(f"{module} imports {name}, which is in no room")
            elif other != own:
                if other not in ROOMS[own].split():
                    found.append(
                        f"{module} imports {name}: {own} may use {ROOMS[own] or 'nothing'}"
                    )
                found += [
                    f"{module} imports the private name {x} of {name}"
                    for x in (*taken, name.split(".")[-1])
                    if x.startswith("_") and not x.startswith("__") and other != "kernels"
                ]
        else:
            free = THIRD_PARTY.get(KERNELS if own == "kernels" else module)
            if free is not None and top not in free and top not in sys.stdlib_module_names:
                found.append(f"{module} imports {name}: beside ours only {', '.join(free)}")
    return found


def owners(tree: ast.AST) -> set[str]:
    """The private names that `tree` defines: of its functions, classes, attributes and slots."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[a-zA-Z]\w*", name))


PRIVATE = {
    module: owners(ast.parse(path.read_text(encoding="utf-8")))
    for module, path in SOURCES.items()
    if room(module) != "kernels"
}


def private_access(module: str, text: str) -> list[str]:
    """Where `text` reads a private name that only other rooms define, `__dict__["_x"]` and
    `getattr(x, "_x")` included."""
    own = room(module)
    here = set().union(*(names for m, names in PRIVATE.items() if room(m) == own))
    there = set().union(*(names for m, names in PRIVATE.items() if room(m) != own)) - here
    tree = ast.parse(text)
    read = [(n.attr, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    for node in ast.walk(tree):
        of = None
        if isinstance(node, ast.Subscript):
            of = node.slice
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            of = node.args[1]
        if isinstance(of, ast.Constant) and isinstance(of.value, str):
            read.append((of.value, of.lineno))
    return [f"{module}:{line} reads {name}" for name, line in read if name in there]


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_one_way(module: str) -> None:
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_the_rooms_are_few_and_in_order() -> None:
    assert list(ROOMS)[-1] == "__main__"
    above: set[str] = set()
    for name, below in ROOMS.items():
        assert set(below.split()) <= above, f"{name} uses a room that comes later"
        above.add(name)
    top_level = {room(module) for module in SOURCES} - {"package", "__main__", "kernels"}
    assert top_level == set(ROOMS) - {"package", "__main__", "kernels"}
    assert len(top_level) <= 12
    assert sum(len(below.split()) for below in ROOMS.values()) < 45


def test_every_arrow_is_used() -> None:
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module, path in SOURCES.items():
        for name, _ in imported(module, path.read_text(encoding="utf-8")):
            if name.split(".")[0] == "fusedaccum":
                used[room(module)].add(room(name))
    unused = {
        name: set(below.split()) - used[name]
        for name, below in ROOMS.items()
        if set(below.split()) - used[name]
    }
    assert unused == {}


@pytest.mark.parametrize("name", ROOMS)
def test_no_circle_inside_a_room(name: str) -> None:
    arrows = {
        module: {
            target
            for target, _ in imported(module, path.read_text(encoding="utf-8"))
            if target in SOURCES and target != module and room(target) == name
        }
        for module, path in SOURCES.items()
        if room(module) == name
    }
    while arrows:
        free = {module for module, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in free}


@pytest.mark.parametrize("module", sorted(PRIVATE))
def test_no_room_reads_the_private_names_of_another(module: str) -> None:
    assert private_access(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fusedaccum.functional.run", "from fusedaccum.optimizer import FusedAccumOptimizer"),
        ("fusedaccum.functional.run", "from .. import optimizer"),
        ("fusedaccum.functional.run", "from fusedaccum import FusedAccumOptimizer"),
        ("fusedaccum.backends.aten", "def f():\n    from ..functional import accumulate_"),
        ("fusedaccum.rules.builtin", "import fusedaccum.backends.triton"),
        ("fusedaccum.window.collector", "from ..update.updater import Updater"),
        ("fusedaccum.rules.builtin", "from ..window import slots"),
        ("fusedaccum.kernels.step", "from ..backends.tables import AddressTable"),
        ("fusedaccum.kernels.step", "import torch"),
        ("fusedaccum.backends.triton", "from kernels import step"),
        ("fusedaccum.backends.reference", "import numpy"),
        ("fusedaccum.newcomer", ""),
        ("fusedaccum.optimizer", "from .newcomer import something"),
        ("fusedaccum.core", "from .window.hooks import _secret"),
        ("fusedaccum", "from .__main__ import main"),
    ],
)
def test_a_wrong_import_is_found(module: str, text: str) -> None:
    assert len(violations(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fusedaccum.functional.run", "from .. import backends\nfrom ..backends import triton"),
        ("fusedaccum.backends.triton", "import triton\nfrom ..kernels.step import step_kernel"),
        ("fusedaccum.kernels.step", "import triton.language as tl\nfrom ._math import add"),
        ("fusedaccum.backends.reference", "import math\nimport torch"),
        ("fusedaccum.core", "from fusedaccum.window.weights import Window"),
        ("fusedaccum", "from .optimizer import X"),
    ],
)
def test_a_right_import_is_not(module: str, text: str) -> None:
    assert violations(module, text) == []


@pytest.mark.parametrize(
    "text",
    ["x._core", 'x.__dict__["_core"]', 'getattr(x, "_core")', 'setattr(x, "_core", 1)'],
)
def test_a_private_access_is_found(text: str) -> None:
    assert len(private_access("fusedaccum.window.hooks", text)) == 1
    assert private_access("fusedaccum.optimizer", text) == []


def test_files_fit_a_reader() -> None:
    files = [
        Path(directory, file)
        for directory, _, names in os.walk(ROOT / "fusedaccum", followlinks=True)
        for file in names
        if file.endswith((".py", ".c", ".h"))
    ]
    assert files
    lengths = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in files
    }
    assert {file: n for file, n in lengths.items() if n > MAX_LINES} == {}


def test_importing_it_imports_little_beside_torch() -> None:
    """torch's compiler takes two seconds, Triton one: who needs them imports them."""
    code = "import sys, torch, fusedaccum; print(*(m for m in sys.argv[1:] if m in sys.modules))"
    late = ["torch._dynamo", "torch.distributed.fsdp", "triton", "transformers", "matplotlib"]
    done = subprocess.run(
        [sys.executable, "-c", code, *late], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
