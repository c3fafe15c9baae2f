"""The code of the pages in docs/, on two processes; docs_cases.py is what they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import processes
from tests.distributed.docs_cases import blocks

TRAINS = ["DDP", "fp16", "shard_states", "FSDP2"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    cases = [*(f"from_deepspeed:{block}" for block in TRAINS), "universal"]
    folder = tmp_path_factory.mktemp("group")
    return processes.agreeing(processes.run("tests.distributed.docs_cases", cases, 2, folder))


def test_every_block_is_known() -> None:
    """Those of DeepSpeed itself do not run here."""
    assert [*blocks("from_deepspeed.md")] == ["DeepSpeed", *TRAINS, "checkpoint"]


@pytest.mark.parametrize("block", TRAINS)
def test_a_loop_that_came_from_deepspeed(two: Callable[[str], dict[str, Any]], block: str) -> None:
    result = two(f"from_deepspeed:{block}")
    assert result["same"] and result["skipped"] == 0
    assert result["changed"] == [True] * 6 + [False] * 2
    assert result["open"] == (0 if block == "DDP" else 4)  # that one ends with flush()


def test_a_universal_checkpoint(two: Callable[[str], dict[str, Any]]) -> None:
    assert two("universal") == {"off": [], "missing": 2}
