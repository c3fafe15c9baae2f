"""What test_serving.py runs in the processes of a group: who averages, mistakes and faults."""

from __future__ import annotations

import copy
import gc
import os
import signal
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from fusedaccum.distributed import reduction
from fusedaccum.window.shards import local_of
from tests import frozen
from tests.distributed.ddp_cases import (
    OPTIONS,
    Micro,
    Net,
    Report,
    batch,
    flat,
    gradients,
    is_same_everywhere,
    loss_of,
    masters,
    mean_gradient,
    off,
    watched,
)
from tests.distributed.window_cases import N, made, run
from tests.processes import message

# --- whose reducer runs ---


def detached() -> Report:
    """DDP averages by itself again, and no longer once it is wrapped anew."""
    model, net, opt = made("ddp", steps=1)
    run(net, opt, 0, 2)
    opt.detach()
    report: Report = {}

    def plain() -> bool:
        plain_opt = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(net, batch(dist.get_rank(), 1, 0)).backward()
        micros: list[Micro] = [
            (1.0, lambda at, r=r: loss_of(at, batch(r, 1, 0)))  # type: ignore[misc]
            for r in range(dist.get_world_size())
        ]
        right = off(gradients(list(model.parameters())), mean_gradient(model, micros)) < 1e-6
        plain_opt.zero_grad()
        return right

    report["after detach()"] = plain()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    run(net, opt, 2, 4)
    report["wrapped again"] = is_same_everywhere(masters(opt))
    del opt
    gc.collect()
    report["after it was dropped"] = plain()
    return report


def finalized_by_hand() -> Report:
    """A loop that ends DDP's reductions itself, beside one that does not; then without us."""
    found, report = [], {}
    for by_hand in (True, False):
        model, net, opt = made("ddp", steps=2)
        if by_hand:
            net.require_manual_backward_finalization = True

        def train(net: Any = net, opt: Any = opt, by_hand: bool = by_hand) -> None:
            for i in range(4):
                loss_of(net, batch(dist.get_rank(), 0, i)).backward()
                if by_hand:
                    net.finalize_backward()
                opt.step()
                opt.zero_grad()

        report["train"] = message(train) or report.get("train")
        found.append(masters(opt))
        opt.detach()
        loss_of(net, batch(dist.get_rank(), 0, 4)).backward()
        if by_hand:
            report["detached"] = message(net.finalize_backward)
            report["twice"] = message(net.finalize_backward)
        found.append(gradients(list(model.parameters())))
    return report | {"same": all(map(torch.equal, [*found[0], *found[1]], [*found[2], *found[3]]))}


def taken_over() -> Report:
    """A notebook's cell that runs again: the new wrapper averages, also when the old one goes."""
    model, net, old = made("ddp", steps=2)
    run(net, old, 0, 2)
    new = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    run(net, new, 2, 4)
    del old
    gc.collect()
    run(net, new, 4, 6)
    return {"same": is_same_everywhere(masters(new)), "skipped": int(new.skipped_steps)}


def two_wrappers(owner: str) -> Report:
    """Muon for matrices and AdamW for the rest, in one DDP module."""
    torch.manual_seed(0)
    model = Net()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    net = DistributedDataParallel(model)
    steps = N if owner == "n" else None
    opts = [
        FusedAccumOptimizer(torch.optim.Muon(matrices, lr=1e-2), steps, 1e9),
        FusedAccumOptimizer(torch.optim.AdamW(others, lr=1e-2), steps, 1e9),
    ]

    def train() -> None:
        for i in range(N):
            loss_of(net, batch(dist.get_rank(), 0, i)).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()

    micros: list[Micro] = [
        (1.0, lambda at, r=r, i=i: loss_of(at, batch(r, 0, i)))  # type: ignore[misc]
        for r in range(dist.get_world_size())
        for i in range(N)
    ]
    exact = mean_gradient(model, micros)
    report: Report = {"train": message(train)}
    if report["train"] is None:
        norms = [float(opt.grad_norm) for opt in opts]  # type: ignore[arg-type]
        report["norm"] = abs(sum(n * n for n in norms) ** 0.5 / float(flat(exact).norm()) - 1)
        report["same"] = all(is_same_everywhere(masters(opt)) for opt in opts)
    return report


