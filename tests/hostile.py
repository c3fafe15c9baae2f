"""A program that trains by compiled loops, in processes of their own, in whatever world a test
makes: shell scripts as compilers, folders that cannot be used.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

from tests import forked

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

# Two updates of bf16 parameters through the public API. What it prints is what each test asserts.
PROGRAM = """
import hashlib, json, os, sys, time, warnings
import torch, fusedaccum
from fusedaccum.backends.compiled import compiler, libraries, openmp, store
from fusedaccum.doctor.machine import cpu_path

def train():
    params = [torch.nn.Parameter(torch.arange(n) / 7) for n in (3, 70_000)]
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    opt = fusedaccum.FusedAccumOptimizer(
        torch.optim.AdamW(params, lr=0.1), gradient_accumulation_steps=2, max_grad_norm=1.0
    )
    for i in range(4):
        torch.autograd.backward([p.view_as(p) for p in params], [p.detach() + i for p in params])
        opt.step()
        opt.zero_grad()
    digest = hashlib.sha256()
    for p in params:
        digest.update(p.detach().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()

{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    digest = train()
said = [str(w.message) for w in caught if "fusedaccum" in str(w.message)]
path = cpu_path(torch.bfloat16)[0]
{after}
print(json.dumps({{"digest": digest, "path": path, "warnings": said}}))
"""


def run_all(copies: int, before: str, after: str, **environment: str | None) -> list[Any]:
    """What each copy of the program printed; None takes a variable out of its environment."""
    program = PROGRAM.format(before=textwrap.dedent(before), after=textwrap.dedent(after))
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    results = forked.shared().run(program, variables, copies)
    for result in results:
        assert result.status == 0, result.output[-3000:]
    return [json.loads(result.output.splitlines()[-1]) for result in results]


def run(before: str = "", after: str = "", **environment: str | None) -> Any:
    """The same of one."""
    (printed,) = run_all(1, before, after, **environment)
    return printed


@functools.cache
def right() -> str:
    """The parameters that the updates lead to, from blocks of ATen operations."""
    printed = run(FUSEDACCUM_CC="0")
    assert printed["path"] == "ATen blocks" and printed["warnings"] == []
    return str(printed["digest"])


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return str(path)


# In a shell script: the name behind -o.
OUTPUT = 'for a; do [ "$before" = -o ] && out=$a; before=$a; done\n'
VERSION = '[ "$1" = --version ] && exec echo fake 1\n'
COUNT = f'[ "$1" = --version ] || echo x >> "$0.count"\nexec {CC} "$@"\n'


def compiles(compiler: str) -> int:
    """How often a compiler that has `COUNT` as its text compiled."""
    count = Path(f"{compiler}.count")
    return len(count.read_text().split()) if count.exists() else 0


def good(printed: dict[str, Any]) -> bool:
    return printed == {"digest": right(), "path": "compiled C loops", "warnings": []}


def fell_back(printed: dict[str, Any], *words: str) -> bool:
    """By blocks, the right result, and one warning that has all of these words."""
    (warning,) = printed["warnings"]
    is_right = printed["digest"] == right() and printed["path"] == "ATen blocks"
    return is_right and all(word in warning for word in (*words, "falls back to blocks"))
