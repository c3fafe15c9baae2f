"""`python -m fusedaccum memory --processes N`: what the process that keeps most keeps, counted.

memory_cases.py is what the processes run.
"""

from __future__ import annotations

import pytest

from tests.processes import Groups

CASES = [
    *(f"fusedaccum-{engine}-{dtype}" for engine in ("ddp", "zero1", "fsdp2")
      for dtype in ("bf16", "fp32")),
    *(f"stock-{engine}" for engine in ("ddp-bf16", "ddp-fp32", "zero1-fp32", "fsdp2-fp32")),
]  # fmt: skip
SMALL = 1 << 16  # bytes of tables, scalars and activations


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    cases = [f"kept:{case}" for case in CASES]
    folder = tmp_path_factory.mktemp("group")
    return Groups("tests.distributed.memory_cases", {2: cases, 4: cases}, folder)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_what_a_process_keeps(results: Groups, world: int, case: str) -> None:
    found = results(world, f"kept:{case}")
    assert 0 <= max(found["counted"]) - found["row"]["kept"] <= SMALL, found
