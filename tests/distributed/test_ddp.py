"""DistributedDataParallel and process groups: gradients, norms and weights beside float64.

The processes of a group are started once; ddp_cases.py is what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import processes

# As DDP is made: each option, before or after the optimizer, whoever counts the window.
CASES = [
    f"train:engine={order},option={option},owner={owner}{more}"
    for option in ("plain", "view", "unused", "unused-view", "static", "static-view")
    for order, owner, more in [
        ("before", "n", ""),
        ("before", "loop", ",dtype=fp32,net=reentrant"),
        ("before" if option.startswith("static") else "after", "loop", ",net=extra"),
    ]
]
# What the model and the loop do, with DDP and with a group alone.
CASES += [
    f"train:engine={engine},{more}"
    for engine in ("before", "group")
    for more in (
        "n=1", "net=tied", "net=again", "net=extra-never", "clip=0.1", "twice=2,dtype=fp32",
        "n=1,owner=loop,dtype=fp32", "owner=loop,sync=every", "dtype=fp32,net=extra",
        "dtype=fp32,compile=model",
    )
]  # fmt: skip
# With Linear layers whose weight gradients go from the GEMM into the accumulators.
FUSED = [
    f"train:fuse=1,engine={engine},{more}"
    for engine, more in [
        ("before", "dtype=fp32,owner=loop,net=reentrant"), ("before", "dtype=fp32,compile=model"),
        ("before", "dtype=fp32,option=unused,net=extra"), ("before", "n=1"),
        ("before", "dtype=fp32,option=static-view,net=again"), ("before", "dtype=fp32,net=tied"),
        ("after", "dtype=fp32,owner=loop,option=view"),
        ("before", "dtype=fp32,owner=loop,sync=every"),
        ("group", "dtype=fp32,clip=0.1"), ("group", "net=again,twice=2"),
        ("group", "dtype=fp32,net=extra"),
    ]
]  # fmt: skip
CASES += FUSED


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    results = processes.run("tests.distributed.ddp_cases", CASES, 2, folder)
    return processes.agreeing(results)


@pytest.mark.parametrize("case", CASES)
def test_every_process_has_the_mean_gradient_of_all(
    two: Callable[[str], dict[str, Any]], case: str
) -> None:
    result = two(case)
    assert len(result["gradient"]) == 3
    # A GEMM that adds rounds in other places, and no weight gradient to bf16, as float64's were.
    is_rounded_elsewhere = "fuse" in case and "fp32" not in case
    limit = 3e-3 if is_rounded_elsewhere else 1e-7
    assert max(result["gradient"]) < (limit if "fuse" in case or "fp32" in case else 3e-8)
    assert max(result["norm"]) < limit
    assert result["same"]


@pytest.mark.parametrize("case", [case for case in CASES if "extra" not in case])
def test_buckets_are_on_their_way_before_the_backward_is_over(
    two: Callable[[str], dict[str, Any]], case: str
) -> None:
    """Where all parameters arrive as often as before: from the second window on."""
    overlap = two(case)["overlap"]
    assert len(overlap) == 3
    for early, started in overlap[1:]:
        assert started >= 2
        assert early >= 1 or "reentrant" in case  # each of its backwards averages by itself
