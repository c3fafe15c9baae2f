"""Launches that do not have Triton look for the compiled kernel ask the driver for the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which is only there on Linux")


def test_later_launches_ask_the_driver_for_what_the_first_asked(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    run = subprocess.run(
        [sys.executable, "-m", "tests.launches"],
        cwd=Path(__file__).resolve().parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
