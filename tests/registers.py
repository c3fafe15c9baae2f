"""What has to hold of compiled kernels, and the table of their registers: kernels/REGISTERS.md.

Compiling all variants for all targets takes about four minutes of one core. So that is done once
for a source: `python -m tests.ahead_of_time --write` compiles all, holds the laws, and writes the
table with a digest of what it compiled. The tests compare the digest with that of today's source,
and compile a sample anew.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "REGISTERS.md"
WAY_OUT = "run `python -m tests.ahead_of_time --write`, and say in the commit what changed and why"
# ptxas may park a few values that a whole kernel needs, to fit one more block on a multiprocessor.
# In a variant for unaligned tensors that is left to it: four words.
MAX_UNALIGNED_SPILL = 16
# One program an update: two words of local memory are nothing.
FINALIZE_SPILL = 8
# The same, two words, in a few variants that are rarely used. Not to grow.
KNOWN_SPILLS = {
    ("sm_100", "accumulate-fp16-first-norm"): 8,
    ("sm_80", "step-adadelta-bf16-fp32"): 8,
    ("sm_100", "step-adadelta-bf16-stochastic"): 8,
    ("sm_120", "step-adadelta-bf16-stochastic"): 8,
    ("sm_120", "step-rmsprop_centered_momentum-bf16-none"): 8,
    ("sm_120", "step-rmsprop_centered_momentum-fp16-none"): 8,
    ("sm_120", "step-rmsprop_centered_momentum-bf16-stochastic"): 8,
}
# Variants of each kernel that the tests compile for each target, and as many for unaligned tensors.
SAMPLES = 1

Rows = dict[str, dict[str, Any]]


def broken_laws(target: str, rows: Rows) -> list[str]:
    """Sentences about variants that do not compile, spill, or move less at once than they could."""
    found = []
    for name, row in rows.items():
        if row["error"]:
            found.append(f"{target}: {name} does not compile: {row['error']}")
            continue
        allowed = KNOWN_SPILLS.get((target, name), 0 if row["is_aligned"] else MAX_UNALIGNED_SPILL)
        if name.startswith("finalize-"):
            allowed = FINALIZE_SPILL
        if row["spills"] > allowed:
            found.append(f"{target}: {name} spills {row['spills']} bytes, at most {allowed}")
        if row["is_aligned"] and row["faults"]:
            found.append(f"{target}: {name} has {', '.join(row['faults'])}")
        if not row["is_aligned"] and not row["faults"]:
            found.append(f"{target}: {name} passes as if its tensors were aligned")
    return found


# --- one digest for all that is compiled ---


def digest(launches: list[str]) -> str:
    """Of the kernels' source and of every launch."""
    parts = [tree(path.read_text(encoding="utf-8")) for path in sorted(TABLE.parent.glob("*.py"))]
    return hashlib.sha256("\n".join(parts + launches).encode()).hexdigest()[:16]


def tree(text: str) -> str:
    """What Python text means, without comments and docstrings, the same in all Python versions."""
    module = ast.parse(text)
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            del node.body[0]
    return str(_plain(module))


def _plain(node: Any) -> Any:
    """`ast.dump` as nested lists. Empty fields are left out: new versions of Python add some."""
    if isinstance(node, ast.AST):
        fields = [(k, _plain(v)) for k, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, *fields]
    return [_plain(each) for each in node] if isinstance(node, list) else repr(node)


def sample(today: str, target: str, names: list[str]) -> set[str]:
    """Some variants of each kernel, aligned and not. The digest chooses: a new source, new ones."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    order = {name: hashlib.sha256(f"{today} {target} {name}".encode()).digest() for name in names}
    for name in sorted(order, key=order.__getitem__):
        kinds.setdefault((name.split("-")[0], name.endswith("-unaligned")), []).append(name)
    return {name for kind in kinds.values() for name in kind[:SAMPLES]}


# --- the table ---


@dataclass(frozen=True)
class Recorded:
    """REGISTERS.md: what was compiled, with which Triton, and registers by target and variant."""

    triton: str
    digest: str
    registers: dict[str, dict[str, int]]


def read() -> Recorded:
    text = TABLE.read_text(encoding="utf-8")
    made = re.search(r"^Triton (\S+), digest (\w+)$", text, re.M)
    assert made, f"{TABLE.name} has no line 'Triton <version>, digest <digest>'; {WAY_OUT}"
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    columns = dict(enumerate(header[1:], start=1))
    return Recorded(
        *made.groups(), {name: {r[0]: int(r[i]) for r in rows} for i, name in columns.items()}
    )


def write(today: str, reports: dict[str, Rows]) -> None:
    lines = [
        "# Registers of every kernel variant",
        "",
        "Per thread, as the compiler allots them: registers on NVIDIA, VGPRs on AMD (gfx942), for",
        "tensors at aligned addresses. Made by `python -m tests.ahead_of_time --write`, no GPU.",
        "The digest is of the kernels' source and of every launch: the tests fail where it is not",
        "today's. A commit that changes a number says why.",
        "",
        f"Triton {triton.__version__}, digest {today}",
        "",
        "| variant | " + " | ".join(reports) + " |",
        "|---|" + "--:|" * len(reports),
    ]
    for name, row in next(iter(reports.values())).items():
        if row["is_aligned"]:
            cells = [str(rows[name]["registers"]) for rows in reports.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def changed(target: str, rows: Rows, recorded: Recorded, names: list[str]) -> list[str]:
    """What the table has otherwise: other variants, and other registers if Triton is the same."""
    listed = recorded.registers[target]
    aligned = {name for name in names if not name.endswith("-unaligned")}
    found = [f"{target}: {name} is in one list only; {WAY_OUT}" for name in aligned ^ set(listed)]
    if recorded.triton != triton.__version__:
        return found
    for name in sorted(rows.keys() & listed.keys()):
        now = rows[name].get("registers")
        if now != listed[name]:
            found.append(f"{target}: {name}: {now} registers, listed {listed[name]}; {WAY_OUT}")
    return found
