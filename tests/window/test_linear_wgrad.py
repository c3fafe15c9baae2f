"""Weight gradients from the GEMM into the accumulator, beside dYᵀX in float64."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fusedaccum
from fusedaccum import FusedAccumOptimizer
from fusedaccum.window import products
from tests.distributed.docs_cases import blocks
from tests.tolerances import equal_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]
# The product of 30 rows in fp32, and the sum of 4 of them: gamma(40) is 2.4e-6 for what does not
# cancel, and errors of many elements do not all point one way.
RTOL = 1e-6
# A weight gradient that autograd rounds to bf16 is off by 1.7e-3 in L2.
ROUNDED = 5e-4


class Net(nn.Module):
    """Layers with and without a bias, one of them used twice, checkpointed or tied on demand."""

    def __init__(
        self, *, bias: bool = True, tied: bool = False, twice: bool = False, again: str = ""
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 16)
        self.up, self.down = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)
        self.mid, self.norm = nn.Linear(16, 16, bias=bias), nn.LayerNorm(16)
        self.head = nn.Linear(16, 13, bias=False)
        self.twice, self.again = twice, again
        if tied:
            self.head.weight = self.emb.weight

    def block(self, h: Tensor) -> Tensor:
        return h + self.down(F.relu(self.up(h)))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.emb(tokens)
        if self.again:
            h = checkpoint(self.block, h, use_reentrant=self.again == "reentrant")
        else:
            h = self.block(h)
        for _ in range(2 if self.twice else 1):
            h = self.mid(F.gelu(h))
        logits = self.head(self.norm(h)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def net(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options).to(dtype)


def tokens(i: int = 0, length: int = 5) -> Tensor:
    return torch.randint(0, 13, (3, length), generator=torch.Generator().manual_seed(i))


def wrap(model: nn.Module, n: int | None = 2, *, fuses: bool = True, **options: Any) -> Any:
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), n, **options)
    if fuses:
        assert opt.fuse_linear_wgrad(model, min_numel=0).skipped == {}
    return opt


class Exact:
    """Sums of scale dYᵀ X of the Linear modules of a model, by parameter, in float64."""

    def __init__(self, model: nn.Module) -> None:
        self.scale = 1.0
        self.sums: dict[Tensor, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._used)

    def _used(self, module: Any, args: tuple[Tensor], y: Tensor) -> None:
        if not y.requires_grad:
            return
        x = args[0].detach().to(y.dtype, copy=True).flatten(0, -2).double()

        def arrived(dy: Tensor) -> None:
            product = self.scale * dy.flatten(0, -2).double().t() @ x
            self.sums[module.weight] = self.sums.get(module.weight, 0) + product

        y.register_hook(arrived)

    def off(self) -> float:
        """The largest relative error of `p.grad`."""
        return max(float((p.grad - s).norm() / s.norm()) for p, s in self.sums.items())


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters that got a product, one after the other."""
    seen: list[Tensor] = []
    add = products.Products.add

    def logged(self: Any, slot: Any, a: Tensor, b: Tensor) -> None:
        seen.append(slot.param)
        add(self, slot, a, b)

    monkeypatch.setattr(products.Products, "add", logged)
    return seen


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


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


# --- the ordinary path ---


def test_hooks_on_a_weight_see_its_gradient(added: list[Tensor]) -> None:
    model = net()
    opt = wrap(model, 1)
    seen: list[Tensor] = []
    model.up.weight.register_hook(lambda grad: seen.append(grad.clone()))
    model.down.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    exact = Exact(model)
    model(tokens()).backward()
    assert len(seen) == 2 and len(added) == 2 and exact.off() < RTOL
    assert "2 a hook on the weight" in repr(opt)
    opt.step()


def test_autograd_grad_leaves_the_window_alone(added: list[Tensor]) -> None:
    layer = nn.Linear(4, 3)
    twin = copy.deepcopy(layer)
    opt = wrap(layer, 1)
    x = torch.randn(5, 4, requires_grad=True)

    def losses() -> Iterator[tuple[nn.Linear, Tensor]]:
        yield from ((each, each(x).square().sum()) for each in (layer, twin))

    ours, theirs = (torch.autograd.grad(loss, [m.weight, x]) for m, loss in losses())
    assert all(equal_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.autograd.grad(layer(x).sum(), [x])
    layer(x).sum().backward(inputs=[x])
    assert added == [] and layer.weight.grad is None
    layer(x).square().sum().backward(inputs=[layer.weight])
    assert len(added) == 1 and layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, theirs[0])
    opt.step()


