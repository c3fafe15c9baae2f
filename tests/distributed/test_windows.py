"""Windows of several processes: weights, skips and checkpoints.

The processes of a group are started once; window_cases.py is what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import processes

WEIGHTS = [
    f"weights:{engine}-{dtype}-{counts}"
    for engine, dtype, counts in [
        ("ddp", "fp32", "equal"), ("group", "bf16", "equal"), ("ddp", "fp32", "partial"),
        ("group", "bf16", "partial"), ("group", "fp32", "none"), ("ddp", "bf16", "none"),
    ]
]  # fmt: skip
THREE = ["weights:ddp-fp32-three", "weights:group-bf16-three"]
NOT_FINITE = ["not_finite:ddp-nan", "not_finite:group-inf"]
RESUMED = [f"resumed:{engine}-{stop}" for engine in ("ddp", "group") for stop in (6, 8)]
OTHERS = ["loop_weights", "scaler", "by_dcp:8", "by_dcp:6"]
# What one process does later, and how the others hear of it.
DIFFERENT = {
    "steps": "gradient_accumulation_steps is 4 on rank 0, 1 on rank {}",
    "clip": "max_grad_norm is None on rank 0, 0.5 on rank {}",
    "skip": "skip_nonfinite is True on rank 0, False on rank {}",
    "lets_nan": "max_grad_norm is None on rank 0, 0.5 on rank {}",
    "weights": "micro_batch(weight=...) is not used on rank 0, used on rank {}",
    "first": "micro_batch(weight=...) is not used on rank 0, used on rank {}",
}
# With another N a process of FSDP2 shares numbers while the others gather parameters.
LATER = [
    f"differs_later:{engine}-{what}"
    for engine in ("ddp", "group", "fsdp2")
    for what in DIFFERENT
    if (engine, what) != ("fsdp2", "steps")
]
LATER_OF_THREE = ["differs_later:group-clip"]

Results = Callable[[str], dict[str, Any]]
MODULE = "tests.distributed.window_cases"


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes returned."""
    cases = [*WEIGHTS, *NOT_FINITE, *RESUMED, *OTHERS, *LATER]
    return processes.run(MODULE, cases, 2, tmp_path_factory.mktemp("group"))


@pytest.fixture(scope="module")
def two(each: list[dict[str, Any]]) -> Results:
    return processes.agreeing(each)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return processes.agreeing(
        processes.run(MODULE, [*THREE, *LATER_OF_THREE], 3, tmp_path_factory.mktemp("group"))
    )


def _check_weights(result: dict[str, Any]) -> None:
    assert result["same"] and max(result["norm"]) < 1e-7
    assert max(result["gradient"], default=0.0) < 2e-7


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_weighted_mean_over_processes(two: Results, case: str) -> None:
    """flush() in a process with fewer micro-batches, or none; a window of nothing is none."""
    result = two(case)
    _check_weights(result)
    nothing = "none" in case
    assert result["closed"] == [True] * (3 if "equal" not in case else 2) + [False] * nothing
    assert result.get("unchanged", True)


@pytest.mark.parametrize("case", THREE)
def test_three_processes(three: Results, case: str) -> None:
    _check_weights(three(case))


def test_weights_in_a_window_of_the_loop(two: Results) -> None:
    result = two("loop_weights")
    assert result["same"] and max(result["gradient"]) < 1e-7


@pytest.mark.parametrize("case", NOT_FINITE)
def test_what_one_process_skips_all_skip(two: Results, case: str) -> None:
    rows = two(case)["rows"]
    assert rows == [(True, 0, True), (False, 1, True), (True, 1, True), (True, 1, True)]


def test_an_overflow_of_one_process_skips_in_all(two: Results) -> None:
    assert two("scaler")["rows"] == [(True, 0, True), (False, 1, True), (True, 1, True)]


def _check_later(result: dict[str, Any], case: str, last: int) -> None:
    what = case.partition("-")[2]
    assert DIFFERENT[what].format(last) in result["error"]
    assert "Nothing was updated" in result["error"]
    assert result["unchanged"]
    assert (result["then"], result["changed"], result.get("same", True)) == (None, True, True)


@pytest.mark.parametrize("case", LATER)
def test_what_differs_in_a_later_window_is_refused_in_every_process(
    two: Results, case: str
) -> None:
    _check_later(two(case), case, 1)


@pytest.mark.parametrize("case", LATER_OF_THREE)
def test_what_one_of_three_processes_does_is_refused_in_all(three: Results, case: str) -> None:
    _check_later(three(case), case, 2)


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_of_each_process(each: list[dict[str, Any]], case: str) -> None:
    """Inside a window it is of one process; between windows that of any serves all."""
    first, second = (result[case] for result in each)
    assert first == {"same": True, "of the first": None}
    assert second["same"]
    if case.endswith("8"):
        assert second["of the first"] is None
    else:
        assert "by rank 0 of 2 processes, this is rank 1 of 2" in second["of the first"]


def test_torch_distributed_checkpoint(two: Results) -> None:
    assert two("by_dcp:8") == {"load": None, "same": True}
    assert "inside a window of 2 micro-batches" in two("by_dcp:6")["load"]
