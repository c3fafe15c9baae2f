"""The example scripts for the Trainer and Accelerate run, learn something, and say so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def output_of(script: str, folder: Path) -> str:
    """What `examples/<script> --quick` prints, run from somewhere else as a user would."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), "--quick"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FusedAccumOptimizer(AdamW)" in done.stdout
    assert "owned by the loop" in done.stdout and "bfloat16 with split master" in done.stdout
    assert "5 updates of 4 micro-batches, 0 skipped" in done.stdout
    return done.stdout


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = output_of("trainer.py", tmp_path)
    before, after = re.findall(r"loss ([\d.]+) -> ([\d.]+) nats per byte", text)[0]
    # An untrained model of 256 bytes has a loss of log(256) = 5.5; five updates lower it a little.
    assert 5.4 < float(before) < 5.8 and float(after) < float(before) - 0.1


def test_accelerate_loop(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = output_of("accelerate_loop.py", tmp_path)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) nats per byte", text)]
    assert len(losses) == 5
    assert 5.4 < losses[0] < 5.8 and losses[-1] < losses[0] - 0.1
