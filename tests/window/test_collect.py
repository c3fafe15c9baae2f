"""From real backwards to the accumulators: whatever autograd does, every gradient counts once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedaccum import FusedAccumOptimizer
from tests.cases import case_id, small_model, tensor
from tests.traps import no_host_reads

Loss = Callable[[Any], Tensor]


def gradients(make: Callable[[], Any], loss: Loss, n: int, **options: Any) -> list[list[Tensor]]:
    """Accumulated gradients of `n` backwards: of plain torch, and of the wrapper."""
    plain, ours = make(), make()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.0), **options)
    for _ in range(n):
        loss(plain).backward()
        loss(ours).backward()
    opt.step()
    return [
        [torch.zeros(()) if p.grad is None else p.grad.to_dense() for p in model.parameters()]
        for model in (plain, ours)
    ]


def assert_equal(both: list[list[Tensor]], rtol: float = 1e-5) -> None:
    for plain, ours in zip(*both, strict=True):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=1e-6)


class Tied(torch.nn.Module):
    """One weight used as embedding and as head."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(11, 6, sparse=sparse)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) @ self.embedding.weight.t()


@pytest.mark.parametrize("bucket", [1e-6, 128], ids=["each", "all"])
def test_tied_weights(bucket: float) -> None:
    ids = torch.tensor([1, 5, 5, 10])
    assert_equal(gradients(Tied, lambda m: m(ids).square().sum(), 3, bucket_cap_mb=bucket))


def test_sparse_embedding_gradients() -> None:
    ids = torch.tensor([1, 5, 5, 10])
    both = gradients(
        lambda: torch.nn.Embedding(11, 6, sparse=True), lambda m: (m(ids) ** 2).sum(), 1
    )
    assert both[0][0].shape == (11, 6) and both[1][0].layout is torch.strided
    torch.manual_seed(0)
    module = torch.nn.Embedding(11, 6, sparse=True)
    opt = FusedAccumOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), 2)
    before = module.weight.detach().clone()
    for _ in range(2):
        module(ids).sum().backward()
        opt.step()
    expected = torch.zeros(11, 6)
    expected[[1, 5, 10]] = torch.tensor([1.0, 2.0, 1.0])[:, None]
    torch.testing.assert_close(before - module.weight.detach(), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("bucket", [1e-6, 128], ids=["each", "all"])
def test_gradient_checkpointing_with_shared_weights(reentrant: bool, bucket: float) -> None:
    """A reentrant checkpoint is a backward in the backward; shared weights arrive in both."""
    x = torch.randn(4, 33, requires_grad=True)

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.layer, self.last = torch.nn.Linear(33, 33), torch.nn.Linear(33, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = checkpoint(self.layer, x, use_reentrant=reentrant).tanh()
            return self.last(self.layer(x))

    assert_equal(gradients(Shared, lambda m: m(x).square().sum(), 3, bucket_cap_mb=bucket))


def test_several_backwards_in_one_micro_batch() -> None:
    """Two losses, one graph kept: their gradients add up, as in torch."""
    x = torch.randn(3, 7)

    def loss(model: Any) -> Tensor:
        out = model(x)
        out.square().sum().backward(retain_graph=True)
        return out.sum()

    assert_equal(gradients(small_model, loss, 2))


def test_autograd_grad_leaves_the_accumulators_alone() -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    x = torch.randn(3, 7)
    model(x).sum().backward()
    before = [p.grad for p in model.parameters()]
    values = [p.grad.clone() for p in model.parameters()]
    torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for p, grad, value in zip(model.parameters(), before, values, strict=True):
        assert p.grad is grad and torch.equal(grad, value)
    opt.step()


class NoGradient(torch.autograd.Function):
    """Its backward gives None where a gradient was possible."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("owner", [3, None])
def test_an_undefined_gradient_adds_nothing_and_loses_nothing(owner: int | None) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([weight], lr=3.0), owner)
    for index in range(3):
        (NoGradient.apply(weight) if index == 1 else weight).sum().backward()
        if owner:
            opt.step()
            opt.zero_grad()
    if owner is None:
        opt.step()
    assert weight.tolist() == [-2.0 if owner else -6.0] * 3


def test_backward_with_inputs() -> None:
    def loss(model: Any) -> Tensor:
        out = model(torch.ones(3, 7)).square().sum()
        out.backward(inputs=[model[0].weight], retain_graph=True)
        return out

    assert_equal(gradients(small_model, loss, 2))


def test_create_graph() -> None:
    """A gradient penalty needs the graph of a gradient; the accumulator is not part of it."""
    x = torch.randn(3, 7, requires_grad=True)

    def loss(model: Any) -> Tensor:
        out = model(x).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return out + slope.square().sum()

    assert_equal(gradients(small_model, loss, 2))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g[:1, :1].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "offset": lambda g: torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape),
    "float32": lambda g: g.float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(layout: str, backend: str, dtype: torch.dtype) -> None:
    """Gradients as people assign them; autograd's own come through the other tests."""
    param = torch.nn.Parameter(torch.zeros(37, 21, dtype=dtype))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=0.0), 4, backend=backend)
    expected = torch.zeros(37, 21)
    for seed in range(4):
        grad = LAYOUTS[layout](tensor(37 * 21, dtype, seed=seed).view(37, 21))
        expected += grad.float() / 4
        param.grad = grad
        opt.step()
    assert param.grad is not None and torch.equal(param.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_channels_last_parameters(dtype: torch.dtype) -> None:
    """Dense in another order: accumulators and states follow the parameter's memory."""

    def make() -> torch.nn.Conv2d:
        torch.manual_seed(4)
        conv = torch.nn.Conv2d(5, 6, 3, dtype=dtype)
        return conv.to(memory_format=torch.channels_last)

    x = torch.randn(2, 5, 7, 7).to(dtype).to(memory_format=torch.channels_last)
    ours, plain = make(), make().float()
    opt = FusedAccumOptimizer(torch.optim.AdamW(ours.parameters(), lr=0.1), 1)
    native = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for _ in range(3):
        ours(x).float().square().mean().backward()
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step()
        native.step()
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=2**-7, atol=1e-6)


