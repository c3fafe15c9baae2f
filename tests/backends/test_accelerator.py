"""A device that is neither a CPU nor a CUDA GPU, and has no float64, as Apple's GPUs have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import accelerator
from tests.commands import run_compiling


@pytest.mark.skipif(accelerator.COMPILER is None, reason="needs a C++ compiler")
def test_what_runs_on_a_cpu_runs_there(tmp_path: Path) -> None:
    run = run_compiling(tmp_path, "tests.accelerator")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    names = [case.__name__ for case in accelerator.CASES]
    assert run.stdout.splitlines()[: len(names)] == names
