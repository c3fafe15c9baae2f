"""Single operations under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For quick comparisons while a kernel is changed (`--benchmark-compare`, `-k "step and lora"`). The
forms are those of the rows; variants are timed one after the other, so take published numbers from
`python -m benchmarks.run`, which times them in turns. A form runs only if it passed the gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum.bench import gate as gates
from fusedaccum.bench.forms import OPTIMIZERS, Form, Plan
from fusedaccum.bench.ours import Operations
from fusedaccum.doctor import machine

from . import cases
from .forms import FORMS, Missing, held

pytest.importorskip("pytest_benchmark")

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What a CPU works through in seconds; larger shapes are for GPUs.
SHAPES = [
    name
    for name, shapes in cases.SHAPES.items()
    if DEVICE.type == "cuda" or cases.count(shapes()) <= 130e6
]
EAGER = [name for name in FORMS if name != "compiled"]
Grads = list[Tensor]
OPERATIONS: dict[str, Callable[[Any, Grads], object]] = {
    "accumulate_first": lambda form, grads: form.add(grads, 0),
    "accumulate": lambda form, grads: form.add(grads, 1),
    "accumulate_last_norm": lambda form, grads: form.add_last(grads),
    "finalize": lambda form, grads: form.finalize(1.0),  # ours alone
    "step": lambda form, grads: form.step(),
}
Run = Callable[[Callable[[], object]], None]


@pytest.fixture
def timed(benchmark: Any) -> Run:
    """Time a call, until the device has finished."""

    def run(call: Callable[[], object]) -> None:
        if DEVICE.type == "cuda":

            def waited() -> None:
                call()
                torch.cuda.synchronize()

            benchmark(waited)
        else:
            benchmark(call)

    return run


@functools.cache
def gate(name: str, plan: Plan) -> gates.Gate:
    """Once per form; raises where it disagrees with float64."""
    return gates.gate(FORMS[name], plan, torch.empty(0, dtype=BF16, device=DEVICE), cases.tiny())


def make(name: str, shape: str, plan: Plan, *, std: float = 1.0) -> Form:
    """A form that passed, on parameters of these shapes; skips one that cannot be here."""
    if name == "blocked_add" and DEVICE.type != "cpu":
        pytest.skip("blocked_add is for CPUs")
    need = (held(FORMS[name]) + 6) * cases.count(cases.SHAPES[shape]())
    if need > 0.9 * machine.memory_bytes(DEVICE):
        pytest.skip(f"needs {need / 2**30:.0f} GiB")
    try:
        gate(name, plan)
    except Missing as missing:
        pytest.skip(str(missing))
    params = cases.random(cases.SHAPES[shape](), BF16, DEVICE, seed=1, std=std)
    form: Form = FORMS[name](params, plan)  # type: ignore[call-arg]
    return form


@pytest.mark.parametrize("name", [name for name in EAGER if FORMS[name].has_operations])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_operation(timed: Run, shape: str, operation: str, name: str) -> None:
    """A step is AdamW without clipping, each form's own."""
    if operation == "finalize" and FORMS[name] is not Operations:
        pytest.skip("finalize is an operation of fusedaccum")
    form, grads = make(name, shape, Plan()), cases.gradients(shape, BF16, DEVICE)
    form.add(grads, 0)
    if operation == "finalize":
        form.add_last(grads)
    timed(lambda: OPERATIONS[operation](form, grads))
    assert gates.is_finite(form)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_optimizer(timed: Run, shape: str, optimizer: str) -> None:
    """`finalize` and the step of every optimizer, fusedaccum's."""
    form = make("fused_backend", shape, Plan(optimizer))
    grads = cases.gradients(shape, BF16, DEVICE)
    form.micro_batch(grads, 0)
    form.micro_batch(grads, form.plan.n - 1)
    before = form.values()[-1].clone()
    timed(form.update)
    assert gates.is_finite(form) and not torch.equal(before, form.values()[-1])


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["free", "clipped"])
@pytest.mark.parametrize("n", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_window(timed: Run, shape: str, n: int, max_norm: float | None, name: str) -> None:
    form = make(name, shape, Plan(n=n, max_norm=max_norm), std=0.02)
    grads = cases.gradients(shape, BF16, DEVICE)
    if form.loss_is_divided:
        for grad in grads:
            grad /= n
    timed(lambda: form.window(grads))
    assert gates.is_finite(form)
