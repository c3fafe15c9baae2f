"""Windows of several processes: weights, skips, checkpoints, mistakes and faults.

The processes of a group are started once; window_cases.py is what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
REFUSED = {
    "refused:mixed": "mixed_precision=",
    "refused:part": "1 parameters that no FusedAccumOptimizer has (c.bias)",
    "refused:hook": "communication hook",
    "refused:group": "leave out one of the two",
    "refused:static": "static_graph=True",
}
DIFFERENT = {
    "different:steps": "gradient_accumulation_steps is 1 on rank 0, 2 on rank 1",
    "different:clip": "max_grad_norm is None on rank 0, 1.0 on rank 1",
    "different:parameters": "number of parameters that need a gradient is 8 on rank 0, 10 on rank",
    "different:optimizer": "optimizer is 'AdamW' on rank 0, 'SGD' on rank 1",
}
OTHERS = [
    "loop_weights", "scaler", "detached", "taken_over", "broadcast", "gone", "unfrozen", "by_dcp:8",
    "by_dcp:6", "two_wrappers:n", "two_wrappers:loop",
]  # fmt: skip

Results = Callable[[str], dict[str, Any]]
MODULE = "tests.distributed.window_cases"


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes returned."""
    cases = [*WEIGHTS, *NOT_FINITE, *RESUMED, *REFUSED, *DIFFERENT, *OTHERS]
    return processes.run(MODULE, cases, 2, tmp_path_factory.mktemp("group"))


@pytest.fixture(scope="module")
def two(each: list[dict[str, Any]]) -> Results:
    return processes.agreeing(each)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return processes.agreeing(processes.run(MODULE, THREE, 3, tmp_path_factory.mktemp("group")))


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


def test_parameters_that_are_unfrozen_later_are_averaged(two: Results) -> None:
    assert two("unfrozen") == {"same": True, "changed": True}


def test_two_wrappers_share_a_ddp_module(two: Results) -> None:
    result = two("two_wrappers:n")
    assert result["train"] is None and result["same"] and result["norm"] < 1e-7
    assert "of another FusedAccumOptimizer" in two("two_wrappers:loop")["train"]


def test_nothing_is_averaged_when_ddp_is_gone(two: Results) -> None:
    assert two("gone") == {"same": True, "same without": False}


def test_ddp_averages_again_without_us(two: Results) -> None:
    assert set(two("detached").values()) == {True}


def test_another_wrapper_takes_over(two: Results) -> None:
    assert two("taken_over") == {"same": True, "skipped": 0}


def test_a_group_starts_from_the_same_parameters(two: Results) -> None:
    result = two("broadcast")
    assert (result["before"], result["after"]) == (False, True)
    assert "state_dict()" in result["copied"]
    assert result["wrong"].startswith("TypeError: process_group must be a torch.distributed.Proc")


@pytest.mark.parametrize("case", REFUSED)
def test_ddp_that_cannot_be_served(two: Results, case: str) -> None:
    result = two(case)
    for text in (result["backward"], result["step"]):
        assert text.startswith("RuntimeError: ") and REFUSED[case] in text
    assert result["unchanged"]
    if case == "refused:static":  # after zero_grad()
        assert result["same"] and result["changed"]


@pytest.mark.parametrize("case", DIFFERENT)
def test_processes_that_do_not_train_the_same(two: Results, case: str) -> None:
    result = two(case)
    assert DIFFERENT[case] in result["backward"] and result["unchanged"]


@pytest.mark.parametrize("what", ["killed", "raised"])
def test_a_process_that_fails_in_the_reduction(what: str, tmp_path: Path) -> None:
    """The others get an error, and nothing is half updated."""
    processes.run(MODULE, [f"fault:{what}"], 2, tmp_path)
    reports = [torch.load(path)[f"fault:{what}"] for path in sorted(tmp_path.glob("report*"))]
    assert len(reports) == (1 if what == "killed" else 2)
    assert reports[0]["backward"].startswith("RuntimeError: ")
    for report in reports:
        assert report["unchanged"] and "zero_grad()" in report["step"]
        assert "this process group cannot go on" in report["zero_grad"]
