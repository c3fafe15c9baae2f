"""torch.compile of a model with fused layers: one graph, the same sums, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch.profiler import ProfilerActivity, profile

from fusedaccum import FusedAccumOptimizer
from fusedaccum.window import linear, linear_traced
from tests.linear_nets import added as added
from tests.linear_nets import autocast, net, tokens, wrap
from tests.tolerances import equal_bits


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused(n: int | None = 1, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = net(**options)
    return model, wrap(model, n), torch.compile(model, backend="aot_eager", fullgraph=True)


def gradients(
    model: nn.Module, opt: Any, call: Any, *, is_autocast: bool, lengths: Sequence[int]
) -> list[Tensor]:
    """The accumulators of two windows, those of the first one first."""
    found: list[Tensor] = []
    for window in range(2):
        for i, length in enumerate(lengths):
            with autocast() if is_autocast else nullcontext():
                loss = call(tokens(10 * window + i, length))
            loss.backward()
            shown = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            opt.step()
            opt.zero_grad()
        assert opt.window_closed
        found += shown
    assert len(found) == 2 * len(list(model.parameters()))
    return found


CASES: list[tuple[torch.dtype, bool, dict[str, Any]]] = [
    (torch.float32, False, {}), (torch.bfloat16, False, {"twice": True, "tied": True}),
    (torch.float32, True, {"again": "other"}), (torch.bfloat16, False, {"again": "other"}),
    (torch.float16, False, {"bias": False}),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "is_autocast", "options"), CASES, ids=str)
def test_the_sums_are_those_without_compiling(
    dtype: torch.dtype, is_autocast: bool, options: dict[str, Any], added: list[Tensor]
) -> None:
    """One graph for six micro-batches of two windows, and every weight a product each time."""
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for is_compiled in (True, False):
        model = net(dtype, **options)
        opt = wrap(model, 3)
        call = torch.compile(model, backend=counter, fullgraph=True) if is_compiled else model
        found.append(gradients(model, opt, call, is_autocast=is_autocast, lengths=(5, 5, 5)))
    assert all(equal_bits(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1
    assert len(added) == 2 * 6 * (5 if "twice" in options else 4)


def test_inductor_and_three_lengths(added: list[Tensor]) -> None:
    """The second length compiles once more, with a length that may change; the others do not."""
    dtype = torch.bfloat16  # one, as each compiles for a while
    counter = CompileCounterWithBackend("inductor")
    model, plain = net(dtype), net(dtype)
    opt, other = wrap(model, 4), wrap(plain, 4, fuses=False)
    call = torch.compile(model, backend=counter, fullgraph=True)
    # Dynamo compiles nothing for a bf16 parameter while its `grad` is fp32, fused or not.
    lengths = (5, 7, 9, 11) if dtype is torch.float32 else (5, 5, 5, 5)
    ours = gradients(model, opt, call, is_autocast=False, lengths=lengths)
    theirs = gradients(plain, other, plain, is_autocast=False, lengths=lengths)
    assert counter.frame_count == len({*lengths[:2]}) and len(added) == 2 * 4 * 4
    rtol = 1e-4 if dtype is torch.float32 else 0.05  # inductor rounds to bf16 in other places
    # Of the first window: AdamW's first update is the gradient's sign, which rounding may turn.
    for a, b in list(zip(ours, theirs, strict=True))[: len(ours) // 2]:
        assert float((a - b).norm() / b.norm()) < rtol


def test_equal_blocks_share_a_graph(added: list[Tensor]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    twin = copy.deepcopy(model)
    opt, plain = wrap(model, 1), wrap(twin, 1, fuses=False)
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(2):
        model(x).sum().backward()
        twin(x).sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        opt.zero_grad()
        plain.zero_grad()
    assert counter.frame_count == 1 and len(added) == 12
    assert {id(p) for p in added} == {id(block[0].weight) for block in model}


def test_conv1d(added: list[Tensor]) -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(24, 16)
    twin = copy.deepcopy(layer)
    opt = wrap(layer, None)
    x = torch.randn(2, 3, 16)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).relu().sum().backward()
    twin(x).relu().sum().backward()
    assert len(added) == 1
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    opt.step()


def outputs_of_the_backward(*, fuses: bool) -> list[torch.Size]:
    """The shapes of all gradients that a compiled backward returns."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    opt = wrap(model, 1, fuses=fuses)
    shapes: list[torch.Size] = []

    def backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        (returned,) = next(iter(reversed(graph.graph.nodes))).args
        shapes.extend(node.meta["val"].shape for node in returned if node is not None)
        return graph

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        stock: Any = lambda g, _: g  # noqa: E731
        return aot_module_simplified(graph, inputs, fw_compiler=stock, bw_compiler=backward)

    torch.compile(model, backend=backend)(torch.randn(4, 16)).sum().backward()
    opt.step()
    return shapes


