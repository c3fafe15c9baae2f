"""What test_ddp.py runs in the processes of a group: one training each, beside float64.

Every process knows the data of all, and adds up the micro-gradients of all in float64, as autograd
makes them in the model's dtype.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fusedaccum import FusedAccumOptimizer
from fusedaccum.distributed import buckets, reduction
from tests.same_runs import whole as whole

Report = dict[str, Any]
SMALL = 2048  # bytes of a bucket, so that there are several
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "view": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused-view": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "static-view": {"static_graph": True, "gradient_as_bucket_view": True},
}


class Net(nn.Module):
    """Layers, one of them used twice where it is tied, one not always used, some checkpointed."""

    def __init__(self, *, tied: bool = False, extra: bool = False, again: str = "") -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 24)
        self.extra = nn.Linear(24, 24) if extra else None
        self.c = nn.Linear(24, 16)
        self.tied, self.again, self.uses_extra = tied, again, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(self.a(x)))
        for _ in range(2 if self.tied else 1):
            if self.again:
                y = checkpoint(self.b, y, use_reentrant=self.again == "reentrant").relu()
            else:
                y = torch.relu(self.b(y))
        if self.uses_extra:
            assert self.extra is not None
            y = self.extra(y)
        return self.c(y)  # type: ignore[no-any-return]


def batch(rank: int, window: int, i: int, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * window + 10 * i + rank)
    return torch.randn(rows, 16, generator=generator)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).float().square().mean()  # type: ignore[no-any-return]


Micro = tuple[float, Callable[[nn.Module], Tensor]]  # a weight and a loss


def mean_gradient(model: nn.Module, micros: Sequence[Micro]) -> list[Tensor]:
    """Of all micro-batches of all processes, in float64."""
    return mean_gradient_of(copy.deepcopy(model), micros)


def mean_gradient_of(twin: nn.Module, micros: Sequence[Micro]) -> list[Tensor]:
    """The same, of a model whose `p.grad` may change."""
    total = sum(weight for weight, _ in micros)
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in twin.parameters()]
    for weight, loss in micros:
        twin.zero_grad()
        loss(twin).backward()
        for acc, p in zip(sums, twin.parameters(), strict=True):
            if p.grad is not None:
                acc += whole(p.grad).double() * (weight / total)
    return sums


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def off(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The relative error of all elements together."""
    return float((flat(ours) - flat(exact)).norm() / flat(exact).norm())


def is_same_everywhere(tensors: Sequence[Tensor]) -> bool:
    mine = flat(tensors).nan_to_num(7.0)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


def masters(opt: FusedAccumOptimizer) -> list[Tensor]:
    """The weights as precisely as they are kept."""
    state = opt.state_dict()
    precise = {i: entry.get("master_param") for i, entry in state["state"].items()}
    params = [p for group in opt.param_groups for p in group["params"]]
    return [p if precise.get(i) is None else precise[i] for i, p in enumerate(params)]


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Small buckets; what was started, and when a backward had brought everything."""
    log: list[str] = []
    start, end = buckets.Bucket.start, reduction.Reduction.end

    def logged_start(self: buckets.Bucket) -> None:
        log.append("start")
        start(self)

    def logged_end(self: reduction.Reduction) -> None:
        log.append("end")
        end(self)

    with (
        mock.patch.object(buckets, "BUCKET_BYTES", SMALL),
        mock.patch.object(buckets.Bucket, "start", logged_start),
        mock.patch.object(reduction.Reduction, "end", logged_end),
    ):
        yield log


def train(case: str) -> Report:
    """ "key=value,...": three windows of one configuration.

    engine: before, after (DDP before or after the optimizer), group (no DDP); option: DDP's;
    n: micro-batches; owner: n or loop; sync: every, last; net: "", tied, extra, reentrant, again;
    dtype; clip; twice: backwards per micro-batch; compile: of what; fuse: Linear layers.
    """
    given = dict(part.split("=") for part in case.split(","))
    n, owner = int(given.get("n", 4)), given.get("owner", "n")
    dtype, kind = DTYPES[given.get("dtype", "bf16")], given.get("net", "")
    clip = float(given["clip"]) if "clip" in given else None
    engine, rank, world = given["engine"], dist.get_rank(), dist.get_world_size()
    halves = int(given.get("twice", 1))
    torch.manual_seed(rank if engine == "group" else 0)
    model = Net(
        tied=kind == "tied" or kind == "reentrant",
        extra=kind.startswith("extra"),
        again={"reentrant": "reentrant", "again": "other"}.get(kind, ""),
    ).to(dtype)
    net: Any = model
    options = OPTIONS[given.get("option", "plain")]
    if engine == "before":
        net = DistributedDataParallel(model, **options)
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        n if owner == "n" else None,
        clip,
        process_group=dist.group.WORLD if engine == "group" else None,
    )
    if engine == "after":
        net = DistributedDataParallel(model, **options)
    if "fuse" in given:
        report_of = opt.fuse_linear_wgrad(net, min_numel=0)
        assert report_of.skipped == {} and len(report_of.fused) == (4 if model.extra else 3)
    params = list(model.parameters())
    called = torch.compile(net, backend="aot_eager") if "compile" in given else net

    def loss(at: nn.Module, r: int, window: int, i: int, half: int) -> Tensor:
        inner: Any = at.module if isinstance(at, DistributedDataParallel) else at
        # "extra": of one process, in one micro-batch; "extra-never": of nobody.
        inner.uses_extra = kind == "extra" and r == 1 and i == n - 1 and window != 1
        return loss_of(at, batch(r, window, i + 50 * half).to(dtype))

    report: Report = {"gradient": [], "norm": [], "same": True, "overlap": []}
    with watched() as log:
        for window in range(3):
            micros: list[Micro] = [
                (1.0, lambda at, r=r, i=i, h=h, w=window: loss(at, r, w, i, h) / 1)  # type: ignore[misc]
                for r in range(world)
                for i in range(n)
                for h in range(halves)
            ]
            exact = mean_gradient(model, micros)
            exact = [g * halves for g in exact]  # the halves of a micro-batch are added
            log.clear()
            for i in range(n):
                is_last = i == n - 1
                waits = engine in ("before", "after") and given.get("sync") != "every"
                with contextlib.nullcontext() if is_last or not waits else net.no_sync():
                    for half in range(halves):
                        value = loss(called, rank, window, i, half)
                        (value / n if owner == "loop" else value).backward()
                if is_last:
                    shown = gradients(params)
                    report["gradient"].append(off(shown, exact))
                    report["same"] &= is_same_everywhere(shown)
                    first_end = len(log) - log[::-1].index("end") - 1
                    if not kind.startswith("extra"):  # else they differ
                        early = log[:first_end].count("start")
                        report["overlap"].append((early, log.count("start")))
                if owner == "n":
                    opt.step()
                    opt.zero_grad()
            if owner == "loop":
                opt.step()
                opt.zero_grad()
            assert opt.grad_norm is not None
            norm = float(flat(exact).norm())
            report["norm"].append(abs(float(opt.grad_norm) - norm) / norm)
            report["same"] &= is_same_everywhere(masters(opt))
            report["same"] &= is_same_everywhere(params)
    return report
