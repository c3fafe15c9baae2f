"""What Python costs: the time until a micro-batch, or an update, is on its way to the device.

A micro-batch is a backward that brings one gradient for each parameter, `step()` in the middle of a
window, and `zero_grad()`; `autograd` is the same backward of parameters that nobody wrapped. An
update is `step()` with the norm, clipping and AdamW. On a GPU it is the time until the calls
return. On a CPU the Triton backend runs with kernels that do nothing, so that Triton's own launcher
is not in it. Elements are divided by 64, and so is the bucket: as many tensors and launches as the
model has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer, backends
from fusedaccum.backends import triton
from fusedaccum.bench import timing
from fusedaccum.bench.shapes import Shapes

from . import cases
from .suites import BF16, FP32, Suite

ROUNDS = 200
SMALLER = 64
BUCKET_MIB = 128
KERNELS = ("accumulate_kernel", "sum_of_squares_kernel", "finalize_kernel", "step_kernel")
# By name: shapes, dtype, and by what elements and bucket are divided.
HOST: dict[str, tuple[Callable[[], Shapes], torch.dtype, int]] = {
    "lora_500": (cases.lora_500, FP32, 1),
    "llama_1b": (cases.llama_1b, BF16, SMALLER),
    "llama_8b": (cases.llama_8b, BF16, SMALLER),
    "many_2000": (cases.many_2000, BF16, 1),
    "tiny": (cases.tiny, BF16, 1),
}


class Nothing:
    """Instead of a kernel; counts its launches."""

    launched = 0

    def __getitem__(self, grid: object) -> Nothing:
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self.launched += 1


@contextmanager
def without_kernels() -> Iterator[Nothing]:
    """The Triton backend serves a CPU, and does nothing. Gives what stands for the accumulation."""
    accumulate, backend = Nothing(), triton.TritonBackend(torch.device("cpu"))
    with ExitStack() as stack:
        for name in KERNELS:
            kernel = accumulate if name.startswith("accumulate") else Nothing()
            stack.enter_context(patch.object(triton, name, kernel))
        stack.enter_context(patch.object(backends, "get", lambda name, device: backend))
        yield accumulate


class Bring(torch.autograd.Function):
    """Brings each parameter a gradient that lies where it lay before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grads: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy[0], None, *[grad.detach() for grad in ctx.grads]


class HostClock(timing.Clock):
    """Times a call until it returns; on a GPU the device is idle before."""

    warm_calls = 3

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, run: Callable[[], object], lead: float) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return super().time(run, lead)


def host(suite: Suite, shape: str) -> None:
    """Time a micro-batch beside autograd alone, then an update."""
    with without_kernels() if suite.device.type == "cpu" else nullcontext() as launches:
        _measure(suite, shape, launches)


def _measure(suite: Suite, shape: str, launches: Nothing | None) -> None:
    make, dtype, smaller = HOST[shape]
    sizes = [(math.ceil(first / smaller), *rest) for first, *rest in make()]
    x = torch.zeros((), dtype=FP32, device=suite.device, requires_grad=True)
    grads = cases.random(sizes, dtype, suite.device, seed=2)

    def params() -> list[Tensor]:
        like = cases.random(sizes, dtype, suite.device, seed=1, std=0.02)
        return [torch.nn.Parameter(tensor) for tensor in like]

    plain, ours = params(), params()

    def backward(own: Sequence[Tensor]) -> None:
        Bring.apply(x, grads, *own).backward()  # type: ignore[no-untyped-call]

    def wrapper(n: int | None) -> FusedAccumOptimizer:
        # More micro-batches than are ever made: all but the first are in the middle of a window.
        return FusedAccumOptimizer(
            torch.optim.AdamW(ours, lr=1e-6), n, max_grad_norm=1.0,
            bucket_cap_mb=BUCKET_MIB / smaller, backend=suite.plan.backend,
        )  # fmt: skip

    def autograd() -> None:
        backward(plain)
        for param in plain:
            param.grad = None

    opt = wrapper(1 << 30)

    def micro_batch() -> None:
        backward(ours)
        opt.step()
        opt.zero_grad()

    common = {"n_elements": cases.count(sizes), "n_tensors": len(sizes)}
    for _ in range(3):
        micro_batch()
    before = launches.launched if launches else 0
    micro_batch()
    n = launches.launched - before if launches else None
    calls = {"autograd": autograd, "fused_hooks": micro_batch}
    _time(suite, "host_micro_batch", shape, dtype, calls, launches=n, **common)

    opt.zero_grad()
    opt.flush()
    opt.detach()
    opt = wrapper(None)  # steps on what one backward brought, again and again
    backward(ours)
    _time(suite, "host_update", shape, dtype, {"fused_hooks": opt.step}, launches=None, **common)
    opt.zero_grad()
    opt.detach()


def _time(
    suite: Suite,
    operation: str,
    shape: str,
    dtype: torch.dtype,
    calls: Mapping[str, Callable[[], object]],
    **columns: Any,
) -> None:
    """Time calls in turns, and keep their rows. No copies in between: they would empty the caches
    of what Python needs, and be no yardstick."""
    samples = timing.interleave(
        calls, HostClock(suite.device), rounds=ROUNDS, budget_s=suite.budget_s, refuse=suite.refuse
    )
    suite.groups += 1
    for name, timed in samples.items():
        row: dict[str, Any] = dict.fromkeys(("bytes", "precision", "ratio", "copy_share"))
        row |= {"group": suite.groups, "operation": operation, "variant": name, "shape": shape}
        row |= {"dtype": str(dtype).removeprefix("torch."), "n": suite.plan.n, "tokens": None}
        row |= timed.columns(5, on_gpu=False) | columns | {"grad_error": None}
        row["us_per_tensor"] = round(1e3 * row["p50_ms"] / row["n_tensors"], 3)
        suite.rows.append(row | {"load": round(os.getloadavg()[0], 2)})
    suite.save()
