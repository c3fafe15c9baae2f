"""Settings assigned after construction, windows of nothing, and wrappers made again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import small_model
from tests.loops import give, one, sgd


def test_the_number_of_micro_batches_may_grow_between_windows() -> None:
    p = one(0.0)
    opt = sgd(p, n=1)
    for n in (1, 2, 3):
        opt.gradient_accumulation_steps = n
        assert opt.gradient_accumulation_steps == n
        for i in range(n):
            assert opt.micro_batches == i
            give(p, 3.0)
            opt.step()
            opt.zero_grad()
        assert opt.window_closed
    assert p.tolist() == [-9.0] * 3


@pytest.mark.parametrize("is_closed", [True, False])
def test_the_number_of_micro_batches_is_fixed_inside_a_window(is_closed: bool) -> None:
    p = one()
    opt = sgd(p, n=3)
    give(p, 3.0)
    if is_closed:
        opt.step()
    with pytest.raises(RuntimeError, match="inside a window"):
        opt.gradient_accumulation_steps = 2
    assert opt.gradient_accumulation_steps == 3
    opt.zero_grad() if not is_closed else opt.flush()
    opt.gradient_accumulation_steps = 2


def test_the_loop_may_hand_the_window_over() -> None:
    p = one(0.0)
    opt = sgd(p)
    give(p, 1.0)
    opt.step()
    opt.gradient_accumulation_steps = 2
    for value in (1.0, 3.0):
        give(p, value)
        opt.step()
    assert p.tolist() == [-3.0] * 3
    opt.gradient_accumulation_steps = None
    opt.zero_grad()
    give(p, 1.0)
    opt.step()
    assert p.tolist() == [-4.0] * 3


def test_settings_that_act_at_the_next_update() -> None:
    p = one(0.0)
    opt = sgd(p, n=1, skip_nonfinite=False)
    opt.max_grad_norm = 0.5
    give(p, 100.0)
    opt.step()
    assert float(p.detach().norm()) == pytest.approx(0.5, rel=1e-6)
    opt.max_grad_norm, opt.skip_nonfinite = None, True
    give(p, float("inf"))
    opt.step()
    assert int(opt.skipped_steps) == 1 and bool(p.isfinite().all())
    opt.skip_nonfinite = False
    give(p, float("inf"))
    opt.step()
    assert not bool(p.isfinite().any())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("gradient_accumulation_steps", 0, ValueError),
        ("gradient_accumulation_steps", 2.5, TypeError),
        ("max_grad_norm", -1.0, ValueError),
        ("skip_nonfinite", "no", TypeError),
        ("backend", "triton", AttributeError),
        ("master_weights", "fp32", AttributeError),
        ("bucket_cap_mb", 3, AttributeError),
        ("seed", 3, AttributeError),
    ],
)
def test_settings_that_cannot_be_assigned(name: str, value: object, error: type[Exception]) -> None:
    opt = sgd(one(), n=2)
    before = getattr(opt, name)
    with pytest.raises(error, match=name):
        setattr(opt, name, value)
    assert getattr(opt, name) == before
    with pytest.raises(TypeError, match=r"skip_nonfinite must be True or False, got 'no'"):
        sgd(one(), skip_nonfinite="no")


# --- clipping, and windows of nothing ---


def test_a_clip_is_forgotten_with_its_window() -> None:
    p = one(0.0)
    opt = sgd(p, n=2)
    give(p, 3.0)
    opt.clip_grad_norm_(0.1)
    opt.zero_grad()
    for _ in range(2):
        give(p, 3.0)
        opt.step()
    assert p.tolist() == [-3.0] * 3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_clip_of_what_a_loop_has_used_is_forgotten_when_that_is_zeroed(
    set_to_none: bool,
) -> None:
    p = one(0.0)
    opt = sgd(p)
    give(p, 3.0)
    opt.step()
    opt.clip_grad_norm_(0.1)
    torch.optim.SGD([p]).zero_grad(set_to_none)  # the model's, as far as we can see
    give(p, 3.0)
    opt.step()
    assert p.tolist() == [-6.0] * 3


def test_a_clip_after_the_model_zeroed_in_place_is_of_the_zeros() -> None:
    p = one(0.0)
    opt = FusedAccumOptimizer(torch.optim.SGD([p], lr=1.0), skip_nonfinite=False)
    give(p, 3.0)
    opt.step()
    torch.optim.SGD([p]).zero_grad(set_to_none=False)
    opt.clip_grad_norm_(0.1)
    opt.step()
    assert opt.grad_norm == 0.0  # None without a clip


def test_what_clipping_returns() -> None:
    root = 3**0.5
    p = one(0.0)
    opt = sgd(p, n=4)
    give(p, 2.0)
    assert float(opt.clip_grad_norm_(9.0)) == pytest.approx(2 * root)
    opt.step()
    assert float(opt.clip_grad_norm_(9.0)) == pytest.approx(2 * root)
    give(p, 4.0)
    assert float(opt.clip_grad_norm_(9.0)) == pytest.approx(3 * root)
    q = one(0.0)
    opt = sgd(q)
    for weight, value in ((1.0, 2.0), (3.0, 4.0)):
        with opt.micro_batch(weight=weight):
            give(q, value)
    assert float(opt.clip_grad_norm_(9.0)) == pytest.approx(3.5 * root)


def test_groups_without_a_parameter_that_trains() -> None:
    p = one()
    inner = torch.optim.SGD([{"params": []}, {"params": [p]}], lr=1.0)
    opt = FusedAccumOptimizer(inner, 1)
    give(p, 1.0)
    opt.step()
    assert p.tolist() == [0.0] * 3
    frozen = one().requires_grad_(False)
    opt = sgd(frozen, n=1)
    assert int(opt.skipped_steps) == 0 and "frozen" in repr(opt)
    opt.zero_grad()
    opt.load_state_dict(opt.state_dict())
    assert float(opt.clip_grad_norm_(1.0)) == 0.0
    frozen.requires_grad_(True)
    opt.zero_grad()
    give(frozen, 1.0)
    opt.step()
    assert frozen.tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="has no parameters"):
        FusedAccumOptimizer(torch.optim.SGD([{"params": []}], lr=1.0))
    with pytest.raises(ValueError, match="bucket_cap_mb must be a finite number"):
        sgd(one(), bucket_cap_mb=float("inf"))


def test_a_wrapper_that_is_made_in_inference_mode() -> None:
    """It raised an AttributeError about a node that does not exist there."""
    p = one()
    with torch.inference_mode():
        opt = sgd(p, n=2)
    for _ in range(4):
        give(p, 1.0)
        opt.step()
    assert p.tolist() == [-1.0] * 3


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("first", ["step", "flush", "skipped_steps", "clip", "load", "state_dict"])
def test_a_first_call_in_inference_mode(kind: Any, first: str) -> None:
    """Buffers that it made were torch's inference tensors: the next update raised at them."""
    ends, n = [], 1 if first == "step" else 2
    for is_inside in (False, True):
        p, other = one(1.0, torch.bfloat16), one(1.0, torch.bfloat16)
        opt, before = (FusedAccumOptimizer(kind([q], lr=0.1), n) for q in (p, other))
        for _ in range(3):
            give(other, 1.0)
            before.step()
        calls = {
            "clip": partial(opt.clip_grad_norm_, 0.5),
            "load": partial(opt.load_state_dict, before.state_dict()),
            "skipped_steps": partial(getattr, opt, "skipped_steps"),
        }
        give(p, 2.0)
        with torch.inference_mode() if is_inside else torch.no_grad():
            (calls.get(first) or getattr(opt, first))()
        for i in range(4):
            if i or first in ("step", "flush"):
                give(p, 1.0 + i)
            opt.step()
        ends.append(p.tolist())
    assert ends[0] == ends[1] != [1.0] * 3


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_group_that_is_taken_out(at: int, n: int | None) -> None:
    """Its gradients were a part of the norm, and a NaN among them skipped all updates to come."""
    p, q = one(), one()
    groups = [{"params": [p]}, {"params": [q]}]
    plain = torch.optim.SGD(groups, lr=1.0)
    opt = FusedAccumOptimizer(plain, n, max_grad_norm=1.0)
    for i in range(4):
        if i == at:
            opt.param_groups.pop()
        give(q, float("nan") if i >= at else 0.0)
        give(p, 8.0)
        opt.step()
        opt.zero_grad()
    assert int(opt.skipped_steps) == 0 and q.tolist() == [1.0] * 3
    torch.testing.assert_close(p, torch.full((3,), 1.0 - 3**-0.5 * (4 / (n or 1))))


