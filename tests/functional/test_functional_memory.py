"""What the operations on lists do with the memory that they are given: layouts, tensors that share
it, and threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import functional as F
from fusedaccum.backends.tensors import is_dense, same_order
from fusedaccum.functional.run import backend_for
from tests.cases import WithoutCompiler, forget_compiled

SHAPE = (3, 4, 5)
ORDERS = list(itertools.permutations(range(3)))


def ordered(order: tuple[int, ...], values: Tensor) -> Tensor:
    """`values` in a dense tensor whose dimensions lie in memory in another order."""
    back = [order.index(i) for i in range(3)]
    return torch.empty([SHAPE[i] for i in order]).permute(back).copy_(values)


@pytest.fixture(params=["compiled", "blocks", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "blocks":
        WithoutCompiler(monkeypatch)
    yield "triton" if request.param == "triton" else "torch"
    monkeypatch.undo()
    forget_compiled()


def step(tensors: dict[str, Tensor], backend: str | None = None) -> None:
    params, grads, avgs, squares = ([tensors[name]] for name in ("param", "grad", "avg", "square"))
    F.adamw_(params, grads, avgs, squares, torch.zeros(1), lr=0.1, backend=backend)


NAMES = ("param", "grad", "avg", "square")
REFUSED = {"avg": "exp_avgs", "square": "exp_avg_sqs"}


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_of_layouts(name: str, path: str) -> None:
    """One tensor of a call in one order and the others in another: right, or refused by name."""
    values = {n: torch.rand(SHAPE) for n in NAMES}
    expected = {n: values[n].clone() for n in NAMES}
    step(expected)
    for order, other in itertools.product(ORDERS, ORDERS):
        tensors = {n: ordered(other if n == name else order, values[n]) for n in NAMES}
        if order != other and name != "grad":
            refused = REFUSED.get(name, "exp_avgs")
            with pytest.raises(ValueError, match=rf"{refused}\[0\] has strides"):
                step(tensors, path)
            assert all(torch.equal(tensors[n], values[n]) for n in NAMES)
            continue
        step(tensors, path)
        for n in NAMES:
            assert torch.equal(tensors[n], expected[n]), (n, order, other)


@pytest.mark.parametrize("name", ["masters", "max_exp_avg_sqs"])
def test_other_lists_in_another_layout(name: str) -> None:
    first, second = ORDERS[1], ORDERS[2]
    values = torch.rand(SHAPE)
    params = [ordered(first, values).bfloat16()]
    lists = [[ordered(first, values)] for _ in range(3)]
    more = {name: [ordered(second, values)]}
    assert params[0].stride() == lists[0][0].stride()
    with pytest.raises(ValueError, match=rf"{name}\[0.*has strides"):
        F.adamw_(params, *lists, torch.zeros(1), lr=0.1, **more)


def test_gradients_in_another_layout_are_laid_out() -> None:
    """A transposed, an expanded and a strided one."""
    for make in (
        lambda: torch.randn(4, 3).t(),
        lambda: torch.randn(1, 4).expand(3, 4),
        lambda: torch.randn(3, 8)[:, ::2],
    ):
        grad, param = make(), torch.randn(3, 4)
        expected = param - 0.5 * grad
        F.sgd_([param], [grad], None, torch.zeros(1), lr=0.5)
        assert torch.equal(param, expected)


def test_the_order_in_memory() -> None:
    a = torch.empty(2, 1, 3)
    assert same_order(a, a.as_strided(a.shape, (3, 77, 1)))
    assert same_order(torch.empty(2, 0).t(), torch.empty(0, 2))
    assert not same_order(a, a.as_strided(a.shape, (1, 1, 2)))
    assert not same_order(torch.empty(2, 2), torch.empty(2, 2).t())
    assert not same_order(torch.empty(4), torch.empty(2, 2))
    for one, other in itertools.product(ORDERS, ORDERS):
        pair = [ordered(order, torch.zeros(SHAPE)) for order in (one, other)]
        assert all(map(is_dense, pair)) and same_order(*pair) is (one == other)


A, B, C, D = (torch.arange(6.0) for _ in range(4))
STEPS, PAIR = torch.zeros(1), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "one", "other"),
    [
        (lambda: F.accumulate_([A, A], [B, C]), "accumulators[0]", "accumulators[1]"),
        (
            lambda: F.accumulate_([A[:4], A[3:]], [B[:4], C[3:]]),
            "accumulators[0]",
            "accumulators[1]",
        ),
        (lambda: F.accumulate_([A], [A]), "accumulators[0]", "grads[0]"),
        (lambda: F.accumulate_([B, A], [C, B]), "accumulators[0]", "grads[1]"),
        (
            lambda: F.accumulate_([A[:3], B], [C[:3], A.view(torch.bfloat16)[:6]]),
            "accumulators[0]",
            "grads[1]",
        ),
        (lambda: F.sgd_([A, A], [B, C], None, PAIR, lr=1), "params[0]", "params[1]"),
        (lambda: F.sgd_([A], [A], None, STEPS, lr=1), "params[0]", "grads[0]"),
        (
            lambda: F.sgd_([A], [B], [B], STEPS, lr=1, momentum=0.9),
            "momentum_buffers[0]",
            "grads[0]",
        ),
        (lambda: F.adamw_([A], [B], [C], [C], STEPS, lr=1), "exp_avgs[0]", "exp_avg_sqs[0]"),
        (
            lambda: F.adamw_([A, B], [C, C], [D[:6], D.clone()], [A.clone(), D], PAIR, lr=1),
            "exp_avgs[0]",
            "exp_avg_sqs[1]",
        ),
        (lambda: F.sgd_([A[:1]], [B[:1]], None, A[:1], lr=1), "params[0]", "steps[0]"),
        (
            lambda: F.sgd_([A.bfloat16()], [B], None, STEPS, lr=1, masters=[B]),
            "masters[0]",
            "grads[0]",
        ),
        (
            lambda: F.nadam_([A[:1]], [B[:1]], [C[:1]], [D[:1]], STEPS, STEPS, lr=1),
            "steps[0]",
            "mu_products[0]",
        ),
    ],
)
def test_tensors_that_share_memory_are_refused(
    call: Callable[[], None], one: str, other: str
) -> None:
    """Twice the same, and overlapping ones: the update would be applied twice."""
    before = [t.clone() for t in (A, B, C, D, STEPS, PAIR)]
    with pytest.raises(ValueError) as raised:
        call()
    assert f"{one} and {other} share memory; {one} is written" in str(raised.value)
    assert all(map(torch.equal, before, (A, B, C, D, STEPS, PAIR)))


def test_what_is_only_read_may_be_shared() -> None:
    """Neighbours in one allocation, one gradient for two parameters, and empty tensors."""
    flat, grad = torch.zeros(12), torch.ones(4)
    params = [flat[:4], flat[4:8], flat[8:8], flat[8:]]
    F.sgd_(params, [grad, grad, flat[8:8], grad], None, torch.zeros(4), lr=1.0)
    assert flat.tolist() == [-1.0] * 12
    F.accumulate_(params, [grad, grad, grad[:0], grad], first=True)
    assert flat.tolist() == [1.0] * 12
    assert F.global_norm([grad] * 4).item() == 4.0


def test_each_thread_has_backends_of_its_own() -> None:
    device = torch.device("cpu")
    here = backend_for(None, device)
    assert backend_for(None, device) is here and backend_for("triton", device) is not here
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(backend_for, None, device).result()
        assert pool.submit(backend_for, None, device).result() is there is not here


@pytest.mark.parametrize("compiled", [True, False])
def test_threads_that_work_on_the_same_shapes(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread's results are those of one thread alone, bit for bit.

    With tables that threads share, 3 % of the results were those of another thread's tensors.
    """
    if not compiled:
        WithoutCompiler(monkeypatch)
    sizes, n_threads = (70_000, 9), 4
    start = threading.Barrier(n_threads)

    def work(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def rand() -> list[Tensor]:
            return [torch.rand(n, generator=generator) for n in sizes]

        params, accs, avgs, squares = rand(), rand(), rand(), rand()
        steps, norms, rounds = torch.zeros(len(sizes)), [], [rand() for _ in range(40)]
        start.wait()
        for grads in rounds:
            F.accumulate_(accs, grads, 0.25)
            norms.append(F.global_norm(grads))
            F.adamw_(params, accs, avgs, squares, steps, lr=0.01)
        return [*params, *accs, *avgs, *squares, steps, torch.stack(norms)]

    with ThreadPoolExecutor(n_threads) as pool:
        together = list(pool.map(work, range(n_threads)))
    start = threading.Barrier(1)
    for seed, results in enumerate(together):
        alone = work(seed)
        assert all(map(torch.equal, results, alone)), seed
    monkeypatch.undo()
    forget_compiled()
