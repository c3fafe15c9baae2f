"""Windows of two processes: what is sent, what starts before the backward ends, and the time.

The wrapper on DistributedDataParallel averages fp32 accumulators once per window; beside it stock
DDP, under `no_sync()` but for the last micro-batch, on parameters of the same dtype: bf16, whose
sums and averages are rounded to 8 bits (`plain_bf16`), and fp32 (`native_fp32`). Gradients are
given, layer by layer, so that a window is reductions and updates and nothing else. NCCL on two
GPUs, gloo on a CPU. Launches of the last backward are counted by their order, not by time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fusedaccum import FusedAccumOptimizer
from fusedaccum.bench.gate import Gate
from fusedaccum.bench.race import Race, Variant
from fusedaccum.doctor.checks import Wrong
from fusedaccum.doctor.plan import Plan

from . import cases
from .end_to_end import WaitingClock
from .suites import BF16, FP32, Suite

WORLD = 2
# fp32 sums of N micro-batches of two processes; stock DDP on bf16 stands with its error.
MAX_ERROR = 1e-6


class Given(torch.autograd.Function):
    """A layer that has nothing but a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, param: Tensor, grad: Tensor, log: list[int]) -> Tensor:
        ctx.grad, ctx.log = grad, log
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.log.append(0)  # a gradient, among the bytes of reductions
        return dy[0], ctx.grad, None, None


class Layers(nn.Module):
    """Parameters that get these gradients, the last one first."""

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        super().__init__()
        self.params = nn.ParameterList(p.clone() for p in params)
        self.grads, self.log = grads, list[int]()

    def forward(self) -> Tensor:
        x = torch.zeros((), device=self.grads[0].device, requires_grad=True)
        for param, grad in zip(self.params, self.grads, strict=True):
            x = Given.apply(x, param, grad, self.log)  # type: ignore[no-untyped-call]
        return x


class Launches(TorchDispatchMode):
    """Logs the bytes of each all-reduce, of DDP's reducer too."""

    def __init__(self, log: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.allreduce_.default:
            self._log.append(sum(t.nbytes for t in args[0]))
        return func(*args, **(kwargs or {}))


class Window:
    """A window of micro-batches, by the wrapper or by stock DDP."""

    def __init__(self, layers: Layers, plan: Plan, is_ours: bool) -> None:
        self.layers, self.plan, self.is_ours = layers, plan, is_ours
        self.net = DistributedDataParallel(layers)
        params = layers.parameters()
        self.opt: Optimizer = torch.optim.AdamW(params, lr=1e-4, fused=not is_ours)
        if is_ours:
            self.opt = FusedAccumOptimizer(
                self.opt, plan.n, max_grad_norm=plan.max_norm, backend=plan.backend
            )

    def __call__(self, look: Callable[[Callable[[], Tensor]], Any] | None = None) -> None:
        for i in range(self.plan.n):
            is_last = i == self.plan.n - 1
            with nullcontext() if self.is_ours or is_last else self.net.no_sync():
                if look is not None and is_last:
                    look(self.net)
                else:
                    self.net().backward()
            if is_last and not self.is_ours:
                nn.utils.clip_grad_norm_(self.layers.parameters(), self.plan.max_norm or 0)
            if is_last or self.is_ours:
                self.opt.step()
                self.opt.zero_grad()

    def seen(self, exact: Sequence[Tensor]) -> dict[str, Any]:
        """What the last backward sends, when it starts to, and the error of the mean gradient."""
        log, columns = self.layers.log, dict[str, Any]()

        def look(net: Callable[[], Tensor]) -> None:
            log.clear()
            with Launches(log):
                net().backward()
            pairs = zip(self.layers.parameters(), exact, strict=True)
            off = sum(float((p.grad - e).square().sum()) for p, e in pairs if p.grad is not None)
            columns["grad_error"] = (off / sum(float(e.square().sum()) for e in exact)) ** 0.5

        self(look)
        last_gradient = len(log) - 1 - log[::-1].index(0)
        # Of an all-reduce each process sends this part of its bytes twice.
        columns["bytes"] = round(sum(log) * 2 * (WORLD - 1) / WORLD)
        columns["launched"] = sum(n > 0 for n in log)
        columns["early"] = sum(n > 0 for n in log[:last_gradient])
        return columns


class Together(WaitingClock):
    """Times a call that both processes begin together."""

    def time(self, run: Callable[[], object], lead: float) -> tuple[float, float]:
        dist.barrier()
        return super().time(run, lead)


def _work(rank: int, folder: str, kind: str, shape: str, plan: Plan, *rest: int) -> None:
    """What each process does; the first one writes what it measured."""
    rounds, threads = rest
    torch.set_num_threads(threads)
    device, comm = torch.device("cpu"), "gloo"
    if kind == "cuda":
        device, comm = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(comm, f"file://{folder}/group", rank=rank, world_size=WORLD)
    # Both processes take the same number of rounds, in the same order.
    race = Race(device, plan, {}, rounds=rounds, budget_s=float("inf"))
    race.clock = Together(device)
    common = {"launched": None, "early": None, "comm": comm, "world": WORLD, "n_threads": threads}
    for dtype in (BF16, FP32):
        seen = _race(race, rank, shape, dtype)
        for row in (row for row in race.rows if row["group"] == race.groups):
            row |= common | seen.get(row["variant"], {})
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(race.rows), "utf-8")
    dist.destroy_process_group()


def _race(race: Race, rank: int, shape: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Time windows of one dtype; what the last backward of each variant sends."""
    device, plan = race.device, race.plan
    params = cases.random(cases.SHAPES[shape](), dtype, device, seed=1, std=0.02)
    own, other = (cases.gradients(shape, dtype, device, seed=2 + abs(rank - r)) for r in (0, 1))
    exact = [(a.double() + b.double()) / WORLD for a, b in zip(own, other, strict=True)]
    stock = "plain_bf16" if dtype is BF16 else "native_fp32"
    windows = {
        "fused_hooks": Window(Layers(params, own), plan, True),
        stock: Window(Layers(params, [grad / plan.n for grad in own]), plan, False),
    }
    seen, variants = {}, {}
    for name, window in windows.items():
        window()  # in which the wrapper learns how often each gradient comes
        seen[name] = window.seen(exact)
        variants[name] = Variant(window, None, Gate(seen[name]["grad_error"], 0.0))
    n_elements = sum(p.numel() for p in params)
    race.time("reduced_window", shape, dtype, variants, n_elements=n_elements)
    return seen


def reduction(suite: Suite, shape: str) -> None:
    """Time windows of bf16 and of fp32 in two processes, and keep their rows."""
    kind = suite.device.type
    if kind == "cuda" and torch.cuda.device_count() < WORLD:
        suite.skipped["reduction"] = "two GPUs are needed"
        return
    threads = max(1, torch.get_num_threads() // WORLD)
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_work, (folder, kind, shape, suite.plan, suite.rounds, threads), WORLD)
        except Exception as error:
            suite.refuse(f"reduction of {shape}", error)
            return
        rows = json.loads(Path(folder, "rows").read_text("utf-8"))
    for row in rows:
        is_exact = row["variant"] in ("fused_hooks", "native_fp32")
        if is_exact and not row["grad_error"] <= MAX_ERROR:
            suite.refuse(row["variant"], Wrong(f"mean gradient off by {row['grad_error']:.1e}"))
        else:
            suite.rows.append(row | {"group": row["group"] + suite.groups})
    suite.groups += rows[-1]["group"]
    suite.save()
