"""Killed with SIGKILL and resumed, a run ends with the bits of one that was never disturbed.

`python -m tests.kills` does the same with more kills.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests import interrupted
from tests.kills import STOP, TRAININGS, N, kills
from tests.runs import Kind, Run, differences
from tests.threads import one_thread

ROOT = Path(__file__).resolve().parents[2]
EACH = 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ends() -> dict[str, dict[str, Any]]:
    """Of all kinds, from one process that imports torch once."""
    command = [sys.executable, "-m", "tests.kills", "--json", "--kills", str(EACH)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(TRAININGS), done.stderr
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", [t.name for t in TRAININGS])
def test_killed_and_resumed(ends: dict[str, dict[str, Any]], name: str) -> None:
    end = ends[name]
    assert end["kills"] == EACH
    assert end["differences"] == []
    assert end["lost_by_loading"] == []
    # An overflow is among what is resumed, and an update too.
    assert (0 < end["skipped"] < STOP // N) == ("scaler" in name)


@pytest.mark.parametrize("name", [t.name for t in TRAININGS])
def test_a_checkpoint_that_is_off_is_seen(ends: dict[str, dict[str, Any]], name: str) -> None:
    control = ends[name]["control"]
    assert control["differing_weights"] > 0
    assert control["lost_by_loading"] != []


def test_all_kills_are_36_in_every_place() -> None:
    all_kills = [kill for training in TRAININGS for kill in kills(training, 4)]
    assert len(all_kills) == 36
    assert {kill.place for kill in all_kills} == {"backward", "step", "save"}


KINDS = [kind for kind in vars(interrupted).values() if isinstance(kind, Kind)]
# Overflows in its first micro-batches: 65,504 is the largest fp16 number.
KINDS.append(replace(interrupted.LINKED, name="adamw-fp16-overflow", scale=2.0**17))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_was_loaded_is_saved_again(kind: Kind) -> None:
    """Before any update, at every point of a window; and so twice."""
    program = [*kind.update(0), *kind.update(2), *kind.update(4)]
    for stop in range(len(program) + 1):
        saved = Run(kind).all(program[:stop]).saved()
        again = Run(kind).resumed(saved).saved()
        once_more = Run(kind).resumed(again).saved()
        assert list(differences(saved["opt"], again["opt"])) == [], program[:stop]
        assert list(differences(again["opt"], once_more["opt"])) == [], program[:stop]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_resumed_at_every_point(kind: Kind) -> None:
    """Between backward() and step() too, where the open micro-batch has a weight."""
    program = [*kind.update(0), *kind.update(2), *kind.update(4)]
    undisturbed = Run(kind).all(program).saved()
    for stop in range(len(program) + 1):
        if stop and kind.scaled and program[stop - 1] == ("step",):
            continue  # GradScaler's update() wants to have seen a step()
        saved = Run(kind).all(program[:stop]).saved()
        end = Run(kind).resumed(saved).all(program[stop:]).saved()
        assert list(differences(end, undisturbed)) == [], f"resumed after {stop} operations"


def test_an_open_micro_batch_is_loaded_as_open() -> None:
    """flush() counts it, and zero_grad() discards it with a warning, as where it was saved."""
    kind = interrupted.WEIGHTED
    program = [*kind.update(0), *kind.update(2)[:4]]
    assert program[-1][0] == "backward"
    saved = Run(kind).all(program).saved()
    flushed = Run(kind).all([*program, ("flush",)]).saved()
    assert list(differences(Run(kind).resumed(saved).all([("flush",)]).saved(), flushed)) == []
    run = Run(kind).resumed(saved)
    with pytest.warns(RuntimeWarning, match="discards the whole window"):
        run.opt.zero_grad()
    assert run.opt.micro_batches == 0


def test_an_interrupted_clip_does_not_clip_the_next_window() -> None:
    """clip_grad_norm_() is of the open window; zero_grad() and load_state_dict() discard that."""
    param = torch.nn.Parameter(torch.zeros(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=1.0), gradient_accumulation_steps=1)
    empty = copy.deepcopy(opt.state_dict())
    for discard in (opt.zero_grad, lambda: opt.load_state_dict(empty)):
        param.sum().backward()
        opt.clip_grad_norm_(0.1)
        discard()
        before = param.detach().clone()
        param.sum().backward()
        opt.step()
        assert torch.equal(param.detach() - before, -torch.ones(3))
