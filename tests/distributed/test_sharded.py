"""FSDP2 (fully_shard), tensor parallelism and both: gradients, norms and weights beside float64.

The processes of a group are started once; sharded_cases.py is what they run.
"""

from __future__ import annotations

import pytest

from tests.processes import Groups

CASES = {
    2: [
        "train:n=1",
        "train:n=2,owner=loop",
        "train:clip=0.1,by=ours",
        "train:net=odd,dtype=bf16",
        "train:compute=bf16,clip=0.1",
        "train:dtype=bf16,clip=0.1",
        "train:dtype=bf16,clip=0.1,by=torch",
        "train:dtype=bf16,clip=0.1,owner=loop,by=torch",
        "train:dtype=bf16,master=fp32",
        "train:weights=1,clip=0.1,by=ours",
        "train:weights=1,dtype=bf16,clip=0.1",
        "train:weights=1,dtype=bf16,owner=loop,clip=0.1,by=ours",
        "train:mesh=tp,clip=0.1",
        "train:mesh=tp,dtype=bf16,clip=0.1",
        "train:mesh=tp,moves=1",  # torch swaps DTensors
        "train:moves=1,clip=0.1",
    ],
    4: [
        "train:net=odd,clip=0.1",  # some have no part of the last layer
        "train:mesh=hsdp,clip=0.1",
        "train:mesh=hsdp,dtype=bf16,weights=1",
        "train:mesh=both,clip=0.1",
        "train:mesh=both,weights=1,owner=loop",
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups("tests.distributed.sharded_cases", CASES, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize(("world", "case"), [(n, case) for n in CASES for case in CASES[n]])
def test_shards_hold_the_mean_gradient_of_all_and_step_by_it(
    results: Groups, world: int, case: str
) -> None:
    result = results(world, case)
    assert len(result["gradient"]) == 3
    assert max(result["gradient"]) < (3e-8 if "bf16" in case else 1e-7)
    assert max(result["norm"]) < 1e-7
    assert len(result["returned"]) == (3 if "by=" in case else 0)
    assert max(result["returned"], default=0.0) < 1e-7
    assert max(result["weights"]) < 3e-8
    assert result["same"]
