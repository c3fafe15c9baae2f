"""The house rules that a reader of the tree relies on: which way imports point, and how long files
may be.

    cli → commands → optimizer → core → {checkpoint, dcp, describe} → entries → update
      → collect → {attached, by_hand, sums, scaling} → {segments, window} → backends → rules
      → {kernels, tables, buffers, ...} → nothing of ours
    functional → {adam_updates, updates} → apply → backends
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# A module imports only from strictly lower levels. A new module has to be placed here.
LEVELS = {
    "fusedaccum.foreign": 0,
    "fusedaccum.reference": 0,
    "fusedaccum.buffers": 0,
    "fusedaccum.rule_text": 0,
    "fusedaccum.frameworks": 0,
    "fusedaccum.tables": 0,
    "fusedaccum.timing": 0,
    "fusedaccum.engines": 0,
    "fusedaccum.sharing": 1,
    "fusedaccum.watch": 1,
    "fusedaccum.rounding": 1,
    "fusedaccum.arguments": 1,
    "fusedaccum.rules": 1,
    "fusedaccum.backends.base": 2,
    "fusedaccum.backends.cgen": 2,
    "fusedaccum.backends.compiler": 0,
    "fusedaccum.backends.native": 2,
    "fusedaccum.backends.store": 0,
    "fusedaccum.backends.torch": 3,
    "fusedaccum.backends.triton": 3,
    "fusedaccum.registry": 3,
    "fusedaccum.backends": 4,
    "fusedaccum.scaling": 5,
    "fusedaccum.apply": 5,
    "fusedaccum.segments": 5,
    "fusedaccum.window": 5,
    "fusedaccum.adam_updates": 6,
    "fusedaccum.attached": 6,
    "fusedaccum.backwards": 0,
    "fusedaccum.sums": 6,
    "fusedaccum.by_hand": 6,
    "fusedaccum.collect": 7,
    "fusedaccum.advice": 8,
    "fusedaccum.skips": 0,
    "fusedaccum.swap": 0,
    "fusedaccum.trouble": 0,
    "fusedaccum.malformed": 0,
    "fusedaccum.options": 2,
    "fusedaccum.updates": 6,
    "fusedaccum.functional": 7,
    "fusedaccum.update": 8,
    "fusedaccum.entries": 9,
    "fusedaccum.checkpoint": 10,
    "fusedaccum.dcp": 10,
    "fusedaccum.describe": 9,
    "fusedaccum.distributed": 9,
    "fusedaccum.linear": 9,
    "fusedaccum.core": 11,
    "fusedaccum.optimizer": 12,
    "fusedaccum": 13,
    "fusedaccum.commands": 0,
    "fusedaccum.commands.output": 0,
    "fusedaccum.commands.shapes": 0,
    "fusedaccum.commands.checks": 14,
    "fusedaccum.commands.machine": 14,
    "fusedaccum.commands.check_sums": 15,
    "fusedaccum.commands.check_windows": 16,
    "fusedaccum.commands.check_steps": 16,
    "fusedaccum.commands.doctor": 17,
    "fusedaccum.commands.forms": 17,
    "fusedaccum.commands.gate": 18,
    "fusedaccum.commands.bench": 19,
    "fusedaccum.cli": 20,
    "fusedaccum.__main__": 21,
}
KERNELS = "fusedaccum.kernels"
# Imports between two modules of one level that are wanted: (importer, imported).
SIBLINGS: set[tuple[str, str]] = set()
# What a module may import beside ours and the standard library, where that is not free.
THIRD_PARTY = {"fusedaccum.reference": {"torch"}, KERNELS: {"triton"}}


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


def is_kernel(module: str) -> bool:
    return module == KERNELS or module.startswith(KERNELS + ".")


def level(module: str) -> int | None:
    return 0 if is_kernel(module) else LEVELS.get(module)


def imported(module: str, text: str, *, is_package: bool = False) -> set[str]:
    """Absolute names of everything that `text` imports, anywhere in it, as far as it is a module.

    `from a.b import c` is `a.b.c` where that is a module of ours, else `a.b`.
    """
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                package = module.split(".")[: len(module.split(".")) - up]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in SOURCES or inner in LEVELS or inner == KERNELS
                names.add(inner if is_module else base)
    return names


def violations(module: str, text: str, *, is_package: bool = False) -> list[str]:
    own = level(module)
    if own is None:
        return [f"{module} has no level: place it in LEVELS"]
    found = []
    for name in sorted(imported(module, text, is_package=is_package)):
        top = name.split(".")[0]
        if top == "kernels":
            found.append(f"{module} imports {name}: the kernels are imported as {KERNELS}")
        elif top == "fusedaccum":
            target = level(name)
            allowed = (module, name) in SIBLINGS or (is_kernel(module) and is_kernel(name))
            if target is None:
                found.append(f"{module} imports {name}, which has no level: place it in LEVELS")
            elif target >= own and not allowed:
                found.append(f"{module} (level {own}) imports {name} (level {target})")
        else:
            free = THIRD_PARTY.get(KERNELS if is_kernel(module) else module)
            if free is not None and top not in free and top not in sys.stdlib_module_names:
                found.append(f"{module} imports {name}: beside ours only {', '.join(free)}")
    return found


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_one_way(module: str) -> None:
    path = SOURCES[module]
    text = path.read_text(encoding="utf-8")
    assert violations(module, text, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fusedaccum.functional", "from fusedaccum.optimizer import FusedAccumOptimizer"),
        ("fusedaccum.functional", "from . import optimizer"),
        ("fusedaccum.functional", "from fusedaccum import FusedAccumOptimizer"),
        ("fusedaccum.backends.torch", "def f():\n    from ..functional import accumulate_"),
        ("fusedaccum.backends.torch", "import fusedaccum.backends.triton"),
        ("fusedaccum.collect", "from .update import Updater"),
        ("fusedaccum.tables", "from fusedaccum.kernels import step"),
        ("fusedaccum.kernels.step", "from ..tables import AddressTable"),
        ("fusedaccum.kernels.step", "import torch"),
        ("fusedaccum.backends.triton", "from kernels import step"),
        ("fusedaccum.reference", "import numpy"),
        ("fusedaccum.reference", "from . import rules"),
        ("fusedaccum.newcomer", ""),
        ("fusedaccum.optimizer", "from .newcomer import something"),
    ],
)
def test_a_wrong_import_is_found(module: str, text: str) -> None:
    assert len(violations(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fusedaccum.functional", "from . import backends\nfrom .backends import triton"),
        ("fusedaccum.backends.triton", "import triton\nfrom ..kernels.step import step_kernel"),
        ("fusedaccum.kernels.step", "import triton.language as tl\nfrom ._math import add"),
        ("fusedaccum.reference", "import math\nimport torch"),
        ("fusedaccum.optimizer", "from fusedaccum.collect import Collector"),
    ],
)
def test_a_right_import_is_not(module: str, text: str) -> None:
    assert violations(module, text) == []


def test_the_package_itself_is_checked() -> None:
    found = violations("fusedaccum", "from .cli import main", is_package=True)
    assert len(found) == 1 and "fusedaccum.cli" in found[0]
    assert violations("fusedaccum", "from .optimizer import X", is_package=True) == []


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
