"""Windows as a user meets them: who owns them, how they end, what each micro-batch weighs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import Gradients, assert_models_close, batches, loss, small_model
from tests.tolerances import U


def test_the_loop_owns_the_window() -> None:
    """None: step() takes the sum; zero_grad() of the optimizer and of the model both discard."""
    for by_model in (False, True):
        model = Gradients([torch.zeros(3)])
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        model.backward([torch.ones(3)])
        (model if by_model else opt).zero_grad()
        for value in (1.0, 2.0):
            model.backward([torch.full((3,), value)])
        opt.step()
        assert opt.window_closed
        assert model.params[0].tolist() == [-3.0] * 3
        model.backward([torch.full((3,), 4.0)])  # no zero_grad: torch goes on adding
        opt.step()
        assert model.params[0].tolist() == [-10.0] * 3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_inside_a_window_keeps_it(set_to_none: bool) -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    opt.zero_grad(set_to_none)
    for value in (1.0, 2.0):
        model.backward([torch.full((3,), value)])
        opt.step()
        model.zero_grad()  # as Trainer does: must not lose what was accumulated either
        opt.zero_grad(set_to_none)
    assert model.params[0].tolist() == [-1.5] * 3
    model.backward([torch.ones(3)])
    opt.flush()
    opt.zero_grad(set_to_none)
    grad = model.params[0].grad
    assert grad is None if set_to_none else not grad.any()


def test_without_zero_grad_the_next_window_starts_afresh() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    for value in (1.0, 3.0, 5.0, 7.0):
        model.backward([torch.full((3,), value)])
        opt.step()
    assert model.params[0].tolist() == [-8.0] * 3


def test_flush_divides_by_what_arrived() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 8)
    opt.flush()  # nothing to do
    assert not opt.window_closed
    for value in (1.0, 2.0, 6.0):
        model.backward([torch.full((3,), value)])
        opt.step()
    opt.flush()
    assert opt.window_closed and opt.micro_batches == 0
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -3.0), rtol=4 * U, atol=0)


def test_flush_counts_a_backward_without_step() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 4)
    model.backward([torch.full((3,), 1.0)])
    opt.step()
    model.backward([torch.full((3,), 5.0)])
    opt.flush()
    assert model.params[0].tolist() == [-3.0] * 3


@pytest.mark.parametrize("owner", [3, None])
def test_token_weights(owner: int | None) -> None:
    """sum w g / sum w, whoever owns the window."""
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), owner)
    for _ in range(2):
        for weight, value in ((2, 1.0), (5, 2.0), (1, 4.0)):
            with opt.micro_batch(weight=weight):
                model.backward([torch.full((3,), value)])
            if owner:
                opt.step()
                opt.zero_grad()
        if owner is None:
            assert opt.micro_batches == 3
            opt.step()
            opt.zero_grad()
    assert opt.window_closed
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -4.0), rtol=8 * U, atol=0)


def test_token_weights_equal_the_token_mean() -> None:
    """Padded micro-batches of different lengths against one batch of all tokens."""
    ours, big = small_model(), small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), 3)
    plain = torch.optim.SGD(big.parameters(), lr=0.1)
    lengths = [3, 17, 6]
    data = [torch.randn(n, 7) for n in lengths]
    for x in data:
        with opt.micro_batch(weight=len(x)):
            loss(ours, x).backward()
        opt.step()
        opt.zero_grad()
    loss(big, torch.cat(data)).backward()
    plain.step()
    assert_models_close(ours, big)


@pytest.mark.parametrize("owner", [2, None])
def test_a_step_without_any_gradient_does_nothing(owner: int | None) -> None:
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), owner, max_grad_norm=1.0)
    for _ in range(2):
        opt.step()
    assert opt.window_closed
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not opt.state


def test_a_closure_runs_before_gradients_are_read() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)

    def closure() -> str:
        assert torch.is_grad_enabled()
        model.backward([torch.ones(3)])
        return "the loss"

    with torch.no_grad():
        assert opt.step(closure) == "the loss"
        assert opt.step(closure) == "the loss"
    assert model.params[0].tolist() == [-1.0] * 3


def test_lbfgs_evaluates_its_closure() -> None:
    ours, theirs = small_model(), small_model()
    x = batches(1)[0]
    for model in (ours, theirs):
        opt: torch.optim.Optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
        if model is ours:
            opt = FusedAccumOptimizer(opt)

        def closure(model: Any = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            value = loss(model, x)
            value.backward()
            return value

        for _ in range(2):
            opt.step(closure)
    assert_models_close(ours, theirs)


@pytest.mark.parametrize("unfrozen", [0, 2], ids=["reached-last", "reached-first"])
@pytest.mark.parametrize("n", [None, 1], ids=["loop", "counted"])
def test_a_window_that_unfreezes_is_summed_in_fp32(n: int | None, unfrozen: int) -> None:
    """The parameter has no hook as the window begins. Autograd sums in bf16, where 256 + 1 is 256.

    So it is with layers that are unfrozen one after the other, from the first or from the last.
    """
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(3)]
    params[unfrozen].requires_grad_(False)
    opt = FusedAccumOptimizer(torch.optim.SGD(params, lr=1.0), n)
    for window in range(2):
        opt.zero_grad()
        params[unfrozen].requires_grad_(window == 1)
        for grad in (256.0, 1.0, 1.0):
            parts = [grad * p.sum() for p in params if p.requires_grad]
            sum(parts, torch.zeros(())).backward()
        opt.step()
        shown = [p.grad for p in params if p.requires_grad]
        assert len(shown) == 2 + window
        for seen in shown:
            assert seen is not None and seen.dtype == torch.float32
            assert seen.tolist() == [258.0] * 3
