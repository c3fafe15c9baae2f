"""Weight gradients from the GEMM into the accumulator, beside dYᵀX in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.linear_nets import (
    DTYPES,
    NAMES,
    ROUNDED,
    RTOL,
    Exact,
    autocast,
    net,
    tokens,
    wrap,
)
from tests.linear_nets import added as added
from tests.tolerances import equal_bits

# --- the numbers ---


@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"twice": True}, {"again": "reentrant"}, {"again": "other"},
    {"again": "other", "twice": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_accumulators_are_the_products(
    dtype: torch.dtype, options: dict[str, Any], added: list[Tensor]
) -> None:
    """Micro-batches of different lengths, in two windows; every gradient of a weight fused."""
    model = net(dtype, **options)
    opt = wrap(model, 3)
    for _ in range(2):
        exact = Exact(model)
        exact.scale = 1 / 3
        for i in range(3):
            model(tokens(i, 4 + i)).backward()
            if i < 2:
                opt.step()
                opt.zero_grad()
        assert len(exact.sums) == 4 and exact.off() < RTOL
        opt.step()
        opt.zero_grad()
    assert len(added) == 6 * (5 if "twice" in options else 4)


def test_without_fusing_a_weight_gradient_is_rounded() -> None:
    """The negative control, and what differs by design."""
    model = net(torch.bfloat16)
    opt = wrap(model, 1, fuses=False)
    exact = Exact(model)
    model(tokens()).backward()
    assert ROUNDED < exact.off() < 4e-3
    opt.step()


@pytest.mark.parametrize("again", ["", "reentrant", "other"])
def test_autocast_over_fp32_weights(again: str, added: list[Tensor]) -> None:
    model = net(again=again)
    opt, exact = wrap(model, 1), Exact(model)
    with autocast():
        loss = model(tokens())
    loss.backward()
    assert exact.off() < RTOL and len(added) == 4
    opt.step()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES[:2])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["", "autocast"])
def test_the_forward_and_other_gradients_are_those_of_stock(
    dtype: torch.dtype, is_autocast: bool
) -> None:
    """Bit for bit: outputs, and gradients of biases, norms and inputs."""
    model = net(dtype)
    twin = copy.deepcopy(model)
    opt, plain = wrap(model, 1), wrap(twin, 1, fuses=False)
    for _ in range(2):
        with autocast() if is_autocast else nullcontext():
            ours, theirs = model(tokens()), twin(tokens())
        assert equal_bits(ours, theirs)
        ours.backward()
        theirs.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            if not name.endswith("weight") or name in ("norm.weight", "emb.weight"):
                assert equal_bits(p.grad, q.grad), name
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=2**-7, atol=1e-4)
        opt.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("shape", [(16,), (4, 16), (2, 3, 16), (2, 2, 2, 16), (0, 16), (2, 0, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES[:2])
def test_inputs_of_any_shape(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 8, bias=bias, dtype=dtype)
    twin = copy.deepcopy(layer)
    _opt = wrap(layer, None)
    x, y = (
        torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2)) for _ in "xy"
    )
    x.requires_grad_()
    y = x.detach().clone().requires_grad_()
    for i in range(2):
        a, b = layer(x).relu_(), twin(y).relu_()
        assert equal_bits(a, b) and a.grad_fn is not None
        (a.sin().sum() * (i + 1)).backward()
        (b.sin().sum() * (i + 1)).backward()
    assert x.grad is not None and y.grad is not None and equal_bits(x.grad, y.grad)
    assert layer.weight.grad is not None and twin.weight.grad is not None
    wide = twin.weight.grad.float()
    torch.testing.assert_close(
        layer.weight.grad, wide, rtol=2**-6, atol=1e-2 if dtype is torch.bfloat16 else 1e-5
    )


def test_strided_inputs_and_gradients(added: list[Tensor]) -> None:
    layer = nn.Linear(16, 8)
    opt, exact = wrap(layer, None), Exact(layer)
    x = torch.randn(3, 2, 16).transpose(0, 1)
    (layer(x) * torch.randn(8, 3, 2).permute(2, 1, 0)).sum().backward()
    layer(torch.randn(16, 4).t()).transpose(0, 1).sum().backward()
    assert exact.off() < RTOL and len(added) == 2
    opt.step()


def test_a_tied_weight(added: list[Tensor]) -> None:
    """The embedding's gradient arrives, the head's is a product; both are in the sum."""
    model = net(tied=True)
    opt = wrap(model, 2)
    twin = net(torch.float64, tied=True)
    for i in range(2):
        model(tokens(i)).backward()
        (twin(tokens(i)) / 2).backward()
        if not i:
            opt.step()
    assert [p is model.emb.weight for p in added].count(True) == 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-5


def test_two_modules_share_a_weight(added: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    opt, exact = wrap(model, 1), Exact(model)
    model(torch.randn(5, 8)).sum().backward()
    assert len(added) == 2 and exact.off() < RTOL
    opt.step()


def test_conv1d(added: list[Tensor]) -> None:
    """transformers' layer, whose weight is [in, out]."""
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(24, 16)
    twin = copy.deepcopy(layer).double()
    opt = wrap(layer, 2)
    assert type(layer) is not Conv1D and isinstance(layer, Conv1D)
    for i in range(2):
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(i))
        y = layer(x)
        y.relu_().square().sum().backward()
        (twin(x.double()).relu().square().sum() / 2).backward()
        if not i:
            opt.step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-5
    assert len(added) == 2 and type(copy.deepcopy(layer)) is Conv1D


