"""examples/ddp.py and fsdp2.py as a reader runs them: by torchrun, and resumed by another number of
processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes

LAST = {
    "ddp": "weights are the same in all of them",
    "fsdp2": "rank 0 holds 16608 of 33216 parameters",
}


@pytest.mark.parametrize("name", LAST)
def test_resumed_by_another_number_of_processes(name: str, tmp_path: Path) -> None:
    program = str(processes.ROOT / "examples" / f"{name}.py")
    arguments = [program, "--quick", "--checkpoint", "checkpoint"]
    out = processes.torchrun(2, *arguments, cwd=tmp_path)
    assert "update    4  loss " in out and "update    5" not in out
    assert f"2 processes, 4 updates, {LAST[name]}" in out
    out = processes.torchrun(1, *arguments, cwd=tmp_path)
    assert "update    8  loss " in out and "update    4" not in out
    assert "1 process, 4 updates" in out
