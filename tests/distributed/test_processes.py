"""A case that raises in one process ends the group, and nobody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import processes


def passes() -> dict[str, Any]:
    return {"world": dist.get_world_size()}


def one_raises() -> dict[str, Any]:
    if dist.get_rank() == 0:
        raise ValueError("only here")
    dist.barrier()
    return {}


def test_others_do_not_wait_for_a_process_that_raised(tmp_path: Path) -> None:
    results = processes.run(__name__, ["passes", "one_raises", "passes:never"], 2, tmp_path)
    agreeing = processes.agreeing(results)
    assert agreeing("passes") == {"world": 2}
    assert "only here" in results[0]["one_raises"]
    assert "Traceback" in results[1]["one_raises"]
    for case in ("one_raises", "passes:never"):
        with pytest.raises(AssertionError, match="only here"):
            agreeing(case)
