"""`opt.metrics()` and the line in the log, with several processes: the same in all of them.

metrics_cases.py is what they run. All gradients are of ones, so a norm is known.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import Groups

ENGINES = ["ddp", "group", "fsdp2", "zero1"]
CASES = [
    *(f"{engine}-{window}" for engine in ENGINES for window in ("plain", "weights")),
    "ddp-loop", "ddp-wrapped", "ddp-scaler", "group-loop", "fsdp2-loop",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    folder = tmp_path_factory.mktemp("group")
    return Groups("tests.distributed.metrics_cases", {2: [f"logged:{c}" for c in CASES]}, folder)


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_the_same_in_all_processes(results: Groups, case: str) -> None:
    window = case.split("-")[1]
    found: Any = results(2, f"logged:{case}")
    first, second = eval(found["metrics"], {"nan": float("nan"), "inf": float("inf")})
    assert (first["updates"], first["skipped_steps"]) == (1, 0)
    assert (second["updates"], second["skipped_steps"]) == (2, 1)
    # A gradient of ones, 64 * 64 of them; where the loop owns the window, the sum of two.
    assert first["grad_norm"] == (128.0 if window == "loop" else 64.0)
    assert first["clip_coefficient"] == pytest.approx(1 / first["grad_norm"], rel=1e-6)
    assert second["grad_norm"] != second["grad_norm"]
    if window == "loop":
        assert "weight_sum" not in first and "micro_batches" not in first
    else:
        expected = (1 + 2 + 11 + 12, 21 + 22 + 31 + 32) if window == "weights" else (4, 4)
        assert (first["weight_sum"], second["weight_sum"]) == expected
        assert first["micro_batches"] == second["micro_batches"] == 2
    if window == "scaler":
        assert (first["loss_scale"], second["loss_scale"]) == (4.0, 2.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_line_in_the_log(results: Groups, engine: str) -> None:
    (line,) = results(2, f"logged:{engine}-plain")["lines"]
    assert line.startswith("FusedAccumOptimizer(SGD): 1 tensor, 4,096 parameters on cpu; ")
    assert line.endswith("; 2 processes")
    share = 2 if engine == "fsdp2" else 4
    kept = f"({share} of parameters, {share} of accumulators, 0 of masters, 0 of states)"
    assert f"; {2 * share} bytes per parameter {kept}; " in line
