"""Checkpoints of optimizers of which every window was skipped: as if there had been none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import CASES, Case, Gradients, case_id
from tests.tolerances import equal_bits

SHAPE = (2, 3)
# One of each rule suffices: its states are made in one way, whatever its options are.
RULES = list({case.rule: case for case in CASES}.values())


def skipped(case: Case) -> tuple[Gradients, Any]:
    """A wrapper after one window of NaN, and its model."""
    model = Gradients([torch.ones(SHAPE)])
    opt = FusedAccumOptimizer(case.make(model.parameters()), 1)
    model.backward([torch.full(SHAPE, torch.nan)])
    opt.step()
    opt.zero_grad()
    assert int(opt.skipped_steps) == 1
    return model, opt


def lower_rate(opt: Any) -> None:
    for group in opt.param_groups:
        group["lr"] = group["lr"] / 4


def train(model: Gradients, opt: Any) -> torch.Tensor:
    for value in (1.0, -3.0):
        model.backward([torch.full(SHAPE, value)])
        opt.step()
        opt.zero_grad()
    end = model.params[0].detach()
    assert not bool((end == 1).any())
    return end


@pytest.mark.parametrize("how", ["load", "new", "deepcopy", "model.to", "grown", "detach"])
@pytest.mark.parametrize("case", RULES, ids=case_id)
def test_a_rate_that_changes_while_windows_are_skipped(case: Case, how: str) -> None:
    """ASGD's and Rprop's states start as the rate of the first update, resumed or not."""
    if case.rule == "lion" and how == "deepcopy":
        pytest.skip("lion-pytorch's own copy loses its options")
    ends = []
    for resumes in (False, True):
        model, opt = skipped(case)
        lower_rate(opt)
        if resumes and how == "load":
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        elif resumes and how == "new":
            state = copy.deepcopy(opt.state_dict())
            model = Gradients([torch.ones(SHAPE)])
            opt = FusedAccumOptimizer(case.make(model.parameters()), 1)
            opt.load_state_dict(state)
        elif resumes and how == "deepcopy":
            model, opt = copy.deepcopy((model, opt))
        elif resumes and how == "model.to":
            for convert in (model.bfloat16, model.float):
                convert()
                opt.zero_grad()
        elif resumes and how == "grown":  # the tables of step counts are others then
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))]})
        elif resumes:
            opt = FusedAccumOptimizer(opt.detach(), 1)
        lower_rate(opt)
        ends.append(train(model, opt))
    assert equal_bits(*ends)


@pytest.mark.parametrize("how", ["saved", "saved-again", "grown", "detached"])
@pytest.mark.parametrize("case", RULES, ids=case_id)
def test_the_plain_optimizer_goes_on_as_from_its_start(case: Case, how: str) -> None:
    """SGD would take a momentum buffer for one of an earlier update, and dampen the first."""
    ours, opt = skipped(case)
    model = Gradients([torch.ones(SHAPE)])
    plain = case.make(model.parameters())
    if how == "saved-again":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    if how == "grown":
        for each in (opt, plain):
            each.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))]})
        opt.param_groups[1]["params"][0].sum().backward()
        opt.step()
        opt.zero_grad()
    if how == "detached":
        model, plain = ours, opt.detach()
    else:
        plain.load_state_dict(opt.state_dict())
    lower_rate(plain)
    ends = [train(model, plain)]
    model = Gradients([torch.ones(SHAPE)])
    other = case.make(model.parameters())
    lower_rate(other)
    ends.append(train(model, other))
    assert equal_bits(*ends)


def test_a_parameter_that_had_an_update_keeps_its_states() -> None:
    model = Gradients([torch.ones(SHAPE), torch.ones(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5), 1)
    for grads in ([torch.ones(SHAPE), None], [torch.full(SHAPE, torch.nan), torch.ones(2)]):
        model.backward(grads)
        opt.step()
        opt.zero_grad()
    state = opt.state_dict()["state"]
    assert state[0]["momentum_buffer"].tolist() == [[1.0] * 3] * 2
    assert 1 not in state


def test_what_somebody_put_there_meanwhile_is_saved() -> None:
    model, opt = skipped(next(case for case in RULES if case.rule == "sgd_momentum"))
    opt.state[model.params[0]]["momentum_buffer"] = torch.full(SHAPE, 3.0)
    assert opt.state_dict()["state"][0]["momentum_buffer"].tolist() == [[3.0] * 3] * 2
