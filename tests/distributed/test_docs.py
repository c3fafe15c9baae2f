"""The code of the pages in docs/, on two processes; docs_cases.py is what they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import processes
from tests.distributed.docs_cases import blocks

PAGES = {
    "from_deepspeed.md": ["DDP", "fp16", "shard_states", "FSDP2"],
    "distributed.md": ["DDP", "ZeRO-1", "FSDP2", "process group"],
}
TRAINS = [f"{page}/{block}" for page in PAGES for block in PAGES[page]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    cases = [*(f"page:{case}" for case in TRAINS), "universal"]
    folder = tmp_path_factory.mktemp("group")
    return processes.agreeing(processes.run("tests.distributed.docs_cases", cases, 2, folder))


def test_every_block_is_known() -> None:
    """Those of DeepSpeed itself do not run here."""
    known = ["DeepSpeed", *PAGES["from_deepspeed.md"], "checkpoint"]
    assert [*blocks("from_deepspeed.md")] == known
    assert [*blocks("distributed.md")] == PAGES["distributed.md"]


@pytest.mark.parametrize("case", TRAINS)
def test_a_loop_of_a_page(two: Callable[[str], dict[str, Any]], case: str) -> None:
    result = two(f"page:{case}")
    assert result["same"] and result["skipped"] == 0
    assert result["changed"] == [True] * 6 + [False] * 2
    page, block = case.split("/")
    ends_whole = page == "distributed.md" or block == "DDP"  # with flush()
    assert result["open"] == (0 if ends_whole else 4)


def test_a_universal_checkpoint(two: Callable[[str], dict[str, Any]]) -> None:
    assert two("universal") == {"off": [], "missing": 2}
