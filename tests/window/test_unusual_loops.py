"""Loops that are not the one in the README: they train right, or say what is wrong."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.loops import give, one, sgd

# --- the old loop kept ---


def test_a_loop_that_steps_every_nth_time_is_told() -> None:
    """N updates become one: the loop counts to N, and so does the wrapper."""
    p = one()
    opt = sgd(p, n=4)
    with pytest.warns(RuntimeWarning, match=r"4 backward\(\) calls ran before one step\(\)"):
        for i in range(8):
            give(p, 1.0)
            if (i + 1) % 4 == 0:
                opt.step()
                opt.zero_grad()
    assert opt.micro_batches == 2


def test_two_losses_in_a_micro_batch_are_no_old_loop() -> None:
    p = one()
    opt = sgd(p, n=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            give(p, 1.0)
            give(p, 2.0)
            opt.step()
    assert p.tolist() == [-2.0] * 3


@pytest.mark.parametrize("n", [None, 2])
def test_a_step_in_which_nothing_arrived_is_told_once(n: int | None) -> None:
    p = one()
    opt = sgd(p, n=n)
    with pytest.warns(RuntimeWarning, match="no gradient arrived since the last one") as caught:
        for _ in range(3):
            opt.step()
    assert len(caught) == 1 and p.tolist() == [1.0] * 3


def test_a_step_called_twice_is_told() -> None:
    p = one()
    opt = sgd(p, n=2)
    give(p, 1.0)
    opt.step()
    with pytest.warns(RuntimeWarning, match=r"step\(\) was called twice"):
        opt.step()


def test_a_scheduler_stepped_every_micro_batch_is_told() -> None:
    p = one()
    opt = sgd(p, n=3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    with pytest.warns(RuntimeWarning, match="learning rate changed inside a window"):
        for _ in range(3):
            give(p, 1.0)
            opt.step()
            scheduler.step()


@pytest.mark.filterwarnings("error")
def test_a_param_group_that_comes_in_a_window_changes_no_rate() -> None:
    p, q = one(), one()
    opt = sgd(p, n=2)
    give(p, 1.0)
    opt.step()
    opt.add_param_group({"params": [q], "lr": 2.0})
    give(p, 1.0)
    opt.step()
    assert p.tolist() == [0.0] * 3


def test_a_scheduler_stepped_every_window_is_not() -> None:
    p = one()
    opt = sgd(p, n=3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            give(p, 1.0)
            opt.step()
            opt.zero_grad()
            if opt.window_closed:
                scheduler.step()


def test_a_group_with_a_rate_of_its_own_that_joins_inside_a_window_is_no_scheduler() -> None:
    p = one()
    opt = sgd(p, n=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        give(p, 1.0)
        opt.step()
        opt.add_param_group({"params": [one()], "lr": 0.25})
        for _ in range(2):
            give(p, 1.0)
            opt.step()


def test_a_gan_is_told_why_its_discriminator_never_updates() -> None:
    d, g = one(), one()
    opt_d, opt_g = sgd(d, n=2), sgd(g, n=2)
    with pytest.warns(RuntimeWarning, match=r"another optimizer .* requires_grad_\(False\)"):
        for _ in range(4):
            opt_d.zero_grad()
            (d * 2.0).sum().backward()
            opt_d.step()
            (g * d).sum().backward()
            opt_g.step()
            opt_g.zero_grad()


def test_the_remedy_for_the_gan() -> None:
    d, g = one(), one()
    opt_d, opt_g = sgd(d, n=2), sgd(g, n=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            opt_d.zero_grad()
            (d * 2.0).sum().backward()
            opt_d.step()
            d.requires_grad_(False)
            (g * d.square()).sum().backward()
            d.requires_grad_(True)
            opt_g.step()
            opt_g.zero_grad()
    assert d.tolist() == [-1.0] * 3 and g.tolist() == [0.0] * 3


def test_a_training_of_nan_alone_warns_once() -> None:
    p = one()
    opt = sgd(p, n=1)
    with pytest.warns(RuntimeWarning, match="the last 16 updates were all skipped") as caught:
        for _ in range(60):
            give(p, float("nan"))
            opt.step()
    assert len(caught) == 1 and int(opt.skipped_steps) == 60


def test_a_training_of_some_nan_does_not() -> None:
    p = one()
    opt = sgd(p, n=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(60):
            give(p, 0.0 if i % 15 == 14 else float("nan"))
            opt.step()


# --- the wrapped optimizer's own step() ---


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (torch.optim.SGD, torch.float32), (torch.optim.SGD, torch.bfloat16),
        (torch.optim.Adafactor, torch.bfloat16), (torch.optim.LBFGS, torch.float32),
    ],
)  # fmt: skip
def test_the_wrapped_optimizers_own_step_is_refused(kind: Any, dtype: torch.dtype) -> None:
    """It took a part of the mean for a gradient, at each micro-batch, and said nothing."""
    p, before = one(dtype=dtype), one(dtype=dtype)
    plain = kind([p], lr=0.1)
    opt = FusedAccumOptimizer(plain, None if kind is torch.optim.LBFGS else 2)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        give(p, 1.0)
        return torch.zeros(())

    give(p, 1.0)
    with pytest.raises(RuntimeError, match=rf"on the {kind.__name__} inside.*detach\(\) first"):
        plain.step(closure)
    assert torch.equal(p, before) and not plain.state
    opt.zero_grad()
    for _ in range(2):
        opt.step(closure)
    assert opt.window_closed and not torch.equal(p, before)


@pytest.mark.parametrize("how", ["detached", "dropped", "wrapped anew"])
def test_the_plain_optimizer_steps_where_no_wrapper_is_left(how: str) -> None:
    p = one()
    plain = torch.optim.Adafactor([p], lr=0.1)
    opt: Any = FusedAccumOptimizer(plain)
    if how == "detached":
        opt.detach()
    stepped = FusedAccumOptimizer(plain) if how == "wrapped anew" else plain
    if how == "dropped":
        del opt
        assert not plain._optimizer_step_pre_hooks  # type: ignore[attr-defined]
    give(p, 1.0)
    stepped.step()
    assert p.tolist() != [1.0] * 3


# --- backwards that cannot come out right ---


def test_create_graph_is_refused() -> None:
    """The gradient penalty's own gradient was lost."""
    p = one()
    opt = sgd(p, n=1)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*torch\.autograd\.grad"):
        (p**2).sum().backward(create_graph=True)
    opt.zero_grad()
    loss = (p**2).sum()
    (grad,) = torch.autograd.grad(loss, p, create_graph=True)
    (loss + (grad**2).sum()).backward()
    opt.step()
    assert p.tolist() == [1.0 - 2.0 - 8.0] * 3


