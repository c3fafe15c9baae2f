"""GradScaler where several processes train: one overflows, and the scales stay the same in all.

The processes of a group are started once; scaler_cases.py is what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import processes

CASES = [
    f"scaled:{case}"
    for case in (
        "ddp-counted-float16-0", "ddp-counted-float32-2", "group-counted-float16-2",
        "group-counted-bfloat16-0", "ddp-unscaled-float16-0", "group-unscaled-float32-2",
        "ddp-loop-float16-0", "group-loop-float16-2", "ddp-handed-float16-0",
        "group-handed-float32-2", "ddp-stock-float16-0", "group-stock-float32-2",
        "fsdp2-counted-float16-0", "fsdp2-counted-float32-2", "fsdp2-unscaled-float16-2",
        "fsdp2-loop-float16-0", "fsdp2-handed-float16-2", "fsdp2-stock-float32-0",
    )
]  # fmt: skip
EARLY = ["scaled:ddp-counted-float16-early", "scaled:group-unscaled-float32-early"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    results = processes.run("tests.distributed.scaler_cases", [*CASES, *EARLY], 2, folder)
    return processes.agreeing(results)


def of_one_process(n: int, at: int) -> list[float]:
    """What a GradScaler that sees all has after each window of so many updates."""
    scale, updates = torch.tensor(1024.0), torch.zeros((), dtype=torch.int32)
    scales = []
    for window in range(6):
        for i in range(n):
            found_inf = torch.tensor(float((window, i) == (1, at)))
            torch._amp_update_scale_(scale, updates, found_inf, 2.0, 0.5, 4)
        scales.append(float(scale))
    return scales


@pytest.mark.parametrize("case", CASES)
def test_an_overflow_of_one_process_lowers_the_scale_of_all(
    two: Callable[[str], dict[str, Any]], case: str
) -> None:
    result = two(case)
    assert result["same"]
    assert result["changed"] == [True, False, True, True, True, True]
    stock = "stock" in case  # GradScaler does not call step() then
    assert result["skipped"] == [0] + [0 if stock else 1] * 5
    counts = "counted" in case or "unscaled" in case
    assert result["scales"] == of_one_process(3 if counts else 1, int(case[-1]) if counts else 0)


@pytest.mark.parametrize("case", EARLY)
def test_a_process_that_ends_a_window_early(
    two: Callable[[str], dict[str, Any]], case: str
) -> None:
    """It has no update of its own for the others' last micro-batch; the scales meet again."""
    result = two(case)
    assert result["same"] and result["skipped"] == [0, 1, 1, 1, 1, 1]
    assert len(set(result["scales"])) == 4
