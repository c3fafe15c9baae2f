"""examples/ddp.py as a reader runs it: by torchrun, and resumed by another number of processes."""

from __future__ import annotations

from pathlib import Path

from tests import processes

PROGRAM = [str(processes.ROOT / "examples" / "ddp.py"), "--quick", "--checkpoint", "checkpoint.pt"]


def test_ddp(tmp_path: Path) -> None:
    out = processes.torchrun(2, *PROGRAM, cwd=tmp_path)
    assert "update    4  loss " in out and "update    5" not in out
    assert "2 processes, 4 updates, weights are the same in all of them" in out
    out = processes.torchrun(1, *PROGRAM, cwd=tmp_path)
    assert "update    8  loss " in out and "update    4" not in out
    assert "1 processes, 4 updates" in out
