"""Checkpoints of shards: torch.distributed.checkpoint, on another number of processes, and files
of each process.

The processes of a group are started once; sharded_checkpoint_cases.py is what they run.
"""

from __future__ import annotations

import pytest

from tests.processes import Groups

MODULE = "tests.distributed.sharded_checkpoint_cases"
FORMS = [
    f"{dtype}-{form}-{window}"
    for dtype, form, window in (
        ("fp32", "flat", "closed"), ("bf16", "nested", "closed"), ("bf16", "flat", "open"),
        ("bf16", "nested", "open"),
    )
]  # fmt: skip
FILES = [f"{w}-{how}" for w in ("closed", "open", "weighted") for how in ("same", "turned")]
LOADED = [*(f"loaded:{form}" for form in FORMS), "container:loaded"]
SAVED = [*(f"saved:{form}" for form in FORMS), "container:saved"]
CASES = {2: [*SAVED, *LOADED, "full", *(f"files:{how}" for how in FILES)], 1: LOADED, 4: LOADED}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(MODULE, CASES, tmp_path_factory.mktemp("group"), first=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_saved_by_two_processes_and_loaded_by(results: Groups, world: int, form: str) -> None:
    result = results(world, f"loaded:{form}")
    assert result["now"] == [0.0, 0.0]
    is_open = form.endswith("open")
    assert result["micro_batches"] == (1 if is_open else 0)
    assert result["steps"] == (6 if is_open else 5)
    # The mean of another number of equal gradients may be rounded in another way.
    assert max(result["later"]) < (1e-7 if world == 2 else 1e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_container_of_optimizers_as_torchtitan_has_it(results: Groups, world: int) -> None:
    assert results(world, "container:loaded")["off"] <= (0.0 if world == 2 else 1e-6)


def test_a_whole_state_dict_broadcast(results: Groups) -> None:
    assert results(2, "full")["off"] == [0.0, 0.0]


@pytest.mark.parametrize("how", FILES)
def test_a_file_of_each_process(results: Groups, how: str) -> None:
    result = results(2, f"files:{how}")
    if how.endswith("same"):
        assert result == {"same": True}
    else:
        assert "the shards of rank S of 2 processes, this is rank R of 2" in result["error"]