def test_no_weight_gradient_is_a_result_of_the_graph() -> None:
    """So that no memory is kept for one until the backward is over."""
    weights = {(32, 16), (8, 32)}
    assert weights <= {tuple(s) for s in outputs_of_the_backward(fuses=False)}
    assert weights.isdisjoint(tuple(s) for s in outputs_of_the_backward(fuses=True))


def test_unfused_it_is_compiled_anew() -> None:
    model, opt, call = fused()
    call(tokens()).backward()
    opt.unfuse_linear_wgrad()
    call(tokens()).backward()
    twin = net()
    twin(tokens()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * q.grad)


def test_another_wrapper_that_takes_over_is_not_fused(added: list[Tensor]) -> None:
    model, opt, call = fused()
    call(tokens()).backward()
    opt.step()
    opt.zero_grad()
    second = wrap(model, 1, fuses=False)
    call(tokens()).backward()
    assert len(added) == 4 and type(model.up) is nn.Linear
    assert "linear:" not in repr(opt) and "linear:" not in repr(second)
    second.step()


def test_gradients_of_other_tensors_leave_the_window_alone(added: list[Tensor]) -> None:
    model, opt, call = fused()
    (grad,) = torch.autograd.grad(call(tokens()), [model.norm.weight])
    (theirs,) = torch.autograd.grad(net()(tokens()), [net().norm.weight], allow_unused=True)
    assert theirs is None and grad.norm() > 0
    assert added == [] and model.up.weight.grad is None
    with torch.no_grad():
        call(tokens())
    call(tokens()).backward()
    assert len(added) == 4
    opt.step()


def test_functional_transforms_take_the_ordinary_path(added: list[Tensor]) -> None:
    model, opt, _ = fused()
    x = torch.randn(2, 3, 16)

    def run(f: Any) -> Tensor:
        return torch.compile(f, backend="aot_eager", fullgraph=True)(x)

    def slope(m: Any) -> Any:
        return lambda x: torch.func.grad(lambda x: m.up(x).sin().sum())(x)

    torch.testing.assert_close(run(slope(model)), slope(net())(x))
    torch.testing.assert_close(run(lambda x: torch.vmap(model.up)(x)), model.up(x))
    assert added == []
    torch.export.export(nn.Sequential(model.up), (x,))
    torch.jit.trace(nn.Sequential(model.up), x)
    torch.fx.symbolic_trace(nn.Sequential(model.up))
    opt.zero_grad()


# --- refused ---


@pytest.mark.parametrize("what", ["grad", "hook", "unfuse", "detach", "replaced"])
def test_what_a_graph_cannot_do_is_refused(what: str) -> None:
    model, opt, call = fused()
    says = "no accumulator for it"
    loss = call(tokens())
    if what == "grad":
        with pytest.raises(RuntimeError, match=r"grad\(\) was asked for the gradient of the weig"):
            torch.autograd.grad(loss, [model.up.weight])
        assert model.up.weight.grad is None
        return
    if what == "hook":
        model.up.weight.register_hook(lambda grad: grad)
        says = "a hook waits for the gradient of the weight"
    elif what == "unfuse":
        opt.unfuse_linear_wgrad()
    elif what == "detach":
        opt.detach()
    else:
        model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    with pytest.raises(RuntimeError, match=says):
        loss.backward()


def test_a_weight_with_a_hook_is_not_fused() -> None:
    model = net()
    model.up.weight.register_hook(lambda grad: grad)
    opt = wrap(model, 1, fuses=False)
    report = opt.fuse_linear_wgrad(model, min_numel=0)
    assert report.skipped == {"up": "a hook on the weight"} and len(report.fused) == 3
    torch.compile(model, backend="aot_eager", fullgraph=True)(tokens()).backward()
    opt.step()


def test_a_torch_without_such_operators(
    monkeypatch: pytest.MonkeyPatch, added: list[Tensor]
) -> None:
    """The ordinary path, and `repr` says why."""
    linear_traced.register()
    monkeypatch.setattr(linear_traced, "WHY_NOT", "this torch is old")
    _, opt, call = fused()
    call(tokens()).backward()
    assert added == []
    assert "not under torch.compile: this torch is old" in repr(opt)
    opt.step()
    assert linear.KEY == linear_traced.KEY


def _peak(is_fused: bool, width: int, layers: int) -> int:
    """Bytes of what one micro-batch of a compiled bf16 model allocates, at the most at once."""
    stack = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    model = nn.Sequential(*stack).bfloat16()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), 4)
    if is_fused:
        assert len(opt.fuse_linear_wgrad(model, 0).fused) == layers
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, width).bfloat16()

    def micro_batch() -> None:
        call(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(5):
        micro_batch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        micro_batch()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def test_a_compiled_backward_takes_two_bytes_less_for_each_fused_parameter() -> None:
    """Its graph gives all weight gradients at once; with fused layers there are none."""
    width, layers = 128, 12
    n_params = layers * width * width
    hooks, fused = _peak(False, width, layers), _peak(True, width, layers)
    assert hooks >= 2 * n_params
    # On a CPU the product of bf16 factors is made in fp32, of one layer at a time.
    assert fused <= hooks - 2 * n_params + 4 * width * width
