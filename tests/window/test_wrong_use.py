"""Every misuse gets an error that names it, and nothing is lost: no half-applied update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import Gradients, small_model
from tests.tolerances import equal_bits


def sgd(model: torch.nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        (0, ValueError, "got 0"),
        (-3, ValueError, "got -3"),
        (2.0, TypeError, "float"),
        ("4", TypeError, "'4'"),
        (True, TypeError, "True"),
    ],
)
def test_accumulation_steps(steps: Any, error: type[Exception], words: str) -> None:
    model = small_model()
    with pytest.raises(error, match=words):
        FusedAccumOptimizer(sgd(model), steps)
    assert all(p.grad_dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "value", [0, -1.0, float("nan"), "1", True, torch.tensor(True), 1j, 10**400]
)
def test_max_grad_norm_and_bucket_cap(value: Any) -> None:
    with pytest.raises(ValueError, match="max_grad_norm must be a positive number"):
        FusedAccumOptimizer(sgd(small_model()), 2, max_grad_norm=value)
    with pytest.raises(ValueError, match="bucket_cap_mb must be a positive number"):
        FusedAccumOptimizer(sgd(small_model()), 2, bucket_cap_mb=value)


def test_what_is_wrapped() -> None:
    opt = FusedAccumOptimizer(sgd(small_model()))
    with pytest.raises(TypeError, match="already"):
        FusedAccumOptimizer(opt)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator"):
        FusedAccumOptimizer(small_model().parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differentiable"):
        params = small_model().parameters()
        FusedAccumOptimizer(torch.optim.AdamW(params, differentiable=True))


def test_bitsandbytes_is_refused_with_the_reason() -> None:
    kind = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
    with pytest.raises(ValueError, match="gradient's dtype alone"):
        FusedAccumOptimizer(kind(small_model(torch.bfloat16).parameters()))


def test_options() -> None:
    with pytest.raises(ValueError, match="'half'"):
        FusedAccumOptimizer(sgd(small_model()), master_weights="half")
    with pytest.raises(ValueError, match="float16"):
        FusedAccumOptimizer(sgd(small_model(torch.float16)), master_weights="split")
    with pytest.raises(ValueError, match="'cuda'"):
        FusedAccumOptimizer(sgd(small_model()), backend="cuda")


WRONG_WEIGHTS = [0, -1, float("nan"), float("inf"), "many", "3", b"3", None, 10**400, True]
WRONG_WEIGHTS += [torch.tensor(True), np.bool_(True), torch.ones(2), 1e-19, 1e300]


@pytest.mark.parametrize("weight", WRONG_WEIGHTS)
def test_weights(weight: Any) -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(sgd(model), 2)
    with (
        pytest.raises((ValueError, TypeError), match="weight must be"),
        opt.micro_batch(weight=weight),
    ):
        raise AssertionError("the block must not run")
    with opt.micro_batch(weight=2):  # nothing is broken by the attempt
        model.backward([torch.ones(3)])
    opt.step()
    assert opt.micro_batches == 1


def test_a_micro_batch_inside_an_open_one() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(sgd(model), 2)
    with opt.micro_batch(weight=3):
        model.backward([torch.ones(3)])
    with pytest.raises(RuntimeError, match=r"call step\(\) after"), opt.micro_batch(weight=1):
        pass
    opt.step()
    with opt.micro_batch(weight=1):
        model.backward([torch.full((3,), 5.0)])
    opt.step()
    assert model.params[0].tolist() == [-2.0] * 3


@pytest.mark.parametrize("owner", [3, None])
@pytest.mark.parametrize("weighted_first", [True, False])
def test_weights_for_some_micro_batches_only(owner: int | None, weighted_first: bool) -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(sgd(model), owner)
    for weighted in (weighted_first, not weighted_first):
        bad = weighted is not weighted_first
        try:
            if weighted:
                with opt.micro_batch(weight=2):
                    model.backward([torch.ones(3)])
            else:
                model.backward([torch.ones(3)])
            assert not bad
        except RuntimeError as error:
            assert bad and "micro_batch" in str(error)
            break
        if owner:
            opt.step()
    else:
        raise AssertionError("the mixture went unnoticed")
    assert model.params[0].tolist() == [0.0] * 3


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError("out of memory")


@pytest.mark.parametrize("owner", [2, None])
@pytest.mark.parametrize("bucket", [1e-6, 128])
def test_a_backward_that_raised_half_way(owner: int | None, bucket: float) -> None:
    model = small_model(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    opt = FusedAccumOptimizer(sgd(model), owner, bucket_cap_mb=bucket)
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    if owner:
        model(x).sum().backward()
        opt.step()
    hidden = model[:3](x)
    with pytest.raises(MemoryError):
        model[3:](Explodes.apply(hidden)).sum().backward()
    for action in (opt.step, opt.step, opt.state_dict, lambda: opt.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"raised before .*zero_grad\(\)"):
            action()
    for a, b in zip(before, model.parameters(), strict=True):
        assert equal_bits(a, b.detach())
    if owner:
        with pytest.warns(RuntimeWarning, match="1 closed micro-batches"):
            opt.zero_grad()
    else:
        opt.zero_grad()
    assert opt.micro_batches == 0 and all(p.grad is None for p in model.parameters())
    clean = small_model(torch.bfloat16)
    other = FusedAccumOptimizer(sgd(clean), owner)
    for _ in range(owner or 1):
        for net, optimizer in ((model, opt), (clean, other)):
            net(x).sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), clean.parameters(), strict=True):
        assert equal_bits(a.detach(), b.detach())


@pytest.mark.parametrize("bucket", [1e-6, 128])
def test_where_the_loop_owns_the_window_the_models_zero_grad_recovers(bucket: float) -> None:
    """All that the Trainer calls before it tries again with smaller batches."""
    model, clean = small_model(torch.bfloat16), small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(sgd(model), bucket_cap_mb=bucket)
    other = FusedAccumOptimizer(sgd(clean))
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    model(x).sum().backward()  # is in the accumulators when the next one raises
    with pytest.raises(MemoryError):
        model[3:](Explodes.apply(model[:3](x))).sum().backward()
    model.zero_grad()
    for net, optimizer in ((model, opt), (clean, other)):
        for _ in range(2):
            net(x).square().mean().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), clean.parameters(), strict=True):
        assert equal_bits(a.detach(), b.detach())


def test_a_block_that_raised_after_its_backward() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(sgd(model), 2)
    with pytest.raises(KeyError), opt.micro_batch(weight=2):
        model.backward([torch.ones(3)])
        raise KeyError("logging")
    with pytest.raises(RuntimeError, match="raised after its backward"):
        opt.step()
    opt.zero_grad()
    with pytest.raises(KeyError), opt.micro_batch(weight=2):
        raise KeyError("in the forward: nothing arrived, nothing is lost")
    for _ in range(2):
        with opt.micro_batch(weight=2):
            model.backward([torch.ones(3)])
        opt.step()
    assert model.params[0].tolist() == [-1.0] * 3


def test_zero_grad_between_backward_and_step() -> None:
    """One micro-batch cannot be taken out of the sum again: the window goes, and says so."""
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(sgd(model), 3)
    model.backward([torch.ones(3)])
    opt.zero_grad()  # the first of its window: nothing else is lost, so no warning
    model.backward([torch.ones(3)])
    opt.step()
    model.backward([torch.full((3,), float("nan"))])
    with pytest.warns(RuntimeWarning, match="1 closed micro-batches"):
        opt.zero_grad()
    for _ in range(3):
        model.backward([torch.full((3,), 2.0)])
        opt.step()
    assert model.params[0].tolist() == [-2.0] * 3


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_a_parameter_that_changed_is_not_ignored(change: str) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(sgd(model), 2)
    x = torch.randn(3, 7)
    model(x).sum().backward()
    opt.step()
    if change == "dtype":
        model.to(torch.bfloat16)
        model(x.bfloat16()).sum().backward()
        expected = "dtype changed from .* lost their hooks"
    else:
        model[5].bias.data = torch.zeros(1, 5)
        with pytest.raises(RuntimeError, match=r"shape changed from \(5,\) to \(1, 5\)"):
            model(x).sum().backward()
        expected = r"zero_grad\(\)"
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=expected):
        opt.step()
    for a, b in zip(before, model.parameters(), strict=True):
        assert equal_bits(a, b.detach())


@pytest.mark.parametrize("how", ["zero_grad", "load_state_dict"])
@pytest.mark.parametrize("owner", [2, None])
def test_a_converted_model_is_taken_up_again(owner: int | None, how: str) -> None:
    """`model.to()` after wrapping, then zero_grad(), or Accelerate's prepare(), which loads what
    it has just saved: nothing is lost."""
    moved, direct = small_model(), small_model()
    x = torch.randn(4, 7)
    opt = FusedAccumOptimizer(torch.optim.AdamW(moved.parameters(), lr=0.1), owner)
    other = FusedAccumOptimizer(torch.optim.AdamW(direct.parameters(), lr=0.1), owner)

    def window(model: torch.nn.Module, optimizer: Any, x: Tensor) -> None:
        for _ in range(owner or 1):
            model(x).float().sum().backward()
            optimizer.step()

    window(moved, opt, x)
    window(direct, other, x)
    moved.to(torch.bfloat16)
    direct.to(torch.bfloat16)
    state = other.state_dict()
    del other
    fresh = FusedAccumOptimizer(torch.optim.AdamW(direct.parameters(), lr=0.1), owner)
    fresh.load_state_dict(state)
    for _ in range(2):
        for model, optimizer in ((moved, opt), (direct, fresh)):
            if how == "zero_grad":
                optimizer.zero_grad()
            else:
                optimizer.load_state_dict(optimizer.state_dict())
            window(model, optimizer, x.bfloat16())
    for a, b in zip(moved.parameters(), direct.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert equal_bits(a.detach(), b.detach())
    assert "split master" in repr(opt)


def test_detach_and_flush_refuse_what_would_lose_gradients() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(sgd(model), 2)
    model.backward([torch.ones(3)])
    opt.step()
    with pytest.raises(RuntimeError, match="1 micro-batches"):
        opt.detach()
    loop = FusedAccumOptimizer(sgd(Gradients([torch.zeros(3)])))
    with pytest.raises(RuntimeError, match="the loop owns the window"):
        loop.flush()


def test_lbfgs() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        FusedAccumOptimizer(torch.optim.LBFGS(model.parameters()), 2)
    with pytest.raises(ValueError, match="float32"):
        FusedAccumOptimizer(torch.optim.LBFGS(small_model(torch.bfloat16).parameters()))
    with pytest.raises(ValueError, match="max_grad_norm"):
        FusedAccumOptimizer(torch.optim.LBFGS(model.parameters()), max_grad_norm=1.0)
    with pytest.raises(TypeError, match="closure"):
        FusedAccumOptimizer(torch.optim.LBFGS(model.parameters())).step()


def test_the_models_zero_grad_recovers_before_a_block_and_a_setting_too() -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for i in range(2):
        with pytest.raises(MemoryError):
            model[3:](Explodes.apply(model[:3](torch.ones(2, 7)))).sum().backward()
        model.zero_grad()
        if i == 0:
            with opt.micro_batch(weight=3.0):
                pass
            opt.zero_grad()
        else:
            opt.gradient_accumulation_steps = 2
