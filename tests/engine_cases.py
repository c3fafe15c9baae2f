"""What test_engines.py runs in the processes of a group: engines around the wrapper, each once.

The gradients are small integers that do not depend on the weights, so that every sum and mean here
is exact, and results are compared bit for bit.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer, functional
from tests.processes import message

N = 4
Report = dict[str, Any]


class Net(nn.Module):
    """Two layers side by side: the loss is linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)
        with torch.no_grad():
            for i, param in enumerate(self.parameters()):
                param.copy_((torch.arange(param.numel()) % (5 + i) - 2).view_as(param) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + 3 * self.b(x)).sum()  # type: ignore[no-any-return]


def batch(rank: int, window: int, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * window + 10 * i + rank)
    return torch.randint(-4, 5, (2, 8), generator=generator).float()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def values(model: nn.Module) -> list[Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


def expected(windows: Iterable[int], clip: float | None = None) -> list[Tensor]:
    """The weights after windows over all ranks, by plain torch in float64."""
    model = Net().double()
    opt = sgd(model)
    world = dist.get_world_size()
    for window in windows:
        for rank in range(world):
            for i in range(N):
                (model(batch(rank, window, i).double()) / (world * N)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return values(model)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a.double(), b.double()) for a, b in zip(left, right, strict=True))


def accumulate(net: nn.Module, window: int, opt: Any, counts: bool) -> None:
    """The backwards of a window; where the wrapper counts, all steps but the last."""
    for i in range(N):
        loss = net(batch(dist.get_rank(), window, i))
        (loss if counts else loss / N).backward()
        if counts and i < N - 1:
            opt.step()
            opt.zero_grad()


def average(model: nn.Module) -> None:
    """The way round that the messages name."""
    for p in model.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def window_by_hand(model: nn.Module, opt: Any, window: int) -> None:
    accumulate(model, window, opt, counts=False)
    average(model)
    opt.step()
    opt.zero_grad()


def train(net: nn.Module, opt: Any, counts: bool, windows: int = 2) -> None:
    for window in range(windows):
        accumulate(net, window, opt, counts)
        opt.step()
        opt.zero_grad()


DDP_OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "view": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}


def ddp(case: str) -> Report:
    """ "before-plain-none": wrapped before or after the optimizer, DDP's option, who counts."""
    order, option, owner = case.split("-")
    steps = N if owner == "n" else None
    model = Net()
    if order == "before":
        net: Any = DistributedDataParallel(model, **DDP_OPTIONS[option])
        opt = FusedAccumOptimizer(sgd(model), steps)
    else:
        opt = FusedAccumOptimizer(sgd(model), steps)
        net = DistributedDataParallel(model, **DDP_OPTIONS[option])
    train(net, opt, steps is not None)
    report: Report = {"right": same(values(model), expected(range(2)))}
    # Without DDP again, averaged by hand.
    opt.detach()
    del net
    gc.collect()
    opt = FusedAccumOptimizer(sgd(model))
    window_by_hand(model, opt, 2)
    report["right by hand"] = same(values(model), expected(range(3)))
    return report


def ddp_later(case: str) -> Report:
    """DDP after a window without it: seen as it writes, and served in the next window."""
    option, owner = case.split("-")
    counts = owner == "n"
    model = Net()
    opt = FusedAccumOptimizer(sgd(model), N if counts else None)
    accumulate(model, 0, opt, counts)
    average(model)
    opt.step()
    opt.zero_grad()
    start = values(model)
    net: Any = DistributedDataParallel(model, **DDP_OPTIONS[option])
    report: Report = {"backward": message(lambda: train(net, opt, counts))}
    report["step"] = message(opt.step)
    report["unchanged"] = same(start, values(model))
    opt.zero_grad()
    accumulate(net, 1, opt, counts)
    opt.step()
    report["right"] = same(values(model), expected(range(2)))
    return report


def ddp_part() -> Report:
    """DDP around a part of the model, whose other parameters arrive first."""
    model = Net()
    opt = FusedAccumOptimizer(sgd(model))
    train(model, opt, False, windows=1)
    inner = DistributedDataParallel(model.a)

    def backward() -> None:
        x = batch(dist.get_rank(), 0, 0)
        (inner(x) + 3 * model.b(x)).sum().backward()

    report: Report = {"backward": message(backward)}
    opt.zero_grad()
    backward()
    assert model.a.weight.grad is not None and model.b.weight.grad is not None
    mine, sums = [model.a.weight.grad.clone(), model.b.weight.grad.clone()], []
    for grad in mine:
        sums.append(grad.clone())
        dist.all_reduce(sums[-1])
    report["averaged"] = torch.equal(2 * mine[0], sums[0])
    report["averaged too"] = torch.equal(2 * mine[1], sums[1])
    return report


