"""Trainer, Accelerate and Lightning on DDP, started by torchrun with two processes.

Each run in fp32 is that of the plain optimizer on the same framework, to what rounding may do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

ROOT = Path(__file__).resolve().parents[2]
CASES = ["trainer", "accelerate:window", "accelerate:each", "lightning"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    launch = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    program = ["-m", "tests.distributed.framework_cases", str(folder), *CASES]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    results = [torch.load(folder / f"results-{rank}") for rank in range(2)]
    return processes.agreeing(results)


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_plain_optimizers(two: Callable[[str], dict[str, Any]], case: str) -> None:
    result = two(case)
    assert result["differences"] == []
    assert result["same"] and result["learnt"]
    assert result["control"] >= 3  # a learning rate that is off by 1e-4 of itself is seen