def test_a_flush_of_nothing_closes_no_window() -> None:
    p = one()
    opt = sgd(p, n=1)
    give(p, 1.0)
    opt.step()
    assert opt.window_closed
    opt.flush()
    assert not opt.window_closed and p.tolist() == [0.0] * 3


# --- a notebook's cell that is run again ---


@pytest.mark.parametrize("same_inner", [True, False])
def test_a_new_wrapper_takes_over_from_one_with_no_open_window(same_inner: bool) -> None:
    model = small_model(torch.bfloat16)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    first = FusedAccumOptimizer(inner, 2)
    held = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    again = inner if same_inner else torch.optim.SGD(model.parameters(), lr=0.1)
    second = FusedAccumOptimizer(again, 2)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(3, next(model.parameters()).shape[1], dtype=torch.bfloat16)
    for _ in range(2):
        model(x).float().square().mean().backward()
        second.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="has taken them over"):
        first.step()
    assert held.optimizer is first


def test_a_new_wrapper_does_not_take_an_open_window_over() -> None:
    p, q = one(), one()
    first = sgd(p, n=2)
    give(p, 1.0)
    with pytest.raises(ValueError, match=r"has an open window; call its zero_grad\(\)"):
        sgd(p, n=2)
    first.step()
    with pytest.raises(ValueError, match=r"already belongs to another .* detach\(\)"):
        sgd(p, n=2)
    first.zero_grad()
    first.flush()
    both = sgd(p, q, n=1)
    with pytest.raises(ValueError, match="serves other parameters too"):
        sgd(p, n=2)
    give(p, 1.0)
    both.step()
    assert p.tolist() == [-1.0] * 3