@pytest.mark.parametrize("is_autocast", [False, True], ids=["", "autocast"])
def test_a_gradient_penalty(is_autocast: bool) -> None:
    layer = nn.Linear(4, 3)
    twin = copy.deepcopy(layer)
    opt = wrap(layer, 1)
    x = torch.randn(5, 4, requires_grad=True)
    for each in (layer, twin):
        with autocast() if is_autocast else nullcontext():
            loss = each(x).float().sin().sum()
        (dx,) = torch.autograd.grad(loss, [x], create_graph=True)
        (dx.square().sum() + loss).backward()
    assert layer.weight.grad is not None and twin.weight.grad is not None
    rtol = 2e-2 if is_autocast else 1e-5
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=rtol, atol=rtol)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        layer(x).sin().sum().backward(create_graph=True)
    assert "1 create_graph=True" in repr(opt)


def test_functional_transforms() -> None:
    model = net()
    twin = copy.deepcopy(model)
    _opt = wrap(model, 1)
    detached = {name: p.detach() for name, p in model.named_parameters()}

    def loss(m: nn.Module) -> Callable[[Any], Tensor]:
        return lambda p: torch.func.functional_call(m, p, (tokens(),))

    ours, theirs = (torch.func.grad(loss(m))(detached) for m in (model, twin))
    assert all(equal_bits(ours[name], theirs[name]) for name in detached)
    x = torch.randn(2, 3, 16)
    assert torch.equal(torch.vmap(model.up)(x), torch.vmap(twin.up)(x))
    jacobian = torch.func.jacrev(model.up)(x[0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(twin.up)(x[0]))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ours_, theirs_ = (forward_ad.unpack_dual(m.up(dual)).tangent for m in (model, twin))
    assert equal_bits(ours_, theirs_)
    assert all(p.grad is None for p in model.parameters())


def test_inference_and_a_frozen_weight(added: list[Tensor]) -> None:
    model = net()
    opt = wrap(model, 1)
    with torch.no_grad():
        assert model(tokens()).grad_fn is None
    with torch.inference_mode():
        model(tokens())
    model.up.weight.requires_grad_(False)
    model(tokens()).backward()
    assert len(added) == 3 and model.up.weight.grad is None
    opt.step()


def test_an_input_of_another_dtype_raises_as_ever() -> None:
    layer = nn.Linear(4, 3)
    _opt = wrap(layer)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 4).double())
    with autocast(), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 4).double())


# --- which modules ---


def test_what_is_skipped_and_why() -> None:
    class Sub(nn.Linear):
        pass

    model = nn.ModuleDict({
        "fused": nn.Linear(8, 8), "frozen": nn.Linear(8, 8), "sub": Sub(8, 8),
        "small": nn.Linear(8, 4), "row": nn.Linear(80, 1), "other": nn.Linear(8, 8),
        "replaced": nn.Linear(8, 8), "normed": nn.utils.weight_norm(nn.Linear(8, 8)),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "attention": nn.MultiheadAttention(8, 2), "taken": nn.Linear(8, 8),
    })  # fmt: skip
    model["frozen"].weight.requires_grad_(False)
    model["replaced"].forward = model["replaced"].forward
    own = [p for name, m in model.items() if name not in ("other", "taken") for p in m.parameters()]
    taker = FusedAccumOptimizer(torch.optim.SGD(model["taken"].parameters(), lr=0.1))
    taker.fuse_linear_wgrad(model["taken"], min_numel=0)
    opt = FusedAccumOptimizer(torch.optim.SGD(own, lr=0.1))
    report = opt.fuse_linear_wgrad(model, min_numel=64)
    assert report.fused == ("fused",)
    assert {name: reason.split(":")[0] for name, reason in report.skipped.items()} == {
        "frozen": "frozen", "sub": "a subclass", "small": "small", "row": "small",
        "other": "another optimizer's", "replaced": "a replaced forward",
        "normed": "a computed weight", "parametrized": "a subclass",
        "attention.out_proj": "a subclass", "taken": "fused for another optimizer",
    }  # fmt: skip
    assert "linear: 1 fused, 64 parameters; skipped: 1 frozen, 3 a subclass" in repr(opt)
    assert opt.fuse_linear_wgrad(model, min_numel=64) == report


