"""examples/ddp.py as a reader runs it: by torchrun, and resumed by another number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launched(n: int, folder: Path) -> str:
    launch = [
        "--nproc-per-node",
        str(n),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    program = [str(ROOT / "examples" / "ddp.py"), "--quick", "--checkpoint", "checkpoint.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_ddp(tmp_path: Path) -> None:
    out = launched(2, tmp_path)
    assert "update    4  loss " in out and "update    5" not in out
    assert "2 processes, 4 updates, weights are the same in all of them" in out
    out = launched(1, tmp_path)
    assert "update    8  loss " in out and "update    4" not in out
    assert "1 processes, 4 updates" in out
