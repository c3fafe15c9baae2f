"""A GradScaler linked to a wrapper that counts the window."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import case_id, small_model
from tests.scaler_loops import (
    TOLERANCES,
    assert_close,
    exactly,
    inputs,
    micro_batches,
    wrap,
)
from tests.tolerances import equal_bits


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale", "no-unscale"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_the_wrapper_counts_the_window(dtype: torch.dtype, backend: str, unscale: bool) -> None:
    """The scale grows inside the windows: each micro-batch is divided by its own."""
    ours, exact = small_model(dtype), small_model(dtype).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    opt = wrap(ours, 4, scaler, max_grad_norm=0.1, backend=backend)
    xs = inputs(12, dtype)
    micro_batches(ours, opt, scaler, xs, unscale)
    exactly(exact, xs, 4, clip=0.1)
    assert scaler.get_scale() == 64.0 * 2**4 and opt.window_closed
    assert_close(ours, exact, TOLERANCES[dtype])
    assert float(opt.skipped_steps) == 0


def test_scales_that_change_inside_a_window_matter() -> None:
    """The negative control: dividing all by the last scale is far off."""
    ours, exact = small_model(), small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), None)
    xs = inputs(4, torch.float32)
    for i, x in enumerate(xs):
        (ours(x).square().mean() * 64.0 * (2 if i == 3 else 1) / 4).backward()
    for p in ours.parameters():
        assert p.grad is not None
        p.grad.div_(128.0)
    opt.step()
    exactly(exact, xs, 4)
    with pytest.raises(AssertionError):
        assert_close(ours, exact, TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("backend", "skip_nonfinite", "where", "unscale"),
    # Where an overflow is found is the same code before a backend's: the interpreter is slow.
    [
        *itertools.product(["torch"], [True, False], [0, 1, 3], [True, False]),
        ("triton", True, 0, False), ("triton", False, 1, True), ("triton", True, 3, True),
    ],
)  # fmt: skip
def test_an_overflow_costs_one_window_and_lowers_the_scale_once(
    backend: str, skip_nonfinite: bool, where: int, unscale: bool
) -> None:
    ours, exact = small_model(torch.float16), small_model(torch.float16).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(
        ours, 4, scaler, backend=backend, skip_nonfinite=skip_nonfinite, kind=torch.optim.SGD
    )
    xs = inputs(12, torch.float16)
    micro_batches(ours, opt, scaler, xs[:4], unscale)
    before = [p.detach().clone() for p in ours.parameters()]
    bad = [x * float("inf") if i == where else x for i, x in enumerate(xs[4:8])]
    micro_batches(ours, opt, scaler, bad, unscale)
    assert opt.window_closed and int(opt.skipped_steps) == 1
    assert scaler.get_scale() == 32.0
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, ours.parameters(), strict=True))
    micro_batches(ours, opt, scaler, xs[8:], unscale)
    assert int(opt.skipped_steps) == 1 and scaler.get_scale() == 32.0
    exactly(exact, xs[:4] + xs[8:], 4)
    assert_close(ours, exact, TOLERANCES[torch.float16])


def test_two_overflows_lower_it_twice_and_the_step_count_stays() -> None:
    model = small_model(torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(model, 4, scaler, kind=torch.optim.AdamW)
    xs = inputs(4, torch.float16)
    micro_batches(model, opt, scaler, xs, False)
    bad = [x * float("inf") if i in (0, 2) else x for i, x in enumerate(xs)]
    micro_batches(model, opt, scaler, bad, False)
    assert scaler.get_scale() == 16.0
    assert float(opt.state[next(model.parameters())]["step"]) == 1


def test_a_native_optimizer_is_served_too() -> None:
    ours, exact = small_model(torch.float16), small_model(torch.float16).float()

    class Subclass(torch.optim.SGD):
        """Keeps its own step()."""

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    opt = wrap(ours, 4, scaler, kind=Subclass, skip_nonfinite=False)
    xs = inputs(8, torch.float16)
    micro_batches(ours, opt, scaler, xs, True)
    exactly(exact, xs, 4)
    assert_close(ours, exact, TOLERANCES[torch.float16])
    before = [p.detach().clone() for p in ours.parameters()]
    micro_batches(ours, opt, scaler, [x * float("inf") for x in xs[:4]], False)
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, ours.parameters(), strict=True))


def test_fp16_autocast() -> None:
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt = wrap(ours, 2, scaler)
    xs = inputs(6, torch.float32)
    for x in xs:
        with torch.autocast("cpu", torch.float16):
            loss = ours(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    exactly(exact, xs, 2)
    assert_close(ours, exact, TOLERANCES[torch.float16])


def test_gradients_show_unscaled_at_all_times() -> None:
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(ours, 2, scaler)
    (x,) = inputs(1, torch.float32)
    scaler.scale(ours(x).square().mean()).backward()
    (exact(x).square().mean() / 2).backward()
    for _ in range(2):
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        scaler.unscale_(opt)
        scaler.update()


def test_an_overflow_survives_a_checkpoint_inside_the_window() -> None:
    xs = inputs(4, torch.float16)

    def start() -> tuple[Any, FusedAccumOptimizer, Any]:
        model = small_model(torch.float16)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        return model, wrap(model, 4, scaler), scaler

    model, opt, scaler = start()
    micro_batches(model, opt, scaler, [xs[0] * float("inf"), xs[1]], False)
    resumed, opt2, scaler2 = start()
    opt2.load_state_dict(opt.state_dict())
    before = [p.detach().clone() for p in resumed.parameters()]
    micro_batches(resumed, opt2, scaler2, xs[2:], False)
    assert opt2.window_closed and int(opt2.skipped_steps) == 1
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, resumed.parameters(), strict=True))
    micro_batches(resumed, opt2, scaler2, xs, False)
    assert int(opt2.skipped_steps) == 1


def test_other_optimizers_of_the_scaler_stay_stock_and_it_can_be_copied() -> None:
    models = [small_model() for _ in range(3)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt, other = wrap(models[0], 1, scaler), torch.optim.SGD(models[1].parameters(), lr=0.1)
    scaler = copy.deepcopy(scaler)  # still linked to nothing of ours: a copy
    opt = wrap(models[2], 1, scaler)
    (x,) = inputs(1, torch.float32)
    for model in (models[1], models[2]):
        scaler.scale(model(x).square().mean()).backward()
    for each in (opt, other):
        scaler.unscale_(each)
        scaler.step(each)
    scaler.update()
    for p, q in zip(models[1].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert pickle.loads(pickle.dumps(scaler)).get_scale() == 64.0


def test_a_disabled_scaler_scales_nothing() -> None:
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    xs = inputs(4, torch.float32)
    micro_batches(ours, wrap(ours, 2, scaler), scaler, xs, True)
    exactly(exact, xs, 2)
    assert_close(ours, exact, TOLERANCES[torch.float32])


@pytest.mark.parametrize("unscale", [True, False])
def test_without_a_link_it_is_refused_where_the_wrapper_counts(unscale: bool) -> None:
    """It would divide the whole sum by the scale at every micro-batch."""
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(inputs(1, torch.float32)[0]).square().mean()).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        scaler.step(opt)
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    opt.zero_grad()
    for x in inputs(2, torch.float32):
        model(x).square().mean().backward()
        opt.step()
    assert opt.window_closed


def test_wrong_use_of_a_link() -> None:
    model = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(model, 2, scaler)
    (x,) = inputs(1, torch.float32)
    with pytest.raises(RuntimeError, match="loss that it did not scale"):
        model(x).square().mean().backward()
    opt.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    with pytest.raises(RuntimeError, match=r"Call scaler\.step\(optimizer\)"):
        opt.step()
    assert opt.micro_batches == 0
    scaler.step(opt)  # nothing was lost
    assert opt.micro_batches == 1


@pytest.mark.parametrize("how", ["step", "flush"])
def test_a_parameter_that_was_unfrozen_is_divided_by_the_scale_too(how: str) -> None:
    """Its first gradient comes before the wrapper has a hook on it."""
    p = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = FusedAccumOptimizer(torch.optim.SGD([p], lr=1.0), 1, grad_scaler=scaler)
    p.requires_grad_(True)
    scaler.scale(p.sum() * 2.0).backward()
    if how == "step":
        scaler.step(opt)
        scaler.update()
    else:
        opt.flush()
    assert p.tolist() == [-1.0] * 3
