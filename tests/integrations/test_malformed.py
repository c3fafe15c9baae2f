"""Numbers that no wrapper writes into a checkpoint are refused before anything has changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import batches, loss, small_model
from tests.tolerances import equal_bits

NAN, INF = math.nan, math.inf
NO_NUMBERS = ["2", None, True, [1.0], torch.ones(())]
WRONG: dict[str, list[Any]] = {
    "gradient_accumulation_steps": [0, -1, 4.0, True, "4", 10**30, 3],
    "window": [None, 3, [], {}, {"micro_batches": 1}],
    "window.micro_batches": [-1, 4, 10**30, 1.0, *NO_NUMBERS],
    "window.total": [0.0, -1.0, NAN, INF, 10**400, *NO_NUMBERS],
    "window.reference": [0.0, -4.0, NAN, INF, 10**400, *NO_NUMBERS],
    "window.weight": [0.0, -1.0, NAN, INF, "1", True, [1.0]],
    "window.max_norm": [0.0, -1.0, NAN, INF, "1", True, [1.0]],
    "window.overflow": [-1.0, NAN, INF, 1e300, *NO_NUMBERS],
    "window.is_explicit": [2, 0.5, "no", [], torch.ones(3)],
    "accumulators": [None, 3, [], {99: torch.zeros(3)}],
    "accumulators.0": [None, 1.0, torch.zeros(33, 7, dtype=torch.int32), torch.zeros(())],
    "masters": [3, [], {99: torch.zeros(3)}, {0: 1.0}, {0: torch.zeros(33, 7).bool()}],
    "arrived": [3, None, {0: 1}, [99], ["0"]],
    "zeros": [3, None, [99], [None]],
    "steps": [3, [], {99: 1.0}, {0: -1.0}, {0: NAN}, {0: INF}, {0: 1e300}, {0: "1"}, {0: None}],
    "skipped_steps": [-1, 1.0, NAN, 10**30, "1", True, None],
    "updates": [-1, 1.0, NAN, 10**30, "1", True, None],
}
# What lies beside the states, for torch.distributed.checkpoint.
BESIDE: dict[str, list[float]] = {
    "window_micro_batches": [-1.0, 4.0, NAN, INF],
    "window_total": [0.0, -1.0, NAN, INF, 1e300],
    "window_reference": [0.0, NAN, INF, 1e300],
    "window_overflow": [-1.0, NAN, INF],
    "window_steps": [-4.0, 3.0, NAN, INF],
    "window_weight": [0.0, NAN, INF],
}
# What the states themselves hold.
NO_TENSORS = ["1", -1, [], torch.zeros(33, 7, dtype=torch.cfloat), torch.zeros(33, 7).to_sparse()]
META = torch.zeros(33, 7, device="meta")
STATES: dict[str, list[Any]] = {
    "exp_avg": [*NO_TENSORS, META, torch.zeros(33, 7).int()],
    "exp_avg_sq": [*NO_TENSORS, META],
    "master_param": [*NO_TENSORS, META],
    "step": [-1.0, NAN, INF, "1", None, [], torch.tensor(-3.0), torch.tensor(NAN), torch.ones(7)],
}


def _trained() -> tuple[torch.nn.Module, FusedAccumOptimizer, dict[str, Any]]:
    """In a window of four, with a checkpoint from inside an earlier one."""
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), 4)
    saved: dict[str, Any] = {}
    for i, x in enumerate(batches(7, torch.bfloat16)):
        loss(model, x).backward()
        opt.step()
        opt.zero_grad()
        if i == 4:
            saved = copy.deepcopy(opt.state_dict())
    assert opt.micro_batches == 3
    return model, opt, saved


def _everything(model: torch.nn.Module, opt: FusedAccumOptimizer) -> list[Tensor]:
    state = opt.state_dict()
    tensors = [v for e in state["state"].values() for v in e.values()]
    tensors += state["fusedaccum"]["accumulators"].values()
    tensors += [p.grad for p in model.parameters()]
    return [t.detach().clone() for t in [*model.parameters(), *tensors]]


def _assert_refused(
    model: torch.nn.Module, opt: FusedAccumOptimizer, state: dict[str, Any], words: str
) -> None:
    before, extra = _everything(model, opt), opt.state_dict()["fusedaccum"]
    numbers = {name: extra[name] for name in ("window", "steps", "arrived", "skipped_steps")}
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
    after = opt.state_dict()["fusedaccum"]  # it does not refuse: nothing was begun
    assert {name: after[name] for name in numbers} == numbers
    assert all(equal_bits(a, b) for a, b in zip(before, _everything(model, opt), strict=True))


def test_each_field_with_each_wrong_value() -> None:
    model, opt, saved = _trained()
    for name, values in WRONG.items():
        *path, last = name.split(".")
        for value in values:
            state = copy.deepcopy(saved)
            entry = state["fusedaccum"]
            for key in path:
                entry = entry[key]
            entry[int(last) if last.isdigit() else last] = value
            _assert_refused(model, opt, state, "must be|gradient_accumulation_steps=3|has shape")


@pytest.mark.parametrize("value", [None, 3, [], "window"])
def test_no_dict_at_all(value: Any) -> None:
    model, opt, saved = _trained()
    _assert_refused(model, opt, {**saved, "fusedaccum": value}, "must be a dict")


def test_each_number_beside_the_states() -> None:
    model, opt, saved = _trained()
    del saved["fusedaccum"]
    for name, values in BESIDE.items():
        for value in values:
            state = copy.deepcopy(saved)
            for entry in state["state"].values():
                entry[name] = torch.tensor(value, dtype=torch.float64)
            _assert_refused(model, opt, state, "must be|malformed|gradient_accumulation_steps=3")


@pytest.mark.parametrize("name", STATES)
def test_each_state_with_each_wrong_value(name: str) -> None:
    """torch fails at some after it has replaced the states, and takes others until an update."""
    model, opt, saved = _trained()
    for value in STATES[name]:
        state = copy.deepcopy(saved)
        state["state"][0][name] = value
        _assert_refused(model, opt, state, "(?s)must be .*; nothing was loaded")


def test_states_that_are_not_there() -> None:
    model, opt, saved = _trained()
    for key, words in (("step", "must be there beside the others"), (None, "must be a dict")):
        state = copy.deepcopy(saved)
        if key is None:
            state["state"][0] = None
        else:
            del state["state"][0][key]
        _assert_refused(model, opt, state, words)


def test_what_was_written_is_loaded() -> None:
    """The control: the same checkpoint, untouched."""
    _, opt, saved = _trained()
    opt.load_state_dict(saved)
    assert opt.micro_batches == 1
    del saved["fusedaccum"]
    opt.load_state_dict(saved)
    assert opt.micro_batches == 1
