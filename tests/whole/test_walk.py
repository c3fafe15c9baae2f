"""Short random walks on every path of the CPU, each time the same; `make fuzz` walks on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusedaccum.window.weights import Window
from tests.cases import WithoutCompiler, forget_compiled
from tests.walk.actions import Action
from tests.walk.minimise import minimise
from tests.walk.runner import draw, run
from tests.walk.world import Config, ParamSpec

WALKS = {"compiled": 100, "aten": 60, "triton": 5}  # of each seed


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How updates are computed."""
    if request.param == "aten":
        WithoutCompiler(monkeypatch)
    yield request.param
    monkeypatch.undo()
    forget_compiled()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("path", WALKS, indirect=True)
def test_what_the_readme_promises(path: str, seed: int) -> None:
    for i in range(WALKS[path]):
        config, actions = draw(f"{seed}/{i}", "triton" if path == "triton" else None)
        failure = run(config, actions)
        if failure is not None:
            failure = minimise(config, actions, failure.kind)
            pytest.fail(f"walk {seed}/{i}: {failure.kind}\n{failure.script(path)}", pytrace=False)


def _forgotten_weights(self: Window) -> float:
    return 1.0


def test_a_wrong_mean_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a window that does not divide by the weights that arrived."""
    config = Config("adamw", params=(ParamSpec((17,), torch.bfloat16), ParamSpec()), steps=2)
    seeds = ((0, 5), (1, 3))
    actions = [
        Action("show"),
        Action("weighted_backward", (3.0, [seeds])),
        Action("save", (False,)),
        Action("step"),
        Action("zero_grad", (True,)),
        Action("weighted_backward", (1.0, [seeds])),
        Action("torch_clip", (1e4,)),
        Action("step"),
        Action("flush"),
    ]
    assert run(config, actions) is None
    monkeypatch.setattr(Window, "correction", _forgotten_weights)
    failure = run(config, actions)
    assert failure is not None
    small = minimise(config, actions, failure.kind)
    assert len(small.lines) <= 5 and "micro_batch(weight=3.0)" in small.lines[1]
    names: dict[str, Any] = {}
    exec(small.script(), names)
    assert names["opt"].window_closed
