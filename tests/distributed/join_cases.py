"""What test_join.py runs in the processes of a group: Join, and data that ends somewhere first."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import (
    DTYPES,
    Micro,
    Net,
    Report,
    flat,
    is_same_everywhere,
    masters,
    mean_gradient,
    off,
    watched,
)
from tests.distributed.window_cases import N, micro
from tests.processes import message

CLIP = 0.5
# Micro-batches of each process, in each of two epochs.
COUNTS = {
    "less": [[9, 6], [3, 8]],
    "none": [[6, 0], [0, 5]],
    "even": [[4, 4], [6, 6]],
    "three": [[9, 4, 0], [2, 3, 9]],
}


def rate(epoch: int, window: int) -> float:
    return 0.2 / (1 + epoch + window)


def made(
    engine: str, dtype: torch.dtype, steps: int | None, **options: Any
) -> tuple[Net, Any, FusedAccumOptimizer]:
    """A model, what is called instead of it, and its optimizer, which keeps a momentum. DDP has a
    buffer to share in each forward."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    net: Any = model
    if engine == "ddp":
        model.register_buffer("seen", torch.zeros(1))
        net = DistributedDataParallel(model)
    group = dist.group.WORLD if engine == "group" else None
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, net, FusedAccumOptimizer(inner, steps, process_group=group, **options)


