"""torch.compile of the model or of a whole training step: the same updates; compiled autograd:
refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from fusedaccum import FusedAccumOptimizer
from tests.cases import small_model
from tests.tolerances import equal_bits

MICRO_BATCHES = 12


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def data(i: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(i)).to(dtype)


def run(
    dtype: torch.dtype, n: int | None, compile_with: Any = None, *, checkpointed: bool = False
) -> list[Tensor]:
    """The parameters after three windows of four micro-batches, whoever counts them."""
    model: Any = small_model(dtype)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), n, max_grad_norm=1.0)
    call = model

    def forward(x: Tensor) -> Tensor:
        if checkpointed:
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        return model(x)

    if compile_with is not None:
        call = torch.compile(forward if checkpointed else model, backend=compile_with)
    elif checkpointed:
        call = forward
    for i in range(MICRO_BATCHES):
        call(data(i, dtype)).float().square().mean().backward()
        if n is not None or i % 4 == 3:
            opt.step()
            opt.zero_grad()
    assert opt.window_closed
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "checkpointed", "n"),
    # Every pair of the three: each point compiles for seconds.
    [
        (torch.float32, False, 4), (torch.float32, True, None),
        (torch.bfloat16, False, None), (torch.bfloat16, True, 4),
    ],
    ids=["fp32-wrapper", "fp32-checkpointed-loop", "bf16-loop", "bf16-checkpointed-wrapper"],
)  # fmt: skip
def test_a_compiled_model_makes_the_same_updates(
    dtype: torch.dtype, checkpointed: bool, n: int | None
) -> None:
    """aot_eager runs the same operations in compiled graphs, forward and backward: bit for bit."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = run(dtype, n, counter, checkpointed=checkpointed)
    eager = run(dtype, n, checkpointed=checkpointed)
    assert all(equal_bits(a, b) for a, b in zip(compiled, eager, strict=True))
    # Neither accumulation nor zero_grad() compiles it anew (pytorch issue 118435).
    assert counter.frame_count == 1


def lengths(compile_with: Any, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The parameters after windows whose micro-batches differ in length, each new in mid-window."""
    model: Any = small_model(dtype)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 4, max_grad_norm=1.0)
    call = model
    if compile_with is not None:
        call = torch.compile(model, backend=compile_with, dynamic=False, fullgraph=True)
    for i, length in enumerate((1, 2, 3, 2, 4, 1, 3, 2)):
        before = [p.grad for p in model.parameters()]
        loss = call(data(i, dtype)[:length].repeat(2, 1)).float().square().mean()
        assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
        loss.backward()
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_a_model_that_is_compiled_anew_in_mid_window() -> None:
    """One graph for each length: Dynamo refuses to trace a parameter beside its fp32 gradient."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = lengths(counter)
    assert counter.frame_count == 4
    assert all(equal_bits(a, b) for a, b in zip(compiled, lengths(None), strict=True))
    torch._dynamo.reset()  # which forgets whom it tells of compilations
    assert all(equal_bits(a, b) for a, b in zip(lengths("eager"), compiled, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [None, 2], ids=["loop", "wrapper"])
@pytest.mark.parametrize("part", ["step", "all"])
def test_a_training_step_that_is_compiled_as_a_whole(
    part: str, n: int | None, dtype: torch.dtype
) -> None:
    """Dynamo went into step() and into the hooks, where loops got addresses that it made up."""

    def train(wraps: Any) -> list[Tensor]:
        model: Any = small_model(dtype)
        opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), n)

        def backward(x: Tensor) -> None:
            with opt.micro_batch(weight=2.0):
                model(x).float().square().mean().backward()

        def update() -> None:
            opt.step()
            opt.zero_grad()

        def both(x: Tensor) -> None:
            backward(x)
            update()

        compiled = wraps(update if part == "step" else both)
        for i in range(4):
            if part == "step":
                backward(data(i, dtype))
                compiled()
            else:
                compiled(data(i, dtype))
        assert opt.window_closed
        return [p.detach() for p in model.parameters()]

    compiled = train(torch.compile(backend="eager"))
    assert all(equal_bits(a, b) for a, b in zip(compiled, train(lambda f: f), strict=True))


@pytest.mark.parametrize("then", ["backward", "step", "zero_grad", "state_dict", "fails"])
def test_a_window_that_goes_on_while_another_thread_compiles(then: str) -> None:
    """Nothing of it is lost, whatever comes before the compiler is done."""
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), 3)

    def micro_batch(i: int) -> None:
        model(data(i, torch.bfloat16)).float().square().mean().backward()
        opt.step()
        opt.zero_grad()

    micro_batch(0)
    micro_batch(1)
    own = [p.grad for p in model.parameters()]
    saved = [g.clone() for g in own if g is not None]
    context = torch._dynamo.callback_handler.install_callbacks
    trigger = torch._dynamo.callback.CallbackTrigger.DYNAMO
    try:
        with context(trigger, "0/0"):
            assert all(p.grad is None for p in model.parameters())
            if then == "backward":
                model(data(2, torch.bfloat16)).float().square().mean().backward()
            elif then == "step":
                opt.step()
            elif then == "zero_grad":
                opt.zero_grad()
            elif then == "state_dict":
                opt.state_dict()
            else:
                raise KeyError(then)
    except KeyError:
        pass
    if then == "step":  # an empty micro-batch: the update is two thirds of the mean of two
        assert opt.window_closed
        return
    assert all(p.grad is g for p, g in zip(model.parameters(), own, strict=True))
    if then != "backward":
        assert all(torch.equal(a, b) for a, b in zip(saved, own, strict=True))  # type: ignore[arg-type]
        assert opt.micro_batches == 2


def test_the_comparison_sees_another_window() -> None:
    """The negative control."""
    four, one = run(torch.bfloat16, 4, "aot_eager"), run(torch.bfloat16, 1)
    assert not any(equal_bits(a, b) for a, b in zip(four, one, strict=True))


def test_inductor() -> None:
    """Fused kernels round in other places: in fp32, to a few units in the last place."""
    counter = CompileCounterWithBackend("inductor")
    compiled, eager = run(torch.float32, 4, counter), run(torch.float32, 4)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("how", "n"), [("context", None), ("config", 4)], ids=["context-loop", "config-wrapper"]
)
def test_compiled_autograd_is_refused(n: int | None, how: str) -> None:
    """It makes one graph of the backward; nothing is updated, and one goes on without it."""
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), n)

    def forward_and_backward(x: Tensor) -> None:
        model(x).square().mean().backward()

    def refused(x: Tensor) -> None:
        if how == "config":
            with torch._dynamo.config.patch(compiled_autograd=True):
                torch.compile(forward_and_backward, backend="aot_eager")(x)
        else:
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                forward_and_backward(x)

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="compiled autograd makes one graph"):
        refused(data(0, torch.float32))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    opt.zero_grad()
    plain = small_model()
    for i in range(n or 1):
        forward_and_backward(data(i, torch.float32))
        opt.step()
        (plain(data(i, torch.float32)).square().mean() / (n or 1)).backward()
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-5, atol=1e-6)
