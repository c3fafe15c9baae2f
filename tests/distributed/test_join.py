"""torch.distributed.algorithms.Join: processes that run out of data before others do.

The processes of a group are started once; join_cases.py is what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import processes

TWO = [
    f"joined:{case}"
    for case in (
        "ddp-n-fp32-plain-less", "ddp-n-fp32-weights-less", "ddp-n-fp32-plain-none",
        "ddp-n-bf16-weights-none", "ddp-n-bf16-plain-even", "ddp-loop-fp32-plain-less",
        "ddp-loop-fp32-weights-less", "ddp-loop-bf16-plain-none", "group-n-fp32-plain-less",
        "group-n-bf16-weights-none", "group-loop-fp32-plain-less", "group-loop-fp32-weights-less",
    )
]  # fmt: skip
THREE = [
    f"joined:{case}-three"
    for case in (
        "ddp-n-fp32-weights", "ddp-n-bf16-plain", "ddp-loop-fp32-plain", "group-n-fp32-weights",
        "group-loop-fp32-weights",
    )
]  # fmt: skip
REFUSED = {
    "twice": "averaged twice without zero_grad() in between",
    "twice_alone": "averaged twice without zero_grad() in between",
    "divide": "Join(divide_by_initial_world_size=False) where the loop owns the window",
    "both": "leave it out: Join([ddp_model])",
    "open": "Join was left between backward() and step()",
    "flush": "flush() was called inside Join",
}
SHARED = {
    "modules": "one of 2 DDP modules that share a FusedAccumOptimizer",
    "wrappers": "a DDP module that several FusedAccumOptimizers share",
    "states": "Join with shard_states=True",
}
OTHERS = ["scaled:ddp", "scaled:group", "wrapped:Adafactor", "late", "copied", "idle"]
MODULE = "tests.distributed.join_cases"
Results = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = [*TWO, *OTHERS]
    cases += [f"refused:{what}" for what in REFUSED] + [f"shared:{what}" for what in SHARED]
    return processes.agreeing(processes.run(MODULE, cases, 2, tmp_path_factory.mktemp("group")))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return processes.agreeing(processes.run(MODULE, THREE, 3, tmp_path_factory.mktemp("group")))


def _check(result: dict[str, Any], case: str) -> None:
    """A window is the mean of the micro-batches that there were, and other weights are told from
    rounding."""
    assert result["same"]
    # fp32: rounding of some windows, and of weights that are 20 times what they changed by.
    # bf16: forward and backward round to 8 bits.
    assert result["off"] < (1e-5 if "fp32" in case else 2e-2)
    assert result["control"] > 5e-2


@pytest.mark.parametrize("case", TWO)
def test_two_processes(two: Results, case: str) -> None:
    _check(two(case), case)


@pytest.mark.parametrize("case", THREE)
def test_three_processes(three: Results, case: str) -> None:
    _check(three(case), case)


@pytest.mark.parametrize("engine", ["ddp", "group"])
def test_a_scaler_of_a_process_without_data(two: Results, engine: str) -> None:
    result = two(f"scaled:{engine}")
    assert result["same"]
    scales, skipped = zip(*result["scales"], strict=True)
    assert list(skipped) == [1, 1, 1] and scales[1] > scales[0]


def test_an_optimizer_with_its_own_step(two: Results) -> None:
    assert two("wrapped:Adafactor") == {"same": True}


def test_micro_batches_without_a_gradient(two: Results) -> None:
    assert two("idle") == {"same": True}


@pytest.mark.parametrize("what", REFUSED)
def test_what_join_cannot_do(two: Results, what: str) -> None:
    result = two(f"refused:{what}")
    assert REFUSED[what] in result["train"] and result["unchanged"]


@pytest.mark.parametrize("what", SHARED)
def test_what_is_shared(two: Results, what: str) -> None:
    join = two(f"shared:{what}")["join"]
    assert join.startswith("ValueError: ") and SHARED[what] in join
    assert "flush()" in join or what == "states"


def test_an_optimizer_that_meets_ddp_inside_the_block(two: Results) -> None:
    result = two("late")
    assert "make the FusedAccumOptimizer after DDP, and before Join" in result["first"]
    assert result["same"]


def test_ddps_own_way_to_join_comes_back(two: Results) -> None:
    hooks = {"copy": "_DDPJoinHook", "rests": "DdpHook", "detached": "_DDPJoinHook"}
    assert two("copied") == hooks
