"""Parameters that cannot be served, or not together: refused as the optimizer is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import small_model


def test_two_wrappers_of_one_parameter() -> None:
    """They would take each other's accumulators for gradients."""
    model = small_model(torch.bfloat16)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    first = FusedAccumOptimizer(inner, 2)
    model(torch.randn(2, model[0].in_features, dtype=torch.bfloat16)).sum().backward()
    for again in (inner, torch.optim.SGD(model.parameters(), lr=1.0)):
        with pytest.raises(ValueError, match=r"already belongs to another .* detach\(\)"):
            FusedAccumOptimizer(again, 2)
    first.zero_grad()
    first.detach()
    second = FusedAccumOptimizer(inner, 2)
    del second  # as a notebook cell that is run again does
    FusedAccumOptimizer(inner, 2)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "in a later group"])
def test_two_parameters_of_one_memory(kind: Any, later: bool) -> None:
    """Tied by `.data`: threads lost updates of one beside the other, and so did native masters."""
    embedding = torch.nn.Parameter(torch.ones(7, 3, dtype=torch.bfloat16))
    head, other = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    head.data = embedding.data.view(-1)[10:]
    inner = kind([other, embedding] if later else [other, embedding, head], lr=1.0)
    says = r"params'\]\[1\] and param_groups\[\d\]\['params'\]\[\d\] are two parameters that share"
    if later:
        opt = FusedAccumOptimizer(inner)
        with pytest.raises(ValueError, match=says):
            opt.add_param_group({"params": [head]})
        assert len(opt.param_groups) == 1
    else:
        with pytest.raises(ValueError, match=says):
            FusedAccumOptimizer(inner)
    head.data = embedding.data.view(-1)[10:].clone()
    if later:
        opt.add_param_group({"params": [head]})
    else:
        FusedAccumOptimizer(inner)


def test_a_parameter_that_took_the_place_of_one_with_its_memory() -> None:
    """The one before is not updated any more. Neighbours and empty ones share nothing."""
    flat = torch.zeros(12)
    parts = [torch.nn.Parameter(flat[i:j]) for i, j in ((0, 4), (4, 8), (8, 8), (8, 8), (8, 12))]
    opt = FusedAccumOptimizer(torch.optim.SGD(parts, lr=1.0))
    group = opt.param_groups[0]
    group["params"][0] = torch.nn.Parameter(parts[0].data)
    for param in group["params"]:
        (param.sum() * 2).backward()
    opt.step()
    assert flat.tolist() == [-2.0] * 12


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("where", ["same group", "another group"])
def test_a_parameter_that_stands_twice_in_the_groups(where: str, later: bool) -> None:
    """torch lets that be done by hand. One launch updated it twice at the same time."""
    p = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([p], lr=1.0)
    opt = FusedAccumOptimizer(inner) if later else None
    group = inner.param_groups[0]
    if where == "same group":
        group["params"].append(p)
    else:
        inner.param_groups.append({**group, "params": [p]})
    with pytest.raises(ValueError, match=r"of shape \(3,\) stands 2 times in the param groups"):
        FusedAccumOptimizer(inner) if opt is None else p.sum().backward()
    assert p.tolist() == [1.0] * 3
    inner.param_groups[-1]["params"].pop()
    opt = opt or FusedAccumOptimizer(inner)
    opt.zero_grad()
    p.sum().backward()
    opt.step()
    assert p.tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_dtypes_that_cannot_be_accumulated(dtype: torch.dtype) -> None:
    """All parameters are checked before any is touched."""
    good = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    bad = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    with pytest.raises(TypeError, match=rf"\['params'\]\[1\] of shape \(4,\) has dtype {dtype}"):
        FusedAccumOptimizer(torch.optim.SGD([good, bad], lr=1.0))
    assert good.grad_dtype == torch.bfloat16
    (good * 1).sum().backward()
    assert good.grad is not None and good.grad.dtype == torch.bfloat16


def test_integer_parameters_have_no_gradient() -> None:
    """They cannot require one, so they are left alone, as torch leaves them."""
    count = torch.nn.Parameter(torch.zeros(4, dtype=torch.int64), requires_grad=False)
    weight = torch.nn.Parameter(torch.zeros(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([count, weight], lr=1.0), 1)
    weight.sum().backward()
    opt.step()
    assert weight.tolist() == [-1.0] * 3 and count.tolist() == [0] * 4


def test_two_devices_and_no_device() -> None:
    a = torch.nn.Parameter(torch.zeros(3))
    meta = torch.nn.Parameter(torch.zeros(3, device="meta"))
    for params in ([a, meta], [meta, a], [meta]):
        with pytest.raises(ValueError, match="meta"):
            FusedAccumOptimizer(torch.optim.SGD(params, lr=1.0))


@pytest.mark.gpu
def test_cpu_and_gpu_parameters() -> None:
    a = torch.nn.Parameter(torch.zeros(3))
    b = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    with pytest.raises(ValueError, match=r"on cuda:0 but others are on cpu"):
        FusedAccumOptimizer(torch.optim.SGD([a, b], lr=1.0))


def test_parameters_with_gaps() -> None:
    sparse = torch.nn.Parameter(torch.zeros(4, 6)[:, ::2])
    with pytest.raises(ValueError, match="dense"):
        FusedAccumOptimizer(torch.optim.SGD([sparse], lr=1.0))


def test_a_group_that_is_refused_is_not_added() -> None:
    opt = FusedAccumOptimizer(torch.optim.SGD(small_model().parameters(), lr=1.0))
    with pytest.raises(TypeError, match="complex64"):
        bad = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        opt.add_param_group({"params": [bad]})
    assert len(opt.param_groups) == 1
