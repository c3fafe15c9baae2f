"""Launches that do not have Triton look for the compiled kernel ask the driver for the same."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which is only there on Linux")

from tests.commands import run_compiling


def test_later_launches_ask_the_driver_for_what_the_first_asked(tmp_path: Path) -> None:
    run = run_compiling(tmp_path, "tests.launches")
    assert run.returncode == 0, run.stderr
