"""The package's commands, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fusedaccum import __main__ as cli


def exit_status(*arguments: str) -> Any:
    """Of the command, run here: what it returns, or argparse exits with."""
    try:
        return cli.main(arguments)
    except SystemExit as exit_:
        return exit_.code


def run_compiling(cache: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m module ...` in a process in which Triton compiles, into this cache."""
    # Settings of whoever runs the tests (another ptxas, no optimisation) must not matter.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m fusedaccum ...` in a process of its own, on the CPU's own backend."""
    return subprocess.run(
        [sys.executable, "-m", "fusedaccum", *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