def test_empty_and_scalar_parameters() -> None:
    empty, scalar = torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.tensor(1.0))
    opt = FusedAccumOptimizer(torch.optim.AdamW([empty, scalar], lr=0.1), 2, max_grad_norm=1.0)
    for _ in range(2):
        (empty.sum() + 3 * scalar).backward()
        opt.step()
    assert scalar.item() == pytest.approx(0.9, abs=2e-3) and opt.grad_norm.item() == 3.0


def test_user_hooks_see_the_fresh_gradient() -> None:
    """Tensor hooks run before, post-accumulate hooks after autograd's part, as documented."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=0.1), 2)
    seen: list[Any] = []
    param.register_hook(lambda g: seen.append(g.dtype))
    param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    param.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert opt.param_groups[0]["params"][0].grad.dtype == torch.float32


@pytest.mark.parametrize("scaler", ["no-scaler", "linked-scaler"])
def test_nothing_waits_for_the_device(scaler: str) -> None:
    """A window on the kernels' path never reads a device value on the host."""
    model = small_model(torch.bfloat16)
    linked = torch.amp.GradScaler("cpu") if scaler == "linked-scaler" else None
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters()),
        4,
        max_grad_norm=1.0,
        backend="triton",
        grad_scaler=linked,
    )
    x = torch.randn(3, 7, dtype=torch.bfloat16)

    def window() -> None:
        for _ in range(4):
            loss = model(x).sum()
            if linked is None:
                loss.backward()
                opt.step()
            else:
                linked.scale(loss).backward()
                linked.step(opt)
                linked.update()
            opt.zero_grad()

    window()  # state is made, tables are uploaded

    with no_host_reads():
        window()
        opt.param_groups[0]["lr"] = 0.5
        window()
    assert int(opt.skipped_steps) == 0