# --- the window ---


def test_token_weights_and_a_partial_window() -> None:
    model = net(torch.bfloat16)
    opt = wrap(model, 4)
    exact = Exact(model)
    for i, weight in enumerate((3, 5, 1)):
        exact.scale = weight / 9
        with opt.micro_batch(weight=weight):
            model(tokens(i, weight)).backward()
        opt.step()
    shown = {p: p.grad.clone() for p in exact.sums}
    opt.flush()
    assert opt.window_closed
    # p.grad has the scale weight / (4 * 3) until the update divides.
    for p, total in exact.sums.items():
        assert float((shown[p] * 12 / 9 - total).norm() / total.norm()) < RTOL


@pytest.mark.parametrize("n", [2, None], ids=["wrapper", "loop"])
def test_the_norm_and_clipping(n: int | None) -> None:
    """The norm is that of what is shown; the clipped update is that of a twin."""
    model, twin = net(), net(torch.float64)
    opt = wrap(model, n, max_grad_norm=0.1)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for _ in range(2):
        for i in range(2):
            (model(tokens(i)) / (1 if n else 2)).backward()
            (twin(tokens(i)) / 2).backward()
            if n or i:
                opt.step()
                if not opt.window_closed:
                    opt.zero_grad()
        shown = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        assert float(opt.grad_norm) == pytest.approx(float(shown), rel=1e-6)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        assert float(opt.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        plain.step()
        plain.zero_grad()
        opt.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-4)


def test_a_window_with_nan_is_skipped_and_leaves_nothing() -> None:
    model = net(torch.bfloat16)
    opt = wrap(model)
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (1.0, float("nan")):
        (model(tokens()) * bad).backward()
        opt.step()
        opt.zero_grad()
    assert int(opt.skipped_steps) == 1
    assert all(equal_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))
    exact = Exact(model)
    exact.scale = 0.5
    model(tokens()).backward()
    assert exact.off() < RTOL


def test_a_loop_that_owns_the_window() -> None:
    """Zeroed, taken away, assigned: what holds for gradients holds for products."""
    layer = nn.Linear(4, 3)
    opt = wrap(layer, None)
    x = torch.randn(5, 4)
    weight = layer.weight

    def grad() -> Tensor:
        layer(x).square().sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    once = grad()
    torch.testing.assert_close(grad(), 2 * once)
    layer.zero_grad()
    assert torch.equal(grad(), once)
    weight.grad = torch.ones(3, 4)
    torch.testing.assert_close(grad(), 1 + once)
    weight.grad = None
    assert torch.equal(grad(), once)
    opt.zero_grad(set_to_none=False)
    assert torch.equal(grad(), once)
    opt.step()


def test_a_checkpoint_inside_a_window() -> None:
    """Resumed bit for bit, fused or not at that time."""
    model = net(torch.bfloat16)
    opt = wrap(model, 2)
    model(tokens(0)).backward()
    opt.step()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    plain_names = list(net().state_dict())
    assert list(saved[0]) == plain_names
    other = net(torch.bfloat16)
    other.load_state_dict(saved[0])
    resumed = wrap(other, 2)
    resumed.load_state_dict(saved[1])
    for m, o in ((model, opt), (other, resumed)):
        m(tokens(1)).backward()
        o.step()
        o.zero_grad()
        assert o.window_closed
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())


def test_a_model_that_is_converted_after_fusing(added: list[Tensor]) -> None:
    model = net()
    opt = wrap(model, 1)
    model.bfloat16()
    opt.zero_grad()
    exact = Exact(model)
    model(tokens()).backward()
    assert len(added) == 4 and exact.off() < RTOL
    opt.step()


def test_a_model_converted_inside_a_window_is_refused() -> None:
    model = net()
    opt = wrap(model, 2)
    model(tokens()).backward()
    opt.step()
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"changed after (it was|they were) wrapped"):
        model(tokens()).backward()
        opt.step()


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        raise RuntimeError("boom")


def test_a_backward_that_raises_half_way_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = wrap(model, 2)
    with pytest.raises(RuntimeError, match="boom"):
        model[1](Boom.apply(model[0](torch.randn(2, 4)))).sum().backward()
    with pytest.raises(RuntimeError, match="part of a micro-batch"):
        opt.step()
    opt.zero_grad()
    exact = Exact(model)
    exact.scale = 0.5
    model(torch.randn(2, 4)).sum().backward()
    assert exact.off() < RTOL