def exactly(
    model: Net, counts: list[list[int]], n: int, weighted: bool, by_loop: bool
) -> list[torch.Tensor]:
    """The same training in float64, by one process that has the data of all.

    Args:
        model: before it.
        counts: see COUNTS.
        n: micro-batches per window.
        weighted: whether by tokens.
        by_loop: whether a loop divides by N, and all processes count, also those without data.
    """
    twin = copy.deepcopy(model).double()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for epoch, per_rank in enumerate(counts):
        for window in range(-(-max(per_rank) // n)):
            micros: list[Micro] = []
            for rank, m in enumerate(per_rank):
                for i in range(window * n, min(m, window * n + n)):
                    weight, loss = micro(rank, epoch, i, torch.float64)
                    micros.append((weight if weighted else 1.0, loss))
            share = len(micros) / (n * len(per_rank)) if by_loop else 1.0
            for p, g in zip(twin.parameters(), mean_gradient(twin, micros), strict=True):
                p.grad = g * share
            torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
            plain.param_groups[0]["lr"] = rate(epoch, window)
            plain.step()
    return list(twin.parameters())


def joined(case: str) -> Report:
    """ "engine-owner-dtype-weights-counts": two epochs, each in a Join block, and what is left."""
    engine, owner, name, weights, counts_name = case.split("-")
    dtype, counts, weighted = DTYPES[name], COUNTS[counts_name], weights == "weights"
    # With a group every backward of a loop averages: a window of one.
    n = 1 if (engine, owner) == ("group", "loop") else N
    steps = n if owner == "n" else None
    model, net, opt = made(engine, dtype, steps, max_grad_norm=CLIP if owner == "n" else None)
    by_loop = owner == "loop" and not weighted
    exact = exactly(model, counts, n, weighted, by_loop)
    other = exactly(model, counts, n, not weighted, by_loop)
    start, rank, params = flat(list(model.parameters())), dist.get_rank(), list(model.parameters())
    report: Report = {"same": True, "closed": []}

    def close(epoch: int, window: int) -> None:
        opt.param_groups[0]["lr"] = rate(epoch, window)
        if owner == "loop" and weighted:
            opt.clip_grad_norm_(CLIP)
        elif owner == "loop":
            torch.nn.utils.clip_grad_norm_(params, CLIP)

    def backward(epoch: int, i: int) -> None:
        weight, loss = micro(rank, epoch, i, dtype)
        with contextlib.ExitStack() as stack:
            if owner == "loop" and engine == "ddp" and i % n < n - 1:
                stack.enter_context(net.no_sync())
            if weighted:
                stack.enter_context(opt.micro_batch(weight))
            value = loss(net)
            (value / n if by_loop else value).backward()

    def see() -> None:
        momenta = [opt.state[p]["momentum_buffer"] for p in params if p in opt.state]
        norm = [] if opt.grad_norm is None else [opt.grad_norm]
        numbers = [torch.tensor(opt.param_groups[0]["lr"]), opt.skipped_steps, *norm]
        for tensors in (masters(opt), params, momenta, numbers):
            report["same"] &= is_same_everywhere(tensors)

    for epoch, per_rank in enumerate(counts):
        with watched(), Join([net if engine == "ddp" else opt]):
            for i in range(per_rank[rank]):
                backward(epoch, i)
                if i % n == n - 1:
                    close(epoch, i // n)
                if owner == "n" or i % n == n - 1:
                    opt.step()
                    opt.zero_grad()
        see()
        if max(per_rank) % n:  # the last window is short
            if owner == "loop":
                opt.clip_grad_norm_(CLIP)
            opt.param_groups[0]["lr"] = rate(epoch, max(per_rank) // n)
            (opt.step if owner == "loop" else opt.flush)()
            opt.zero_grad()
            see()
        report["closed"].append(opt.window_closed)
    change = flat(exact) - start
    report["off"] = off(masters(opt), exact) * float(flat(exact).norm() / change.norm())
    report["control"] = float((flat(other) - flat(exact)).norm() / change.norm())
    return report


def scaled(engine: str) -> Report:
    """AdamW in fp16 with a linked GradScaler, which one process has no data for; then, without
    Join, that process closes a window early."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    torch.manual_seed(0)
    model = Net().half()
    net: Any = DistributedDataParallel(model) if engine == "ddp" else model
    group = dist.group.WORLD if engine == "group" else None
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = FusedAccumOptimizer(inner, 2, grad_scaler=scaler, process_group=group)
    rank, report = dist.get_rank(), {"scales": [], "same": True}

    def train(epoch: int, n: int) -> None:
        for i in range(n):
            loss = micro(rank, epoch, i, torch.float16)[1](net)
            scaler.scale(loss * float("inf") if (epoch, i) == (0, 4) else loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    for epoch, counts in enumerate(((8, 3), (1, 6), (4, 3))):
        with Join([net if engine == "ddp" else opt], enable=epoch < 2):
            train(epoch, counts[rank])
        if epoch == 2 and rank == 1:
            opt.flush()
        states = [t for p in opt.state for t in opt.state[p].values()]
        report["same"] &= is_same_everywhere([*masters(opt), *states])
        report["scales"].append((scaler.get_scale(), int(opt.skipped_steps)))
    return report


def wrapped(name: str) -> Report:
    """An optimizer with its own step(), and a parameter of no elements."""
    torch.manual_seed(0)
    model = Net().bfloat16()
    model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, dtype=torch.bfloat16)))
    net = DistributedDataParallel(model, static_graph=True)
    inner = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
    opt = FusedAccumOptimizer(inner, N, CLIP)
    report: Report = {"same": True}
    for epoch, per_rank in enumerate(COUNTS["less"]):
        with Join([net]):
            for i in range(per_rank[dist.get_rank()]):
                micro(dist.get_rank(), epoch, i, torch.bfloat16)[1](net).backward()
                opt.step()
                opt.zero_grad()
        states = [t for p in opt.state for t in opt.state[p].values() if torch.is_tensor(t)]
        report["same"] &= is_same_everywhere([*masters(opt), *states])
    return report


def idle() -> Report:
    """Micro-batches of which some have no backward, in the only process that has any."""
    model, net, opt = made("group", torch.float32, 2)
    with Join([opt]):
        for i in range(6 if dist.get_rank() == 0 else 0):
            if i in (0, 3):
                micro(0, 0, i)[1](net).backward()
            opt.step()
            opt.zero_grad()
    changes = [opt.state[p]["momentum_buffer"] for p in model.parameters()]
    return {"same": is_same_everywhere([*masters(opt), *changes])}


# --- mistakes, which all processes make ---


def refused(what: str) -> Report:
    """What Join cannot do."""
    engine = "group" if what in ("flush", "open", "twice_alone") else "ddp"
    steps = None if what in ("twice", "twice_alone", "divide") else N
    model, net, opt = made(engine, torch.float32, steps)
    joinables: list[Any] = [opt if engine == "group" else net]
    options: dict[str, Any] = {}
    if what == "both":
        joinables.append(opt)
    elif what == "divide":
        options["divide_by_initial_world_size"] = False

    def backward() -> None:
        micro(dist.get_rank(), 0, 0)[1](net).backward()

    def train() -> None:
        with Join(joinables, **options):
            backward()
            if what == "open":
                opt.join_hook().main_hook()
            elif what == "flush":
                opt.step()
                opt.flush()
            backward()

    before = flat(list(model.parameters()))
    report: Report = {"train": message(train)}
    report["unchanged"] = torch.equal(before, flat(list(model.parameters())))
    return report


def shared(what: str) -> Report:
    """Several wrappers around one DDP module, or one around several modules; shared states."""
    models = [Net(), Net()]
    nets = [DistributedDataParallel(model) for model in models]
    first, second = (list(model.parameters()) for model in models)
    groups = [first + second] if what == "modules" else [first[:2], first[2:], second]
    groups = [first] if what == "states" else groups
    opts = [
        FusedAccumOptimizer(torch.optim.SGD(group, lr=0.1), N, shard_states=what == "states")
        for group in groups
    ]
    report: Report = {"join": message(lambda: Join([nets[0]]))}
    assert len(opts) == len(groups)
    return report


def late() -> Report:
    """The optimizer is made before DDP, and meets it inside the block; then outside of one."""
    torch.manual_seed(0)
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = FusedAccumOptimizer(inner, 1)

    def train() -> None:
        net = DistributedDataParallel(model)
        with Join([net]):
            micro(dist.get_rank(), 0, 0)[1](net).backward()

    report: Report = {"first": message(train)}
    opt.zero_grad()
    other = DistributedDataParallel(model)
    micro(dist.get_rank(), 0, 0)[1](other).backward()
    opt.step()
    report["same"] = is_same_everywhere(masters(opt))
    return report


def copied() -> Report:
    """A DDP module that rests is copied and pickled with its own way to join."""
    model, net, old = made("ddp", torch.float32, 1)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), N)  # which takes over
    other = copy.deepcopy(net)
    with Join([net]):
        for i in range(2 * N - dist.get_rank()):
            micro(dist.get_rank(), 0, i)[1](net).backward()
            opt.step()
            opt.zero_grad()
    assert old.gradient_accumulation_steps == 1
    return {
        "copy": type(other.join_hook()).__name__,
        "rests": type(net.join_hook()).__name__,
        "detached": type((opt.flush(), opt.zero_grad(), opt.detach()) and net.join_hook()).__name__,
    }
