"""Fused layers where a gradient takes its ordinary path, which modules are fused, and what they are
as modules."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import fusedaccum
from fusedaccum import FusedAccumOptimizer
from fusedaccum.window import products
from tests.distributed.docs_cases import blocks
from tests.linear_nets import (
    RTOL,
    Exact,
    Net,
    autocast,
    net,
    tokens,
    wrap,
)
from tests.linear_nets import added as added
from tests.tolerances import equal_bits

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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["pruned", "parametrized", "a tensor"])
def test_a_bias_that_is_no_parameter_of_the_layer(how: str, when: str) -> None:
    """A fused layer left it out."""

    def change(layer: Any) -> None:
        if how == "pruned":
            prune.random_unstructured(layer, "bias", 1)
        elif how == "parametrized":
            parametrize.register_parametrization(layer, "bias", nn.Softplus())
        else:
            del layer.bias
            layer.bias = torch.arange(5.0)

    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Linear(4, 5))
    stock, x = copy.deepcopy(layer), torch.randn(3, 4)
    for each in (layer, stock):
        torch.manual_seed(1)
        if each is stock or when == "before":
            change(each[0])
    opt = FusedAccumOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    fused = opt.fuse_linear_wgrad(layer, min_numel=0).fused
    if when == "after":
        torch.manual_seed(1)
        change(layer[0])
        opt.zero_grad()
    assert when == "before" or fused
    assert torch.equal(layer(x), stock(x))
    layer(x).square().sum().backward()
    stock(x).square().sum().backward()
    for p, q in zip(layer.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


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