def ddp_of_others() -> Report:
    """Another model in DDP is no matter of ours."""
    other = DistributedDataParallel(Net())
    other(batch(0, 0, 0)).backward()
    model = Net()
    opt = FusedAccumOptimizer(sgd(model))
    window_by_hand(model, opt, 0)
    window_by_hand(model, opt, 1)
    return {"right": same(values(model), expected(range(2))), "other": len(list(other.buffers()))}


def norm_by_hand() -> Report:
    """Clipping uses the norm of the reduced gradient, also if only all_reduce wrote it."""
    model = Net()
    opt = FusedAccumOptimizer(sgd(model), max_grad_norm=1.0)
    for i in range(N):
        (model(batch(dist.get_rank(), 0, i)) / N / dist.get_world_size()).backward()
    versions = []
    for p in model.parameters():
        assert p.grad is not None
        versions.append(p.grad._version)
        dist.all_reduce(p.grad)
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    opt.step()
    assert opt.grad_norm is not None
    difference = max(
        float((a.double() - b).abs().max())
        for a, b in zip(values(model), expected([0], clip=1.0), strict=True)
    )
    return {
        "norm": float(opt.grad_norm), "exact": float(exact.double().norm()), "off": difference
    }  # fmt: skip


def fsdp2_before(owner: str) -> Report:
    model: nn.Module = Net()
    opt = FusedAccumOptimizer(sgd(model), 1 if owner == "n" else None)
    fully_shard(model)
    start = values(model)
    model(batch(0, 0, 0)).backward()
    report: Report = {"step": message(opt.step), "unchanged": same(start, values(model))}
    opt.zero_grad()
    report["again"] = message(opt.step)
    return report


def fsdp2_late() -> Report:
    """Sharded after a window that came out right."""
    model = Net()
    opt = FusedAccumOptimizer(sgd(model))
    window_by_hand(model, opt, 0)
    right = same(values(model), expected([0]))
    fully_shard(model)
    model(batch(0, 0, 0)).backward()
    return {"right": right, "step": message(opt.step)}


def tensor_parallel() -> Report:
    model: nn.Module = Net()
    opt = FusedAccumOptimizer(sgd(model))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"a": ColwiseParallel(), "b": ColwiseParallel()})
    model(batch(0, 0, 0)).backward()
    return {"step": message(opt.step)}


def fsdp1(case: str) -> Report:
    """ "before-orig": order, and use_orig_params or flat ones."""
    order, kind = case.split("-")
    model = Net()
    options: dict[str, Any] = {
        "use_orig_params": kind == "orig", "device_id": torch.device("cpu")
    }  # fmt: skip
    if order == "before":
        opt = FusedAccumOptimizer(sgd(model))
        net = FullyShardedDataParallel(model, **options)
    else:
        net = FullyShardedDataParallel(model, **options)
        wrapped: list[FusedAccumOptimizer] = []
        error = message(lambda: wrapped.append(FusedAccumOptimizer(sgd(net))))
        if error is not None:
            return {"message": error}
        opt = wrapped[0]

    def window() -> None:
        net(batch(0, 0, 0)).backward()
        opt.step()

    return {"message": message(window)}


def functions() -> Report:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = DTensor.from_local(torch.ones(4), mesh)
    plain = torch.ones(4)
    return {
        "accumulate": message(lambda: functional.accumulate_([plain], [sharded], 1.0)),
        "norm": message(lambda: functional.global_norm([sharded])),
    }


def deepspeed(owner: str) -> Report:
    """An engine of DeepSpeed's name around our parameters, with our optimizer or another one."""

    class DeepSpeedEngine(nn.Module):
        pass

    sys.modules["deepspeed.runtime.engine"] = cast(Any, SimpleNamespace(**locals()))
    model, engine = Net(), DeepSpeedEngine()
    opt = FusedAccumOptimizer(sgd(model))
    engine.module = model
    engine.optimizer = opt if owner == "ours" else sgd(model)
    start = values(model)
    report: Report = {
        "backward": message(lambda: window_by_hand(engine.module, opt, 0)),
        "unchanged": same(start, values(model)),
    }
    del sys.modules["deepspeed.runtime.engine"]
    return report
