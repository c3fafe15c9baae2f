"""Every optimizer in PyTorch's own database, with all its option sets.

Wrapped with N = 1 it must do what it does unwrapped, and with N = 4 what it does on the mean of the
four gradients. Those with a fused rule run in the kernels (the interpreter) too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from fusedaccum.options import calls_closure
from fusedaccum.rules import registry

pytest.importorskip("expecttest", reason="torch.testing's database needs expecttest")
from torch.testing._internal.common_optimizers import optim_db

SHAPES = [(7, 5), (3, 4)]  # matrices, which Muon needs


def entries() -> list[Any]:
    found = []
    for info in optim_db:
        for number, entry in enumerate(info.optim_inputs_func(device="cpu")):
            name = f"{info.optim_cls.__name__}-{entry.desc or number}".replace(" ", "-")
            found.append(pytest.param(info, entry.kwargs, id=name))
    return found


def make(info: Any, kwargs: dict[str, Any]) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    # A tensor lr is shared, not copied, by some optimizers: each gets its own.
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return params, info.optim_cls(params, **own)


def gradients(step: int, n: int, sparse: bool) -> list[list[Tensor]]:
    """For each of `n` micro-batches a gradient per parameter."""
    generator = torch.Generator().manual_seed(100 + step)
    out = []
    for _ in range(n):
        grads = [torch.randn(s, generator=generator) for s in SHAPES]
        if sparse:
            grads = [g * (torch.arange(len(g)) % 2)[:, None] for g in grads]
        out.append(grads)
    return out


def compare(info: Any, kwargs: dict[str, Any], n: int, backend: str | None, steps: int) -> None:
    sparse = info.only_supports_sparse_grads
    ours, inner = make(info, kwargs)
    theirs, plain = make(info, kwargs)
    opt = FusedAccumOptimizer(inner, n, backend=backend)
    for step in range(steps):
        micro = gradients(step, n, sparse)
        for grads in micro:
            for p, g in zip(ours, grads, strict=True):
                p.grad = g.to_sparse(1) if sparse else g.clone()
            opt.step()
            opt.zero_grad()
        assert opt.window_closed
        for i, p in enumerate(theirs):
            mean = torch.stack([grads[i] for grads in micro]).sum(0) / n
            p.grad = mean.to_sparse(1) if sparse else mean
        plain.step()
        plain.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("info", "kwargs"), entries())
def test_wrapped_equals_unwrapped(info: Any, kwargs: dict[str, Any], n: int) -> None:
    _, optimizer = make(info, kwargs)
    if kwargs.get("differentiable"):
        with pytest.raises(ValueError, match="differentiable"):
            FusedAccumOptimizer(optimizer)
        return
    if calls_closure(optimizer):
        with pytest.raises(ValueError, match="closure"):
            FusedAccumOptimizer(optimizer, n)
        evaluate_closures(info, kwargs)
        return
    compare(info, kwargs, n, None, steps=5)


def evaluate_closures(info: Any, kwargs: dict[str, Any]) -> None:
    """LBFGS: the loop owns the window, the closure accumulates."""
    results = []
    for wrapped in (True, False):
        params, opt = make(info, kwargs)
        if wrapped:
            opt = FusedAccumOptimizer(opt)

        def closure(params: Any = params, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            total = torch.zeros(())
            for scale in (1.0, 2.0, 3.0):
                loss = sum((scale * p - 1).square().sum() for p in params) / 3
                loss.backward()
                total += loss.detach()
            return total

        for _ in range(3):
            opt.step(closure)
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


FUSED = [
    e for e in entries() if registry.select(make(*e.values)[1], make(*e.values)[1].param_groups[0])
]


@pytest.mark.parametrize(
    ("info", "kwargs"), [e for e in FUSED if not e.values[1].get("differentiable")]
)
def test_in_the_kernels(info: Any, kwargs: dict[str, Any]) -> None:
    compare(info, kwargs, 4, "triton", steps=2)


def test_every_element_wise_optimizer_is_fused() -> None:
    kinds = {e.values[0].optim_cls.__name__ for e in FUSED}
    native = {info.optim_cls.__name__ for info in optim_db} - kinds
    assert native == {"Adafactor", "LBFGS", "Muon", "SparseAdam"}
