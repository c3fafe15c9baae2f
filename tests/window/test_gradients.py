"""Gradients as a user meets them: what `p.grad` is, clipping, NaN, and missing gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization

from fusedaccum import FusedAccumOptimizer
from tests.cases import Gradients, assert_models_close, batches, case_id, loss, small_model
from tests.tolerances import equal_bits


def test_grad_is_the_accumulator() -> None:
    model = Gradients([torch.zeros(3, dtype=torch.bfloat16)])
    (param,) = model.params
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    addresses = set()
    for value in (1.0, 3.0, 1.0, 3.0):
        model.backward([torch.full((3,), value)])
        assert param.grad.dtype == torch.float32
        addresses.add(param.grad.data_ptr())
        opt.step()
        opt.zero_grad()
    assert len(addresses) == 1
    model.backward([torch.full((3,), 4.0)])
    assert param.grad.tolist() == [2.0] * 3


def test_what_people_do_to_gradients_works() -> None:
    """Clip in place, replace, assign, remove: what p.grad shows at step() is what is used."""
    model = Gradients([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    a, b, c = model.params
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=1e6)
    model.backward([torch.ones(2), torch.ones(2), torch.ones(2)])
    a.grad.mul_(5)
    b.grad = b.grad * 7
    c.grad = None
    opt.step()
    assert a.tolist() == [-5.0] * 2 and b.tolist() == [-7.0] * 2 and c.tolist() == [0.0] * 2
    assert opt.grad_norm.item() == pytest.approx((2 * 25 + 2 * 49) ** 0.5)
    opt.zero_grad()
    c.grad = torch.full((2,), 3.0)  # assigned without any backward
    opt.step()
    assert c.tolist() == [-3.0] * 2 and a.tolist() == [-5.0] * 2
    opt.zero_grad()
    model.backward([torch.ones(2), None, None])
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.25)
    opt.step()
    assert a.tolist() == [-5.25] * 2


def test_assigned_gradients_are_micro_gradients_where_the_wrapper_counts() -> None:
    model = Gradients([torch.zeros(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    for value in (1.0, 3.0):
        model.params[0].grad = torch.full((2,), value)
        opt.step()
        opt.zero_grad()
    assert model.params[0].tolist() == [-2.0] * 2


@pytest.mark.parametrize("owner", [2, None])
def test_clip_grad_norm_(owner: int | None) -> None:
    """Folded into the update, for this window only; the return value is the norm so far."""
    ours, theirs = small_model(), small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=1.0), owner)
    plain = torch.optim.SGD(theirs.parameters(), lr=1.0)
    first, second = batches(2)
    share = 1.0 if owner else 0.5
    for x in (first, second):
        (loss(ours, x) * share).backward()
        norm = opt.clip_grad_norm_(1e-3)
        if owner:
            opt.step()
            opt.zero_grad()
    if owner is None:
        opt.step()
        opt.zero_grad()
    (loss(theirs, first) / 2 + loss(theirs, second) / 2).backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e-3)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    plain.step()
    assert_models_close(ours, theirs)
    before = [p.clone() for p in ours.parameters()]
    for _ in range(owner or 1):
        loss(ours, first).backward()
        opt.step()
    moves = [(p - b).detach() for p, b in zip(ours.parameters(), before, strict=True)]
    moved = sum(float(move.square().sum()) for move in moves)
    assert moved**0.5 > 1e-2  # no longer clipped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_a_nonfinite_window_changes_nothing(value: float, dtype: torch.dtype, kind: Any) -> None:
    model = Gradients([torch.ones(5), torch.ones(9)]).to(dtype)
    opt = FusedAccumOptimizer(kind(model.parameters(), lr=0.1), 2, max_grad_norm=1.0)

    def window(bad: float) -> None:
        for grad in (1.0, bad):
            model.backward([torch.full((5,), 1.0), torch.full((9,), grad)])
            opt.step()
            opt.zero_grad()

    def everything() -> list[Tensor]:
        state = opt.state_dict()["state"]
        tensors = [v for e in state.values() for v in e.values() if isinstance(v, Tensor)]
        return [t.clone() for t in [*model.parameters(), *tensors]]

    window(1.0)
    before = everything()
    window(value)
    assert int(opt.skipped_steps) == 1 and opt.window_closed
    assert not opt.grad_norm.isfinite()
    assert all(equal_bits(a, b) for a, b in zip(before, everything(), strict=True))
    window(1.0)
    assert int(opt.skipped_steps) == 1
    assert not any(equal_bits(a, b) for a, b in zip(before[:2], everything()[:2], strict=True))


def test_nonfinite_can_be_let_through() -> None:
    model = Gradients([torch.ones(5, dtype=torch.bfloat16)])
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters()), 1, skip_nonfinite=False, max_grad_norm=1.0
    )
    model.backward([torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])])
    opt.step()
    assert model.params[0].isnan().all()  # the norm is NaN, so all are, as in torch
    assert int(opt.skipped_steps) == 0


def test_a_first_window_that_is_skipped() -> None:
    """Step counts and bias corrections start with the first update that is applied."""
    ours, theirs = Gradients([torch.ones(5)]), Gradients([torch.ones(5)])
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})):
        opt = FusedAccumOptimizer(kind(ours.parameters(), lr=0.1, **options), 1)
        plain = kind(theirs.parameters(), lr=0.1, **options)
        ours.backward([torch.full((5,), float("inf"))])
        opt.step()
        opt.zero_grad()
        for model, optimizer in ((ours, opt), (theirs, plain)):
            for value in (1.0, 3.0):
                model.backward([torch.full((5,), value)])
                optimizer.step()
                optimizer.zero_grad()
        opt.detach()
    assert_models_close(ours, theirs)


def test_missing_gradients_are_zero_and_absent_parameters_are_left_alone() -> None:
    """As torch: no gradient in the whole window, no decay, no step count."""
    model = Gradients([torch.ones(2), torch.ones(2)])
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), 2, max_grad_norm=9.0)
    for grads in ([torch.ones(2), None], [None, None]):
        model.backward(grads)
        opt.step()
    assert model.params[1].tolist() == [1.0, 1.0] and model.params[1] not in opt.state
    assert float(opt.state[model.params[0]]["step"]) == 1
    assert opt.grad_norm.item() == pytest.approx(0.5 * 2**0.5)
    for _ in range(2):  # its history starts when it first takes part
        model.backward([None, torch.ones(2)])
        opt.step()
    assert float(opt.state[model.params[1]]["step"]) == 1
    assert float(opt.state[model.params[0]]["step"]) == 1
    assert opt.grad_norm.item() == pytest.approx(2**0.5)


def test_a_stale_backward_is_caught() -> None:
    """The step writes behind autograd's back and says so."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = FusedAccumOptimizer(torch.optim.SGD([weight], lr=1.0), 1)
    out = (weight * weight).sum()
    out.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class Same(torch.nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.clone()


def eights() -> Any:
    layer = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 8.0)
    return layer