def gone() -> Report:
    """Without DDP each process trains by itself again, as with stock torch."""
    model, net, opt = made("ddp", steps=2)
    run(net, opt, 0, 2)
    same = is_same_everywhere(masters(opt))
    del net
    gc.collect()
    run(model, opt, 2, 4)
    return {"same": same, "same without": is_same_everywhere(masters(opt))}


def unfrozen() -> Report:
    """What DDP did not know at its construction is averaged too."""
    torch.manual_seed(0)
    model = Net()
    model.b.requires_grad_(False)
    net = DistributedDataParallel(model)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    run(net, opt, 0, 2)
    start = model.b.weight.detach().clone()
    model.b.requires_grad_(True)
    run(net, opt, 2, 6)
    changed = not torch.equal(start, model.b.weight)
    return {"same": is_same_everywhere(masters(opt)), "changed": changed}


def made_late(option: str) -> Report:
    """Another DDP module is made in mid-run: an error once, and then it is served."""
    model, net, opt = made("ddp", steps=2)
    run(net, opt, 0, 2)
    later = DistributedDataParallel(model, **OPTIONS[option])
    report: Report = {"first": message(lambda: run(later, opt, 2, 4))}
    opt.zero_grad()
    report["then"] = message(lambda: run(later, opt, 4, 8))
    return report | {"same": is_same_everywhere(masters(opt))}


def heap_frozen() -> Report:
    """gc.freeze() after DDP was made hides it from Python's collector."""
    torch.manual_seed(0)
    model = Net()
    net = DistributedDataParallel(model)
    gc.freeze()
    with mock.patch.multiple(gc, **frozen.REAL):
        opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
        trained = message(lambda: run(net, opt, 0, 4))
    gc.freeze()  # what all tests share
    return {"train": trained, "same": is_same_everywhere(masters(opt))}


# --- mistakes ---


def refused(what: str) -> Report:
    """DDP that does more than averaging; what is mended trains right."""
    torch.manual_seed(0)
    model = Net()
    options: dict[str, Any] = {}
    if what == "static":
        options["static_graph"] = True
    params = list(model.parameters())
    if what == "groups":
        own, *_ = [g for g in map(dist.new_group, [[0], [1]]) if dist.get_rank(g) == 0]
        other = DistributedDataParallel(nn.Linear(4, 4), process_group=own)
        params += other.parameters()
    inner = torch.optim.AdamW(params[:-1] if what == "part" else params, lr=1e-2)
    if what == "static":  # made after the optimizer
        opt = FusedAccumOptimizer(inner, 1)
        net = DistributedDataParallel(model, **options)
    else:
        net = DistributedDataParallel(model, **options)
        if what == "hook":
            net.register_comm_hook(None, fp16_compress_hook)
        elif what == "mixed":  # DDP itself refuses that on a CPU
            net.mixed_precision = object()
        group = dist.group.WORLD if what == "group" else None
        opt = FusedAccumOptimizer(inner, 1, process_group=group)
    start = flat(params)

    def step() -> None:
        loss_of(model if what == "mixed" else net, batch(dist.get_rank(), 0, 0)).backward()

    report: Report = {"backward": message(step), "step": message(opt.step)}
    report["unchanged"] = torch.equal(start, flat(params))
    if what == "static":
        opt.zero_grad()
        run(net, opt, 1, 3)
        report["same"] = is_same_everywhere(masters(opt))
        report["changed"] = not torch.equal(start, flat(params))
    return report