def test_backwards_of_two_threads_do_not_overlap() -> None:
    """One that begins while another has not ended is refused; the sum is that of the others."""
    p = one()
    opt = sgd(p, n=1)
    entered, leave = threading.Event(), threading.Event()

    def wait(grad: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert leave.wait(600)
        return grad

    q = one()
    opt.add_param_group({"params": [q]})
    middle = q * 1.0
    middle.register_hook(wait)
    # Autograd goes backwards: p, which is multiplied later than `middle` is made, arrives before.
    loss = (p * 3.0).sum() + middle.sum()
    slow = threading.Thread(target=loss.backward)
    slow.start()
    assert entered.wait(600)
    with pytest.raises(RuntimeError, match="another thread"):
        give(p, 100.0)
    leave.set()
    slow.join()
    opt.step()
    assert p.tolist() == [-2.0] * 3 and q.tolist() == [0.0] * 3


def test_many_threads_with_a_lock() -> None:
    p = one()
    opt = sgd(p, n=1)
    lock = threading.Lock()

    def work() -> None:
        for _ in range(25):
            with lock:
                give(p, 1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opt.step()
    assert p.tolist() == [-99.0] * 3


def test_many_threads_without_a_lock() -> None:
    """What is accumulated is what the backwards that did not raise brought."""
    p = torch.nn.Parameter(torch.zeros(1 << 16))
    opt = sgd(p, n=1)
    done: list[int] = []
    refused: list[str] = []

    def work() -> None:
        for _ in range(60):
            try:
                give(p, 1.0)
                done.append(1)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 240 and all("another thread" in text for text in refused)
    assert done, "no backward came through"
    opt.step()
    assert p.unique().tolist() == [-float(len(done))]


def _discard(opt: FusedAccumOptimizer, model: torch.nn.Module) -> None:
    for _ in range(2):
        model(torch.ones(3)).sum().backward()
        model.zero_grad()
        opt.step()
        model(torch.ones(3)).sum().backward()


def _schedule(opt: FusedAccumOptimizer, model: torch.nn.Module) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(2):
        model(torch.ones(3)).sum().backward()
        opt.step()
        scheduler.step()


def _skip(opt: FusedAccumOptimizer, model: torch.nn.Module) -> None:
    for _ in range(80):
        (model(torch.ones(3)).sum() * float("nan")).backward()
        opt.step()


@pytest.mark.parametrize("loop", [_discard, _schedule, _skip])
def test_a_warning_shows_the_line_of_the_loop(loop: Any) -> None:
    model = torch.nn.Linear(3, 1)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 1 + (loop is not _skip))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(opt, model)
    assert {w.filename for w in caught} == {__file__}
