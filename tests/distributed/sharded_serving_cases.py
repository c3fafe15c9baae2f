"""What test_sharded_serving.py runs in the processes of a group: what is done around shards."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import (
    DTYPES,
    Net,
    Report,
    batch,
    is_same_everywhere,
    loss_of,
    masters,
    off,
    whole,
)
from tests.distributed.sharded_cases import Odd, sharded
from tests.processes import message

N = 2


def build(dtype: torch.dtype = torch.float32, seed: int = 0, net: type[nn.Module] = Odd) -> Any:
    torch.manual_seed(seed)
    model = net().to(dtype)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def x_of(rank: int, window: int, i: int, model: nn.Module) -> Tensor:
    return batch(rank, window, i).to(next(model.parameters()).dtype)


def train_micro(model: nn.Module, opt: Any, rank: int, window: int, i: int) -> None:
    loss_of(model, x_of(rank, window, i, model)).backward()
    opt.step()
    opt.zero_grad()


def train(model: nn.Module, opt: Any, windows: range, rank: int | None = None) -> None:
    for window in windows:
        for i in range(N):
            train_micro(model, opt, dist.get_rank() if rank is None else rank, window, i)


def values(model: nn.Module) -> list[Tensor]:
    return [whole(p).detach().double().clone() for p in model.parameters()]


def states(opt: Any) -> list[Tensor]:
    found = []
    for entry in opt.state_dict()["state"].values():
        found += [whole(v).double() for v in entry.values() if isinstance(v, Tensor) and v.dim()]
    return found


def precise(opt: Any) -> list[Tensor]:
    return [whole(m).double() for m in masters(opt)]


# --- the rule ---


def against_one_process(case: str) -> Report:
    """ "adamw-bf16": a run of shards beside one process that has all the data, ours too."""
    name, dtype_name = case.split("-")
    dtype = DTYPES[dtype_name]
    kinds: dict[str, Any] = {
        "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, dampening=0.1),
        "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
    }
    torch.manual_seed(0)
    twin = Net().to(dtype)
    model = build(dtype, net=Net)
    world = dist.get_world_size()
    make = kinds[name]
    opt = FusedAccumOptimizer(make(list(model.parameters())), N, max_grad_norm=0.5)
    one = FusedAccumOptimizer(make(list(twin.parameters())), N * world, max_grad_norm=0.5)
    report: Report = {"weights": [], "states": [], "norm": []}
    for window in range(4):
        train(model, opt, range(window, window + 1))
        for i in range(N):
            for rank in range(world):
                train_micro(twin, one, rank, window, i)
        report["weights"].append(off(precise(opt), precise(one)))
        report["states"].append(off(states(opt), states(one)))
        report["norm"].append(abs(float(opt.grad_norm) / float(one.grad_norm) - 1))
    return report


def ways(how: str) -> Report:
    """ "late" (forward and backward before the optimizer is wrapped), "unused" (a layer that not
    every micro-batch uses), "reentrant" and "other" checkpoints: beside one process."""
    options: dict[str, Any] = {"extra": how == "unused"}
    options["again"] = how if how in ("reentrant", "other") else ""
    torch.manual_seed(0)
    model, twin = Net(**options), Net(**options)
    twin.load_state_dict(model.state_dict())
    world = dist.get_world_size()
    sharded(model, init_device_mesh("cpu", (world,)))
    if how == "late":
        loss_of(model, x_of(0, 0, 0, model)).backward()
        model.zero_grad()
    opt = FusedAccumOptimizer(adamw(model), N, max_grad_norm=0.5)
    one = FusedAccumOptimizer(adamw(twin), N * world, max_grad_norm=0.5)
    for window in range(3):
        for i in range(N):
            model.uses_extra = twin.uses_extra = how == "unused" and (window + i) % 2 == 0
            train_micro(model, opt, dist.get_rank(), window, i)
            for rank in range(world):
                train_micro(twin, one, rank, window, i)
    return {"off": off(values(model), values(twin))}


def beside_stock(name: str) -> Report:
    """An optimizer that looks at whole matrices: its own step(), with the bits of its own run."""
    kinds: dict[str, Any] = {"muon": torch.optim.Muon}
    results = []
    for wraps in (True, False):
        model = build(net=Net)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        opt: Any = kinds[name](matrices, lr=0.01)
        if wraps:
            opt = FusedAccumOptimizer(opt)
        for window in range(3):
            loss_of(model, x_of(dist.get_rank(), window, 0, model)).backward()
            opt.step()
            opt.zero_grad()
        results.append([*values(model), *states(opt)])
    return {"off": off(*results)}


def placed() -> Report:
    """What people see are DTensors placed as the parameters are."""
    model = build(torch.bfloat16)
    opt = FusedAccumOptimizer(adamw(model), N)
    train(model, opt, range(1))
    loss_of(model, x_of(dist.get_rank(), 1, 0, model)).backward()
    seen: list[Any] = [p.grad for p in model.parameters()]
    for entry in opt.state_dict()["state"].values():
        seen += [entry["exp_avg"], entry["exp_avg_sq"], entry["master_param"]]
    placements = {t.placements for t in seen if isinstance(t, DTensor)}
    return {
        "all": all(isinstance(t, DTensor) for t in seen), "n": len(placements),
        "dtypes": {str(t.dtype) for t in seen}, "repr": repr(opt),
    }  # fmt: skip


def bytes_per_parameter(dtype: str) -> Report:
    """What a process keeps of a model whose shards are even, in bytes per parameter of the whole,
    padding aside."""
    torch.manual_seed(0)
    model = nn.Linear(256, 512, bias=False).to(DTYPES[dtype])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    opt = FusedAccumOptimizer(adamw(model), N)
    for _ in range(N):
        model(torch.randn(2, 256, dtype=DTYPES[dtype])).float().square().sum().backward()
        opt.step()
    slot = next(iter(opt._core.collector.slots.values()))
    kept = {t.untyped_storage().data_ptr(): t for t in slot.block._flats.values()}
    n_bytes = sum(t.untyped_storage().nbytes() for t in kept.values())
    n_bytes += slot.local.untyped_storage().nbytes()
    return {"bytes": n_bytes / (256 * 512)}


def two_optimizers() -> Report:
    """Muon for matrices, AdamW for the rest, as one group of FSDP2; weights on both."""
    torch.manual_seed(0)
    model, twin = build(net=Net), Net()
    torch.manual_seed(0)
    twin = Net()
    world = dist.get_world_size()

    def pair(net: nn.Module, n: int) -> list[FusedAccumOptimizer]:
        matrices = [p for p in net.parameters() if p.dim() == 2]
        others = [p for p in net.parameters() if p.dim() != 2]
        return [
            FusedAccumOptimizer(torch.optim.SGD(matrices, lr=0.05, momentum=0.9), n),
            FusedAccumOptimizer(torch.optim.AdamW(others, lr=0.01), n),
        ]

    ours, one = pair(model, N), pair(twin, N * world)

    def micro(net: nn.Module, opts: list[FusedAccumOptimizer], rank: int, w: int, i: int) -> None:
        weight = 1.0 + i + 2 * rank
        with opts[0].micro_batch(weight), opts[1].micro_batch(weight):
            loss_of(net, x_of(rank, w, i, net)).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()

    for window in range(3):
        for i in range(N):
            micro(model, ours, dist.get_rank(), window, i)
            for rank in range(world):
                micro(twin, one, rank, window, i)

    def other_weights() -> None:
        with ours[0].micro_batch(2.0), ours[1].micro_batch(3.0):
            loss_of(model, x_of(0, 0, 0, model)).backward()

    return {"off": off(values(model), values(twin)), "message": message(other_weights)}


def stochastic() -> Report:
    """Shards draw bits of their own: equal values are not rounded in the same way in all."""
    torch.manual_seed(0)
    world = dist.get_world_size()
    model = nn.Linear(64, 16 * world, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    opt = FusedAccumOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        master_weights="none",
        stochastic_rounding=True,
    )
    (model(torch.ones(1, 64, dtype=torch.bfloat16)).float().sum() * 1e-3).backward()
    opt.step()
    parts = whole(model.weight).float().chunk(world)
    return {
        "values": len(set(parts[0].flatten().tolist())),
        "same": torch.equal(parts[0], parts[1]),
        "agree": is_same_everywhere([whole(model.weight)]),
    }


def compiled() -> Report:
    model, eager = build(), build()
    results = []
    for net, kind in ((model, "compiled"), (eager, "eager")):
        opt = FusedAccumOptimizer(adamw(net), N)
        run: Any = torch.compile(net, backend="aot_eager") if kind == "compiled" else net
        train(run, opt, range(3))
        results.append(values(net))
    return {"off": off(*results)}


def fused_linears(order: str) -> Report:
    """Shards are left out, and a layer that was fused before it was sharded is so no more."""
    if order == "before":
        torch.manual_seed(0)
        model = Odd()
        opt = FusedAccumOptimizer(adamw(model), N)
        n_fused = len(opt.fuse_linear_wgrad(model, min_numel=0).fused)
        sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        for group in opt.param_groups:
            group["params"] = list(model.parameters())
        opt._core.check_params()
    else:
        model = build()
        opt = FusedAccumOptimizer(adamw(model), N)
        report = opt.fuse_linear_wgrad(model, min_numel=0)
        n_fused = len(report.fused)
    plain = build()
    train(model, opt, range(2))
    other = FusedAccumOptimizer(adamw(plain), N)
    train(plain, other, range(2))
    opt.unfuse_linear_wgrad()
    for net, each in ((model, opt), (plain, other)):
        train(net, each, range(2, 3))
    reasons = [] if order == "before" else sorted(r.split(":")[0] for r in report.skipped.values())
    return {"off": off(values(model), values(plain)), "fused": n_fused, "skipped": reasons}


def comes_back() -> Report:
    """detach() gives plain torch back, and another wrapper may be made."""
    model, plain = build(), build()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
    train(model, opt, range(1))
    inner = opt.detach()
    train_plain(plain, torch.optim.SGD(plain.parameters(), lr=0.05), range(1))
    off_wrapped = off(values(model), values(plain))
    for net, optimizer in ((model, inner), (plain, torch.optim.SGD(plain.parameters(), lr=0.05))):
        train_plain(net, optimizer, range(1, 2))
    off_plain = off(values(model), values(plain))
    again = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
    train(model, again, range(2, 3))
    train_plain(plain, torch.optim.SGD(plain.parameters(), lr=0.05), range(2, 3))
    return {"off": [off_wrapped, off_plain, off(values(model), values(plain))]}


def train_plain(model: nn.Module, opt: Any, windows: range) -> None:
    for window in windows:
        for i in range(N):
            (loss_of(model, x_of(dist.get_rank(), window, i, model)) / N).backward()
        opt.step()
        opt.zero_grad()


def exchanged(how: str) -> Report:
    """The model is sharded after the wrapping, and shards put into the param groups, as frameworks
    do: "at once", or "late", when there is a state."""
    torch.manual_seed(0)
    model, twin = Odd(), Odd()
    twin.load_state_dict(model.state_dict())
    world = dist.get_world_size()
    opt = FusedAccumOptimizer(adamw(model), N)
    if how == "late":
        train(model, opt, range(1), rank=0)
    sharded(model, init_device_mesh("cpu", (world,)))
    opt.param_groups[0]["params"] = list(model.parameters())
    one = FusedAccumOptimizer(adamw(twin), N * world)
    if how == "late":
        loss_of(model, x_of(0, 0, 0, model)).backward()
        return {"step": message(opt.step)}
    for window in range(3):
        for i in range(N):
            train_micro(model, opt, dist.get_rank(), window, i)
            for rank in range(world):
                train_micro(twin, one, rank, window, i)
    return {"off": off(values(model), values(twin))}


# --- refused ---


def lacks() -> Report:
    """A torch whose FSDP2 has other names for what is private to it."""
    report: Report = {}
    model: Any = build()
    context = model._get_fsdp_state()._state_ctx
    for owner, name in ((FSDPModule, "_get_fsdp_state"), (context, "all_states")):
        with mock.patch.object(owner, name):
            delattr(owner, name)
            report[name] = message(lambda: FusedAccumOptimizer(adamw(model), N))
    return report


def refused() -> Report:
    model = build()
    report: Report = {}

    def group() -> None:
        FusedAccumOptimizer(adamw(model), N, process_group=dist.group.WORLD)

    def with_ddp() -> None:
        other = nn.Linear(4, 4)
        net = DistributedDataParallel(other)
        params = [*model.parameters(), *net.parameters()]
        FusedAccumOptimizer(torch.optim.SGD(params, lr=0.1), N)

    for case in (group, with_ddp):
        report[case.__name__] = message(case)
    mine = N + (dist.get_rank() == 1)
    opt = FusedAccumOptimizer(adamw(model), 1, max_grad_norm=float(mine))
    before = values(model)
    loss_of(model, x_of(0, 0, 0, model)).backward()
    report["settings"] = message(opt.step)
    report["unchanged"] = all(map(torch.equal, before, values(model)))
    return report
