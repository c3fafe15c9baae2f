"""Short random walks on every path of the CPU, each time the same; `make fuzz` walks on."""

from __future__ import annotations

from typing import Any

import pytest

from fusedaccum.window import Window
from tests.cases import WithoutCompiler
from tests.walk.minimise import minimise
from tests.walk.runner import draw, run

PATHS = {"compiled": (150, None), "aten": (100, None), "triton": (12, "triton")}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("path", PATHS)
def test_what_the_readme_promises(path: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n_walks, backend = PATHS[path]
    if path == "aten":
        WithoutCompiler(monkeypatch)
    for i in range(n_walks):
        config, actions = draw(f"{seed}/{i}", backend)
        failure = run(config, actions)
        if failure is not None:
            failure = minimise(config, actions, failure.kind)
            pytest.fail(f"walk {seed}/{i}: {failure.kind}\n{failure.script(path)}", pytrace=False)


def _forgotten_weights(self: Window) -> float:
    return 1.0


def test_a_wrong_mean_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a window that does not divide by the weights that arrived."""
    monkeypatch.setattr(Window, "correction", _forgotten_weights)
    for i in range(100):
        config, actions = draw(f"control/{i}")
        failure = run(config, actions)
        if failure is not None:
            break
    assert failure is not None
    small = minimise(config, actions, failure.kind)
    assert len(small.lines) <= 5 < len(actions)
    names: dict[str, Any] = {}
    exec(small.script(), names)
    assert names["opt"].window_closed