def lacks(name: str) -> Report:
    """A torch whose DDP has another name for what is private to it."""
    model = nn.Linear(4, 4)
    net: Any = DistributedDataParallel(model)
    start = flat(list(model.parameters()))
    owner = net if name in vars(net) else DistributedDataParallel
    with mock.patch.object(owner, name):
        delattr(owner, name)
        opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
        report: Report = {"backward": message(lambda: net(torch.ones(2, 4)).sum().backward())}
        report["step"] = message(opt.step)
    report["unchanged"] = torch.equal(start, flat(list(model.parameters())))
    return report


def late_hook() -> Report:
    """A communication hook after the optimizer was made, which DDP would not call."""
    model, net, opt = made("ddp", steps=1)
    start = flat(list(model.parameters()))
    net.register_comm_hook(None, fp16_compress_hook)
    step = message(lambda: run(net, opt, 0, 1))
    return {"step": step, "unchanged": torch.equal(start, flat(list(model.parameters())))}


def different(what: str) -> Report:
    """One process has other settings or parameters. Not DDP, which looks at the shapes too."""
    second = dist.get_rank() == 1
    torch.manual_seed(0)
    model: nn.Module = Net(extra=second and what == "parameters")
    steps = 2 if second and what == "steps" else 1
    clip = 1.0 if second and what == "clip" else None
    kind = torch.optim.SGD if second and what == "optimizer" else torch.optim.AdamW
    scaler = torch.amp.GradScaler("cpu", enabled=second and what == "scaler")
    with mock.patch.object(reduction, "broadcast", lambda *_: None):
        inner = kind(model.parameters(), lr=1e-2)
        opt = FusedAccumOptimizer(
            inner, steps, clip, process_group=dist.group.WORLD, grad_scaler=scaler
        )
    start = flat(list(model.parameters()))

    def train() -> None:
        for i in range(2):
            scaler.scale(loss_of(model, batch(dist.get_rank(), 0, i))).backward()
            scaler.step(opt)

    report: Report = {"backward": message(train)}
    report["unchanged"] = torch.equal(start, flat(list(model.parameters())))
    return report


def fault(case: str) -> Report:
    """ "killed-ddp": a process dies, or "raised", in a backward that averages or reduces shards. It
    ends then."""
    what, engine = case.split("-")
    model, net, opt = made(engine, steps=2)
    run(net, opt, 0, 2)

    def held() -> torch.Tensor:  # a module of FSDP2 shows whole parameters in a backward
        return flat([local_of(p) for group in opt.param_groups for p in group["params"]])

    start = held().clone()

    def fail(_: torch.Tensor) -> None:
        if dist.get_rank() == 1 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 1:
            raise ValueError("the test's")

    def void(_: object) -> None:
        pass

    def train() -> None:
        run(net, opt, 2, 3)
        # The last layer of a backward: other parameters are on their way by then.
        handle = model.a.register_forward_hook(lambda a, x, y: void(y.register_hook(fail)))
        try:
            run(net, opt, 3, 4)
        finally:
            handle.remove()

    with watched():
        report: Report = {"backward": message(train), "step": message(opt.step)}
        report["zero_grad"] = message(opt.zero_grad)
    report["unchanged"] = torch.equal(start, held())
    torch.save({f"fault:{case}": report}, f"{os.environ['FOLDER']}/report{dist.get_rank()}")
    os._exit(0)  # without a word to the others


def broadcast() -> Report:
    """process_group= copies the first process's parameters."""
    torch.manual_seed(dist.get_rank())
    model = Net()
    before = is_same_everywhere(list(model.parameters()))
    inner = torch.optim.AdamW(model.parameters())
    opt = FusedAccumOptimizer(inner, 1, process_group=dist.group.WORLD)
    return {
        "before": before,
        "after": is_same_everywhere(list(model.parameters())),
        "copied": message(lambda: copy.deepcopy(opt)),
        "wrong": message(lambda: FusedAccumOptimizer(inner, process_group=2)),  # type: ignore[arg-type]
    }