def convert(layer: Any) -> None:
    layer.to(torch.bfloat16)


def parametrize(layer: Any) -> None:
    register_parametrization(layer, "weight", Same())


def replace(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.set_(layer.weight.detach().clone())


def there_and_back(layer: Any) -> None:
    memory = layer.weight.data
    layer.weight.data = memory.to(torch.bfloat16)
    layer.weight.data = memory  # where it was, as an allocator may have it


def swap(layer: Any) -> None:
    """As `model.to()` does with DTensors, and with all after
    `torch.__future__.set_swap_module_params_on_conversion(True)`."""
    torch.utils.swap_tensors(layer.weight, torch.nn.Parameter(layer.weight.detach().clone()))


def swap_data(layer: Any) -> None:
    layer.weight.data = layer.weight.detach().clone()


@pytest.mark.parametrize("change", [convert, parametrize, replace, there_and_back, swap])
@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_parameter_that_lost_its_hook(at: int, n: int | None, change: Any) -> None:
    """set_() and a conversion there and back have autograd make another node, so that gradients
    went into the accumulator as they were. Inside a window zero_grad() kept it, and step() refused
    for ever."""
    layer = eights()
    opt = FusedAccumOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), n)

    def micro_batch() -> None:
        layer(torch.ones(1, 3, dtype=layer.weight.dtype)).sum().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(at):
        micro_batch()
    change(layer)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"lost their hooks.*Call zero_grad\(\)"):
        micro_batch()
    assert torch.equal(layer.weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the window that is discarded
        opt.zero_grad()
    for _ in range(n or 1):
        micro_batch()
    assert opt.window_closed and torch.equal(layer.weight, before - 1.0)


@pytest.mark.parametrize("change", [parametrize, replace, swap, swap_data])
def test_a_parameter_that_is_hooked_again_in_time(change: Any) -> None:
    """zero_grad() between windows takes it up; new data leaves the hook where it is."""
    layer = eights()
    opt = FusedAccumOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.5), 2)
    for i in range(6):
        if i in (2, 4):
            (change if i == 2 else swap_data)(layer)
            opt.zero_grad()
        before = layer.weight.detach().clone()
        (layer(torch.ones(1, 3))).sum().backward()
        opt.step()
    assert torch.equal(layer.weight, before - 1.75)


def test_gradients_that_are_written_by_hand_are_no_lost_hook() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = FusedAccumOptimizer(torch.optim.SGD([p, q], lr=1.0), 2)
    for i in range(4):
        p.sum().backward()
        q.grad = torch.ones(2) if q.grad is None else q.grad.add_(0.5 * i)
        opt.step()
    assert p.tolist() == [-2.0] * 2 and q.tolist() != [0.0] * 2


class _Made(torch.autograd.Function):
    """A backward that gives a gradient as it was made, without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Any) -> Tensor:
        ctx.make = make
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.make(grad), None


def _phase(p: Tensor) -> Tensor:
    """Complex arithmetic, whose gradient is the imaginary part of a conjugate."""
    return (torch.complex(torch.zeros_like(p), p).conj() * (1 + 2j)).real.sum()


def _negative(p: Tensor) -> Any:
    return _Made.apply(p, lambda grad: torch._neg_view(torch.full(grad.shape, 2.0))).sum()


def _no_memory(p: Tensor) -> Any:
    return _Made.apply(p, lambda grad: torch._efficientzerotensor(grad.shape)).sum()


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)], ids=["0d", "one", "matrix"])
@pytest.mark.parametrize("loss_of", [_phase, _negative, _no_memory])
@pytest.mark.parametrize("how", ["backward", "assigned"])
def test_a_gradient_that_is_not_the_numbers_in_its_memory(
    loss_of: Any, how: str, shape: tuple[int, ...]
) -> None:
    """Four micro-batches: those that come again are added by another way than the first ones."""
    param, plain = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    loss_of(plain).backward()
    if shape == () or loss_of is not _phase:
        assert plain.grad.is_neg() or plain.grad._is_zerotensor()
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=1.0), 4)
    for _ in range(4):
        if how == "backward":
            loss_of(param).backward()
        else:
            param.grad = plain.grad
        opt.step()
    assert torch.equal(param, plain - plain.grad)
