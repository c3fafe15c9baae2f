"""`register_load_state_dict_pre_hook`: torch lets it change a state dict before it looks at it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import batches, loss, small_model
from tests.tolerances import equal_bits

BF16 = torch.bfloat16


def run(model: Any, opt: Any, xs: Iterable[torch.Tensor]) -> None:
    for x in xs:
        loss(model, x).backward()
        opt.step()
        opt.zero_grad()


def by_name(optimizer: Any, state_dict: Any) -> Any:
    """The recipe of torch's tutorial on named parameters: states go where the names are."""
    adapted = copy.deepcopy(optimizer.state_dict())
    theirs, ours = state_dict["param_groups"][0], adapted["param_groups"][0]
    place = dict(zip(theirs["param_names"], theirs["params"], strict=True))
    for index, name in zip(ours["params"], ours["param_names"], strict=True):
        if place.get(name) in state_dict["state"]:
            adapted["state"][index] = state_dict["state"][place[name]]
    return adapted


def wrap(named: Any) -> FusedAccumOptimizer:
    return FusedAccumOptimizer(torch.optim.AdamW(named, lr=2.0**-6), 4)


def test_states_that_a_hook_moves_take_masters_and_the_open_window_along() -> None:
    """Saved in mid-window, and loaded where the parameters come in another order."""
    xs = batches(12, BF16)
    straight, model = small_model(BF16), small_model(BF16, seed=1)
    opt = wrap(straight.named_parameters())
    run(straight, opt, xs[:6])
    model.load_state_dict(straight.state_dict())
    saved = copy.deepcopy(opt.state_dict())
    run(straight, opt, xs[6:])
    resumed = wrap([*model.named_parameters()][::-1])
    resumed.register_load_state_dict_pre_hook(by_name)
    resumed.load_state_dict(saved)
    assert resumed.micro_batches == 2
    run(model, resumed, xs[6:])
    for p, q in zip(straight.parameters(), model.parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())


def test_a_hook_may_load_what_has_fewer_parameters() -> None:
    model, more = small_model(), torch.nn.Sequential(small_model(), torch.nn.Linear(1, 1))
    opt = wrap([("0." + name, p) for name, p in model.named_parameters()])
    run(model, opt, batches(4))
    grown = wrap(more.named_parameters())
    grown.register_load_state_dict_pre_hook(by_name)
    grown.load_state_dict(opt.state_dict())
    for p, q in zip(model.parameters(), more.parameters(), strict=False):
        assert equal_bits(opt.state[p]["exp_avg"], grown.state[q]["exp_avg"])
    assert len(grown.state) == len(opt.state)


def test_a_hook_that_moves_nothing_loses_nothing() -> None:
    def slower(optimizer: Any, state_dict: Any) -> None:
        state_dict["param_groups"][0]["lr"] /= 2

    model, calls = small_model(), list[str]()
    opt = wrap(model.named_parameters())
    run(model, opt, [*batches(4), torch.full((4, 7), torch.nan)])
    opt.flush()
    saved = copy.deepcopy(opt.state_dict())
    other = wrap(model.named_parameters())
    other.register_load_state_dict_pre_hook(slower)
    other.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 2.0**-7
    assert int(other.skipped_steps) == 1 and other.metrics()["updates"] == 2
    model.to(torch.float64).to(torch.float32)
    other.zero_grad()  # it serves the parameters where they are now, which is no load
    assert calls == ["pre"] and other.param_groups[0]["lr"] == 2.0**-7
