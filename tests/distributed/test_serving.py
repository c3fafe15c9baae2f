"""Who averages: DDP's reducer or the wrapper; mistakes, and processes that fail.

The processes of a group are started once; serving_cases.py is what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests import processes

REFUSED = {
    "refused:mixed": "mixed_precision=",
    "refused:part": "1 parameters that no FusedAccumOptimizer has (c.bias)",
    "refused:hook": "communication hook",
    "refused:group": "leave process_group out",
    "refused:static": "static_graph=True",
    "refused:groups": "average over different process groups: give the parameters of each group",
}
DIFFERENT = {
    "different:steps": "gradient_accumulation_steps is 1 on rank 0, 2 on rank 1",
    "different:clip": "max_grad_norm is None on rank 0, 1.0 on rank 1",
    "different:parameters": "number of parameters that need a gradient is 8 on rank 0, 10 on rank",
    "different:optimizer": "optimizer is 'AdamW' on rank 0, 'SGD' on rank 1",
    "different:scaler": "grad_scaler (linked) is False on rank 0, True on rank 1",
}
NAMES = "_comm_hooks", "_ddp_init_helper", "_sync_final_model"  # of backward, detach() and Join
HAS_MANUAL = hasattr(DistributedDataParallel, "finalize_backward")
OTHERS = [
    "detached", "taken_over", "broadcast", "gone", "unfrozen", "heap_frozen", "two_wrappers:n",
    "two_wrappers:loop", "made_late:plain", "made_late:view", "late_hook",
    *(f"lacks:{name}" for name in NAMES), *(["finalized_by_hand"] if HAS_MANUAL else []),
]  # fmt: skip

Results = Callable[[str], dict[str, Any]]
MODULE = "tests.distributed.serving_cases"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = [*REFUSED, *DIFFERENT, *OTHERS]
    return processes.agreeing(processes.run(MODULE, cases, 2, tmp_path_factory.mktemp("group")))


def test_parameters_that_are_unfrozen_later_are_averaged(two: Results) -> None:
    assert two("unfrozen") == {"same": True, "changed": True}


@pytest.mark.parametrize("option", ["plain", "view"])
def test_ddp_that_is_made_late_is_served_after_one_error(two: Results, option: str) -> None:
    """With views of its buckets DDP itself raises in the middle of the backward."""
    result = two(f"made_late:{option}")
    assert result["first"].startswith("RuntimeError: ")
    assert (result["then"], result["same"]) == (None, True)


def test_ddp_is_found_in_a_frozen_heap(two: Results) -> None:
    assert two("heap_frozen") == {"train": None, "same": True}


def test_two_wrappers_share_a_ddp_module(two: Results) -> None:
    result = two("two_wrappers:n")
    assert result["train"] is None and result["same"] and result["norm"] < 1e-7
    assert "of another FusedAccumOptimizer" in two("two_wrappers:loop")["train"]


def test_nothing_is_averaged_when_ddp_is_gone(two: Results) -> None:
    assert two("gone") == {"same": True, "same without": False}


def test_ddp_averages_again_without_us(two: Results) -> None:
    assert set(two("detached").values()) == {True}


@pytest.mark.skipif(not HAS_MANUAL, reason="this torch's DDP always ends its reductions itself")
def test_a_loop_that_ends_reductions_of_ddp_itself(two: Results) -> None:
    result = two("finalized_by_hand")
    assert (result["train"], result["detached"], result["same"]) == (None, None, True)
    assert "finalize_backward" in result["twice"]  # it is DDP's own again


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


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_ddp_has_no_more(two: Results, name: str) -> None:
    result = two(f"lacks:{name}")
    needed = f"RuntimeError: fusedaccum needs DistributedDataParallel.{name}, which is private to"
    assert result["backward"].startswith(needed) and result["step"].startswith(needed)
    assert result["unchanged"]


def test_a_communication_hook_that_comes_late(two: Results) -> None:
    result = two("late_hook")
    assert "was given a communication hook, which does not run" in result["step"]
    assert result["unchanged"]


@pytest.mark.parametrize("case", DIFFERENT)
def test_processes_that_do_not_train_the_same(two: Results, case: str) -> None:
    result = two(case)
    assert DIFFERENT[case] in result["backward"] and result["unchanged"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("what", ["killed", "raised"])
def test_a_process_that_fails_in_the_reduction(what: str, engine: str, tmp_path: Path) -> None:
    """The others get an error, and nothing is half updated."""
    case = f"fault:{what}-{engine}"
    processes.run(MODULE, [case], 2, tmp_path)
    reports = [torch.load(path)[case] for path in sorted(tmp_path.glob("report*"))]
    assert len(reports) == (1 if what == "killed" else 2)
    assert reports[0]["backward"].startswith("RuntimeError: ")
    for report in reports:
        assert report["unchanged"] and "zero_grad()" in report["step"]
        if engine == "ddp":
            assert "this process group cannot go on" in report["zero_grad"]
