"""`shard_states=True`: each process keeps states of its part, and all train as if each kept all.

The processes of a group are started once; shares_cases.py is what they run.
"""

from __future__ import annotations

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.processes import Groups

MODULE = "tests.distributed.shares_cases"
BESIDE = ["adamw-bf16-ddp", "adamw-fp32-group", "sgd-bf16-ddp", "muon-bf16-ddp",
          "adafactor-bf16-group"]  # fmt: skip
LOOPS = ["loop", "weights", "unfrozen", "few"]
FORMS = ["nested", "flat"]
LOADED = [f"{form}-{whose}" for form in FORMS for whose in ("part", "all")]
FILES = [f"{window}-{whose}" for window in ("closed", "open") for whose in ("own", "other")]
BYTES = [f"bytes_per_parameter:{case}" for case in ("fp32-part", "bf16-part", "bf16-all")]
DEALT = ["unfrozen-late", "unfrozen-again", "frozen-late", "frozen-again"]
CASES = {
    2: [
        *(f"beside_all:{case}" for case in BESIDE), *(f"loops:{how}" for how in LOOPS), *BYTES,
        "overflows:data", "refused", *(f"saved:{form}" for form in FORMS),
        *(f"loaded:{case}" for case in LOADED), *(f"files:{case}" for case in FILES),
        "from_all:state", *(f"dealt:{case}" for case in DEALT),
    ],
    4: [*BYTES, "beside_all:adamw-bf16-ddp", *(f"loaded:{case}" for case in LOADED)],
    1: [*BYTES, *(f"loaded:{case}" for case in LOADED)],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(MODULE, CASES, tmp_path_factory.mktemp("group"), first=2)


# Sums of four bf16 gradients are exact in fp32. Others depend on the order in which gloo adds four.
@pytest.mark.parametrize(
    ("world", "case"), [*((2, case) for case in BESIDE), (4, "adamw-bf16-ddp")]
)
def test_all_bits_are_those_of_a_run_that_keeps_all(results: Groups, world: int, case: str) -> None:
    result = results(world, f"beside_all:{case}")
    assert set(result) == {"weights", "names", "states", "norm", "same"}
    assert all(result.values()), result


@pytest.mark.parametrize("how", LOOPS)
def test_loops(results: Groups, how: str) -> None:
    assert results(2, f"loops:{how}") == {"weights": True, "same": True, "norm": True}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_per_parameter(results: Groups, world: int) -> None:
    """Parameter and accumulator whole, moments and remainder in parts."""
    assert results(world, "bytes_per_parameter:fp32-part")["bytes"] == 4 + 4 + 8 / world
    assert results(world, "bytes_per_parameter:bf16-part")["bytes"] == 2 + 4 + 10 / world
    assert results(world, "bytes_per_parameter:bf16-all")["bytes"] == 16


def test_an_overflow_is_skipped_by_all(results: Groups) -> None:
    result = results(2, "overflows:data")
    assert result == {"unchanged": True, "skipped": 1, "went on": True, "same": True}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", LOADED)
def test_saved_by_two_processes_and_loaded_by(results: Groups, world: int, case: str) -> None:
    # The mean of another number of equal gradients may be rounded in another way.
    assert results(world, f"loaded:{case}")["off"] <= (0.0 if world == 2 else 1e-6)


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_each_process(results: Groups, case: str) -> None:
    result = results(2, f"files:{case}")
    if case.endswith("own"):
        assert result == {"off": 0.0}
    else:
        assert "the shards of rank S of 2 processes, this is rank R of 2" in result["error"]


@pytest.mark.parametrize("case", DEALT)
def test_a_file_of_parameters_that_were_dealt_out_otherwise(results: Groups, case: str) -> None:
    """States that this process does not keep now would be lost without a word."""
    expected = {"same": True} if case.endswith("again") else {"is refused": True}
    assert results(2, f"dealt:{case}") == expected


def test_a_state_dict_of_all(results: Groups) -> None:
    assert results(2, "from_all:state") == {"weights": True, "states": True}


def test_refused(results: Groups) -> None:
    result = results(2, "refused")
    assert "nothing averages gradients over processes" in result["alone"]
    assert "are in no DistributedDataParallel module" in result["part"]
    assert "detach() with shard_states=True" in result["detach"]
    assert "cannot serve LBFGS" in result["lbfgs"]
    assert "with shard_states=True: FusedAccumOptimizer(AdamW(...)" in result["zero"]
    assert "with the same shard_states" in result["into all"]
    assert "full_state_dict=True) saves the state dict of one process" in result["full"]


def test_one_process_has_nobody_to_share_with() -> None:
    inner = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group\(\) first"):
        FusedAccumOptimizer(inner, shard_states=True)