def test_a_linked_scaler_takes_the_ordinary_path() -> None:
    model = net(torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = FusedAccumOptimizer(sgd, 2, grad_scaler=scaler)
    report = opt.fuse_linear_wgrad(model, min_numel=0)
    assert report.fused == () and set(report.skipped.values()) == {products.LINKED}
    for i in range(2):
        scaler.scale(model(tokens(i))).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert opt.window_closed


@pytest.mark.parametrize("fused_unscale", [False, True], ids=["stock", "handed-over"])
@pytest.mark.parametrize("overflows", [False, True], ids=["", "overflow"])
def test_a_scaler_that_is_not_linked(
    fused_unscale: bool, overflows: bool, added: list[Tensor]
) -> None:
    model, twin = net(), net()
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = FusedAccumOptimizer(sgd, fused_unscale=fused_unscale)
    opt.fuse_linear_wgrad(model, min_numel=0)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    factor = float("inf") if overflows else 1.0
    for m, s, o in ((model, scaler, opt), (twin, other, plain)):
        for i in range(2):
            s.scale(m(tokens(i)) * factor).backward()
        s.step(o)
        s.update()
    assert len(added) == 8 and scaler.get_scale() == other.get_scale()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "least", "error", "says"), [
    ("model", 0, TypeError, "model must be a torch.nn.Module, got str"),
    (nn.Linear(2, 2), -1, ValueError, "min_numel must be an int >= 0.*got -1"),
    (nn.Linear(2, 2), 1.5, TypeError, "min_numel must be an int >= 0.*got 1.5"),
])  # fmt: skip
def test_wrong_arguments(model: Any, least: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        wrap(nn.Linear(2, 2), fuses=False).fuse_linear_wgrad(model, least)


def test_the_default_leaves_small_weights() -> None:
    model = net()
    opt = wrap(model, fuses=False)
    report = opt.fuse_linear_wgrad(model)
    assert report.fused == () and len(report.skipped) == 4
    assert report.skipped["up"] == "small: 512 elements, fewer than min_numel=4,194,304"


# --- the modules themselves ---


def test_copies_and_pickles_are_of_the_stock_class(added: list[Tensor]) -> None:
    model = net()
    opt = wrap(model, 1)
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    copies: Sequence[Net] = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(memory, weights_only=False),
    ]
    for other in copies:
        assert type(other.up) is nn.Linear and vars(other.up).keys() == vars(net().up).keys()
        other(tokens()).backward()
        assert other.up.weight.grad is not None
    assert added == [] and model.up.weight.grad is None
    copied = copy.deepcopy(opt)
    assert "linear:" not in repr(copied)
    assert repr(model) == repr(net()) and isinstance(model.up, nn.Linear)


@pytest.mark.parametrize("how", ["unfuse", "detach", "del"])
def test_back_to_stock(how: str, added: list[Tensor]) -> None:
    model = net()
    opt = wrap(model, 1)
    loss = model(tokens())
    if how == "unfuse":
        opt.unfuse_linear_wgrad()
        assert "linear:" not in repr(opt)
    elif how == "detach":
        opt.detach()
    else:
        del opt
    assert type(model.up) is nn.Linear and vars(model.up).keys() == vars(net().up).keys()
    loss.backward()  # a graph of before
    model(tokens()).backward()
    assert len(added) == (4 if how == "unfuse" else 0)
    twin = net()
    twin(tokens()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, 2 * q.grad)


def test_unfused_inside_a_window() -> None:
    model = net(torch.bfloat16)
    opt, exact = wrap(model, 2), Exact(model)
    exact.scale = 0.5
    model(tokens(0)).backward()
    opt.step()
    assert exact.off() < RTOL
    opt.unfuse_linear_wgrad()
    model(tokens(1)).backward()
    assert RTOL < exact.off() < 4e-3
    opt.step()
    assert opt.window_closed


@contextmanager
def saved_bytes(seen: dict[int, int]) -> Iterator[None]:
    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


@pytest.mark.parametrize("is_autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("bias", [True, False])
def test_as_many_bytes_are_saved_for_the_backward(is_autocast: bool, bias: bool) -> None:
    model = net(bias=bias)
    twin = copy.deepcopy(model)
    opt = wrap(model, 1)
    sizes = []
    for each in (model, twin):
        seen: dict[int, int] = {}
        with saved_bytes(seen), autocast() if is_autocast else nullcontext():
            loss = each(tokens())
        sizes.append(sum(seen.values()))
        loss.backward()
    assert sizes[0] == sizes[1] > 0
    opt.step()


def test_an_input_that_needs_no_gradient_saves_no_weight() -> None:
    layer = nn.Linear(4, 3)
    _opt = wrap(layer, 1)
    seen: dict[int, int] = {}
    x = torch.randn(2, 4)
    with saved_bytes(seen):
        layer(x)
    assert list(seen) == [x.data_ptr()]


def test_a_weight_that_is_written_between_forward_and_backward_is_refused() -> None:
    layer = nn.Linear(4, 3)
    _opt = wrap(layer, 1)
    loss = layer(torch.randn(2, 4, requires_grad=True)).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_code_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Linear(2048, 2048), nn.Linear(2048, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(self.small(self.large(x)), y)

    loader = [(torch.randn(2, 2048), torch.randn(2, 1))] * 8
    given: dict[str, Any] = {"fusedaccum": fusedaccum, "torch": torch, "loader": loader}
    given["model"] = Model()
    exec(blocks("linear.md")["one call"], given)
    assert given["opt"].window_closed
    assert capsys.readouterr().out.startswith("('large',)\n{'small': 'small: 2,048 elements")


def test_the_example_of_the_docstring() -> None:
    parser = doctest.DocTestParser()
    text = FusedAccumOptimizer.fuse_linear_wgrad.__doc__
    assert text is not None
    example = parser.get_doctest(text, {}, "fuse_linear_wgrad", None, None)
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0
