"""Whatever somebody writes into `param_groups` in mid-run counts from the next update on, and
compiles nothing: hyper-parameters are numbers in a table, not constants of a kernel."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from fusedaccum.backends.compiled import loops
from tests.cases import CASES, Case, Gradients, case_id

SIZES = (5, 1030)
# Where a plain factor would leave what torch allows.
FACTORS = {"betas": 0.97, "alpha": 0.97, "rho": 0.97, "momentum": 0.97, "etas": 0.97, "t0": 1.0}
RTOL = 2e-5  # eight updates in fp32 by two implementations; rates of 1e-2 move parameters by 0.1


def change(group: dict[str, Any], name: str) -> bool:
    """Move one entry of a param group; False for what is no number."""
    value, factor = group[name], FACTORS.get(name, 1.3)
    if name == "maximize":
        group[name] = not value
    elif isinstance(value, tuple):
        group[name] = tuple(v * factor for v in value)
    elif isinstance(value, float) and value and not isinstance(value, bool):
        group[name] = value * factor
    else:
        return False
    return True


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, generator=generator) for n in SIZES]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_changes_take_effect_and_compile_nothing(case: Case) -> None:
    generator = torch.Generator().manual_seed(99)
    start = [torch.randn(n, generator=generator) for n in SIZES]
    library = loops.step_library
    names = [k for k in case.make([torch.nn.Parameter(start[0])]).param_groups[0] if k != "params"]
    changed = 0
    for name in names:
        ours, theirs = Gradients(start), Gradients(start)
        opt = FusedAccumOptimizer(case.make(ours.parameters()), 1)
        plain = case.make(theirs.parameters())
        compiled = None
        for step in range(8):
            if step == 3 and not all(change(o.param_groups[0], name) for o in (opt, plain)):
                break
            ours.backward(list(gradients(step)))
            opt.step()
            opt.zero_grad()
            for param, grad in zip(theirs.params, gradients(step), strict=True):
                param.grad = grad
            plain.step()
            compiled = library.cache_info().misses if compiled is None else compiled
        else:
            changed += 1
            assert library.cache_info().misses == compiled
            for p, q in zip(ours.params, theirs.params, strict=True):
                torch.testing.assert_close(p, q, rtol=RTOL, atol=RTOL, msg=name)
    assert changed >= 2  # lr, and one more at least


def test_the_kernels_see_no_hyper_parameter_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constexpr that changed would be another kernel to compile."""
    seen: list[tuple[str, tuple[tuple[str, str], ...]]] = []
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    stock = executor.__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        constants = tuple(sorted((k, str(v)) for k, v in kwargs.items() if k.isupper()))
        seen.append((self.fn.__name__, constants))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", spy)
    model = Gradients([torch.ones(5)])
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters()), 1, max_grad_norm=1.0, backend="triton"
    )

    def update() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        seen.clear()
        model.backward([torch.ones(5)])
        opt.step()
        opt.zero_grad()
        return set(seen)

    first = update()
    assert {name for name, _ in first} == {"accumulate_kernel", "finalize_kernel", "step_kernel"}
    for name in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert change(opt.param_groups[0], name)
        assert update() == first
    opt.param_groups[0]["amsgrad"] = True  # another rule: the negative control
    assert update() != first


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop])
def test_a_rate_changed_after_a_skipped_first_window(kind: Any) -> None:
    """ASGD's eta and Rprop's step sizes start as the rate of the first update that is made."""
    weight, plain = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt, exact = FusedAccumOptimizer(kind([weight], lr=0.25), 1), kind([plain], lr=0.125)
    (weight * float("inf")).sum().backward()
    opt.step()
    assert int(opt.skipped_steps) == 1
    opt.param_groups[0]["lr"] = 0.125
    for value in (3.0, 2.0, -1.0):
        (weight * value).sum().backward()
        (plain * value).sum().backward()
        for optimizer in (opt, exact):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weight, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rate_that_is_a_tensor_of_one_element(backend: str) -> None:
    """torch takes any shape that has one; the kernels' table took a 0-d one only."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    kind = torch.optim.AdamW
    for weight, lr in zip(weights, (0.1, torch.tensor([0.1]), torch.tensor([[0.1]])), strict=True):
        groups = [{"params": [weight]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3}]
        opt = FusedAccumOptimizer(kind(groups, lr=lr), 1, backend=backend)
        for value in (1.0, -3.0):
            (weight * value).sum().backward()
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-7, atol=0)
    assert torch.equal(weights[2], weights[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [None, "1e-3", [0.1]])
def test_a_hyper_parameter_that_is_no_number(backend: str, value: Any) -> None:
    """None became NaN in the kernels' table; text, as a YAML file has 1e-3, was read. torch raises,
    too. The window is whole, and goes on with a number."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([weight], lr=0.1), 1, backend=backend)
    opt.param_groups[0]["weight_decay"] = value
    weight.sum().backward()
    with pytest.raises(TypeError, match=r"param group 0: a hyper-parameter must be a number.* got"):
        opt.step()
    assert weight.tolist() == [1.0] * 3
    opt.param_groups[0]["weight_decay"] = np.float32(0.0)
    opt.step()
    torch.testing.assert_close(weight, torch.full((3,), 0.9))
