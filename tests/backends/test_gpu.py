"""What only a GPU can show: nothing waits, streams, graphs, large tensors.

Run by `make gpu` (TRITON_INTERPRET=0).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fusedaccum import FusedAccumOptimizer, functional
from tests.cases import CASES, Case, Gradients, case_id, small_model
from tests.tolerances import equal_bits

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def inputs(n: int, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 7, generator=generator).to("cuda", dtype) for _ in range(n)]


def train(model: torch.nn.Module, opt: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    for x in data:
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_automatic_backend_trains_as_torch(case: Case) -> None:
    ours, theirs = (small_model().cuda() for _ in range(2))
    opt = FusedAccumOptimizer(case.make(ours.parameters()), 1, max_grad_norm=1e6)
    plain = case.make(theirs.parameters())
    assert "backend: triton (parameters are on cuda:0)" in repr(opt)
    data = inputs(6, torch.float32)
    train(ours, opt, data)
    train(theirs, plain, data)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_window_never_waits() -> None:
    model = small_model(BF16).cuda()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 4, max_grad_norm=1.0)
    data = inputs(12)
    train(model, opt, data)  # allocations and tables; compiles the kernels
    with no_waiting():
        train(model, opt, data)
        opt.param_groups[0]["lr"] = 0.5
        with opt.micro_batch(weight=3):
            model(data[0]).sum().backward()
        opt.step()
        opt.flush()
        logged = opt.metrics()
    assert int(opt.skipped_steps) == 0
    assert logged["updates"] == 7 and float(logged["clip_coefficient"]) <= 1.0


def test_a_linked_scaler_never_waits() -> None:
    """fp16, the wrapper counts, an overflow in one micro-batch of the last window."""
    model = small_model(torch.float16).cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 4, grad_scaler=scaler)

    def window(xs: list[torch.Tensor]) -> None:
        for x in xs:
            scaler.scale(model(x).float().square().mean()).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    data = inputs(4, torch.float16)
    bad = [data[0], data[1] * float("inf"), *data[2:]]
    window(data)
    window(bad)
    scaler.update(64.0)
    before = [p.detach().clone() for p in model.parameters()]
    with no_waiting():
        window(data)
        window(bad)
    assert int(opt.skipped_steps) == 2 and scaler.get_scale() == 32.0
    changed = [
        not equal_bits(a, p.detach()) for a, p in zip(before, model.parameters(), strict=True)
    ]
    assert any(changed)


def test_a_bad_window_does_not_wait_either() -> None:
    model = small_model(BF16).cuda()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 1, max_grad_norm=1.0)
    data = inputs(2)
    bad = data[0] * float("nan")
    train(model, opt, data)
    before = [p.detach().clone() for p in model.parameters()]
    with no_waiting():
        train(model, opt, [bad])
    assert int(opt.skipped_steps) == 1
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_split_masters_equal_fp32_masters_to_the_bit(kind: type[torch.optim.Optimizer]) -> None:
    start = [torch.randn(10_007).to("cuda", BF16), torch.randn(64, 64).to("cuda", BF16)]
    models = [Gradients(start).cuda() for _ in range(2)]
    opts = [
        FusedAccumOptimizer(kind(m.parameters(), lr=1e-3), 1, master_weights=mode)  # type: ignore[call-arg]
        for m, mode in zip(models, ("split", "fp32"), strict=True)
    ]
    for _ in range(1000):
        grads = [torch.randn_like(s) for s in start]
        for model, opt in zip(models, opts, strict=True):
            model.backward(list(grads))
            opt.step()
            opt.zero_grad()
    states = [opt.state_dict()["state"] for opt in opts]
    for i in range(2):
        assert equal_bits(states[0][i]["master_param"], states[1][i]["master_param"])


def test_the_torch_backend_agrees_on_the_gpu() -> None:
    models = [small_model(BF16).cuda() for _ in range(2)]
    data = inputs(6)
    for model, backend in zip(models, ("triton", "torch"), strict=True):
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, FusedAccumOptimizer(inner, 2, max_grad_norm=1.0, backend=backend), data)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-6, atol=1e-4)


def test_a_side_stream() -> None:
    models = [small_model().cuda() for _ in range(2)]
    data = inputs(8, torch.float32)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for model, context in zip(models, (torch.cuda.stream(stream), None), strict=True):
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
        if context is None:
            train(model, opt, data)
        else:
            with context:
                train(model, opt, data)
        torch.cuda.synchronize()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert equal_bits(p.detach(), q.detach())


def test_offsets_beyond_int32() -> None:
    """More than 2**31 elements in one tensor: addresses and offsets are 64-bit."""
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip("needs 28 GiB of GPU memory")
    grad = torch.zeros(n, dtype=BF16, device="cuda")
    grad[-1], grad[0] = 3.0, 1.0
    acc = torch.full((n,), 0.5, device="cuda")
    functional.accumulate_([acc], [grad], 2.0)
    assert acc[-1].item() == 6.5 and acc[0].item() == 2.5 and acc[2**31].item() == 0.5
    assert functional.global_norm([grad]).item() == pytest.approx(10**0.5)


def test_whole_windows_in_a_graph_with_a_changing_rate() -> None:
    """Forward, backward, accumulation, norm, clip and step of four micro-batches, replayed."""
    models = [small_model(BF16).cuda() for _ in range(2)]
    rates = [torch.tensor(1e-2, device="cuda") for _ in models]
    opts = [
        FusedAccumOptimizer(
            torch.optim.AdamW(model.parameters(), lr=rate, capturable=True), 4, max_grad_norm=1.0
        )
        for model, rate in zip(models, rates, strict=True)
    ]
    static = inputs(4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for model, opt in zip(models, opts, strict=True):
            train(model, opt, static * 3)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(models[0], opts[0], static)
    data = inputs(20)
    for window, rate in enumerate((1e-2, 5e-3, 1e-1)):
        xs = data[4 * window : 4 * window + 4]
        for place, x in zip(static, xs, strict=True):
            place.copy_(x)
        for own in rates:
            own.fill_(rate)
        graph.replay()
        train(models[1], opts[1], xs)
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            assert equal_bits(p.detach(), q.detach())
    for model, opt in zip(models, opts, strict=True):  # and eager windows after it
        train(model, opt, data[12:])
    graph.replay()
    train(models[1], opts[1], static)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert equal_bits(p.detach(), q.detach())


def test_accumulate_in_a_graph() -> None:
    """The kernels capture and replay; addresses are those of the capture."""
    accs = [torch.zeros(n, device="cuda") for n in (5, 9000)]
    grads = [torch.ones(n, dtype=BF16, device="cuda") for n in (5, 9000)]
    functional.accumulate_(accs, grads, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        functional.accumulate_(accs, grads, 0.5)
    for _ in range(3):
        graph.replay()
    assert all(a.eq(2.0).all() for a in accs)
