"""What every test gets: the kernels where this machine can run them, one seed, fair threads."""

from __future__ import annotations

import importlib
import os

import hypothesis
import pytest
import torch

# Triton reads this when a kernel is decorated, so it must be set before any test module imports
# one. The kernels run in Triton's interpreter, on the CPU, unless the environment says 0: then the
# tests marked gpu run, on the GPU (`make gpu`).
INTERPRETED = os.environ.setdefault("TRITON_INTERPRET", "1") == "1"

# pytest-xdist starts several workers: each takes its share of the cores, or they would fight.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

# The interpreter is slow and timing is never asserted: no deadline. CI draws the same examples
# every time, so that a red run can be repeated; elsewhere new ones are tried.
hypothesis.settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("house")


if INTERPRETED:
    from tests import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED and torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and TRITON_INTERPRET=0"))


def pytest_collection_finish() -> None:
    importlib.import_module("tests.frozen")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
