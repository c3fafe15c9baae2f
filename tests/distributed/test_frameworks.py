"""Trainer, Accelerate and Lightning on DDP and FSDP2, started by torchrun with two processes.

Each run in fp32 is that of the plain optimizer on the same framework, to what rounding may do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import processes

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

RUNS = [
    f"{name}:{engine}"
    for engine in ("ddp", "fsdp2")
    for name in ("trainer", "accelerate-window", "accelerate-each", "lightning")
]
DTYPES = ["float32", "bfloat16"]
CASES = [*RUNS, "arrives:bfloat16", *(f"resumed:{dtype}" for dtype in DTYPES)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    processes.torchrun(2, "-m", "tests.distributed.framework_cases", str(folder), *CASES)
    results = [torch.load(folder / f"results-{rank}") for rank in range(2)]
    return processes.agreeing(results)


@pytest.mark.parametrize("case", RUNS)
def test_the_run_is_the_plain_optimizers(two: Callable[[str], dict[str, Any]], case: str) -> None:
    result = two(case)
    assert result["differences"] == []
    assert result["same"] and result["learnt"]
    assert result["control"] >= 3  # a learning rate that is off by 1e-4 of itself is seen


def test_shards_of_accelerate_are_served_from_the_first_backward_on(
    two: Callable[[str], dict[str, Any]],
) -> None:
    result = two("arrives:bfloat16")
    assert result["gradients"] == {"torch.float32"} and result["steps"] == {1}
    assert "21 bfloat16 with split master" in result["repr"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_accelerate_saves_and_resumes_shards(
    two: Callable[[str], dict[str, Any]], dtype: str
) -> None:
    assert two(f"resumed:{dtype}") == {"off": 0.0}
