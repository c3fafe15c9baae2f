"""What test_windows.py runs in the processes of a group: weights, skips, checkpoints, mistakes."""

from __future__ import annotations

import copy
import gc
import io
import os
import signal
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from fusedaccum.distributed import reduction
from tests.distributed.ddp_cases import (
    DTYPES,
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

N = 4


def message(call: Callable[[], Any]) -> str | None:
    """What `call` raises, as "Type: text"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def made(
    engine: str, dtype: torch.dtype = torch.float32, steps: int | None = N, **options: Any
) -> tuple[nn.Module, Any, FusedAccumOptimizer]:
    """A model, what is called instead of it, and its optimizer."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    net: Any = DistributedDataParallel(model) if engine == "ddp" else model
    group = dist.group.WORLD if engine == "group" else None
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, net, FusedAccumOptimizer(inner, steps, process_group=group, **options)


# --- weights ---


def tokens(rank: int, window: int, i: int) -> int:
    return 1 + (7 * rank + 3 * i + 5 * window) % 11


def micro(rank: int, window: int, i: int, dtype: torch.dtype = torch.float32) -> Micro:
    n = tokens(rank, window, i)
    return n, lambda at: loss_of(at, batch(rank, window, i, n).to(dtype))


# Micro-batches per window, of each rank.
COUNTS = {
    "equal": [[4, 4], [4, 4]],
    "partial": [[4, 4], [4, 2], [1, 3]],
    "none": [[4, 4], [4, 0], [0, 1], [0, 0]],
    "three": [[4, 4, 4], [2, 4, 0]],
}


def weights(case: str) -> Report:
    """ "engine-dtype-counts": token weights, and windows that ranks close early."""
    engine, name, counts = case.split("-")
    dtype, rank = DTYPES[name], dist.get_rank()
    clip = 0.1 if counts in ("partial", "three") else None
    model, net, opt = made(engine, dtype, max_grad_norm=clip)
    report: Report = {"gradient": [], "norm": [], "closed": [], "same": True}
    with watched():
        for window, per_rank in enumerate(COUNTS[counts]):
            micros = [micro(r, window, i, dtype) for r, n in enumerate(per_rank) for i in range(n)]
            before = copy.deepcopy(masters(opt))
            exact = mean_gradient(model, micros) if micros else []
            for i in range(per_rank[rank]):
                n = tokens(rank, window, i)
                with opt.micro_batch(weight=n):
                    loss_of(net, batch(rank, window, i, n).to(dtype)).backward()
                opt.step()
                opt.zero_grad()
            if per_rank[rank] < N:
                opt.flush()
                opt.zero_grad()
            report["closed"].append(opt.window_closed)
            report["same"] &= is_same_everywhere(masters(opt))
            if not micros:
                report["unchanged"] = torch.equal(flat(before), flat(masters(opt)))
                continue
            # The first moment tells the gradient of the update, but for the clipping.
            assert opt.grad_norm is not None
            norm = float(flat(exact).norm())
            report["norm"].append(abs(float(opt.grad_norm) - norm) / norm)
            if window == 0 and clip is None:
                moments = [opt.state[p]["exp_avg"] / 0.1 for p in model.parameters()]
                report["gradient"].append(off(moments, exact))
    return report


def loop_weights() -> Report:
    """The loop owns a weighted window, and its no_sync() says when to average."""
    model, net, opt = made("ddp", steps=None)
    rank, report = dist.get_rank(), {"gradient": [], "same": True}
    for window in range(2):
        micros = [micro(r, window, i) for r in range(dist.get_world_size()) for i in range(N)]
        exact = mean_gradient(model, micros)
        for i, n in enumerate(tokens(rank, window, k) for k in range(N)):
            net.require_backward_grad_sync = i == N - 1
            with opt.micro_batch(weight=n):
                loss_of(net, batch(rank, window, i, n)).backward()
        norm = opt.clip_grad_norm_(1e9)
        report["gradient"].append(abs(float(norm) / float(flat(exact).norm()) - 1))
        opt.step()
        opt.zero_grad()
        report["same"] &= is_same_everywhere([norm, *masters(opt)])
    return report


# --- what only one process sees ---


def not_finite(case: str) -> Report:
    """ "engine-value": one process's gradient is not finite, in a micro-batch in mid-window."""
    engine, value = case.split("-")
    _, net, opt = made(engine)
    rows = []
    for window in range(4):
        before = flat(masters(opt))
        for i in range(N):
            x = batch(dist.get_rank(), window, i)
            if (window, i, dist.get_rank()) == (1, 0, 1):
                x[0, 0] = float(value)
            loss_of(net, x).backward()
            opt.step()
            opt.zero_grad()
        assert opt.grad_norm is not None
        rows.append(
            (
                not torch.equal(before, flat(masters(opt))),
                int(opt.skipped_steps),
                is_same_everywhere([opt.grad_norm, *masters(opt)]),
            )
        )
    return {"rows": rows}


def scaler() -> Report:
    """fp16 with a linked GradScaler: one process overflows, under a scale of its own."""
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, net, opt = made("ddp", torch.float16, 2, grad_scaler=grad_scaler)
    rows = []
    for window in range(3):
        before = flat(masters(opt))
        for i in range(2):
            loss = loss_of(net, batch(dist.get_rank(), window, i).half())
            if (window, i, dist.get_rank()) == (1, 0, 1):
                loss = loss * 1e30
            grad_scaler.scale(loss).backward()
            grad_scaler.step(opt)
            grad_scaler.update()
            opt.zero_grad()
        changed = not torch.equal(before, flat(masters(opt)))
        rows.append((changed, int(opt.skipped_steps), is_same_everywhere(masters(opt))))
    return {"rows": rows}


# --- checkpoints ---


def run(net: Any, opt: FusedAccumOptimizer, start: int, stop: int, stray: int = 0) -> None:
    """Micro-batches `start` to `stop`; `stray`: of another rank's data."""
    for k in range(start, stop):
        rank = (dist.get_rank() + stray) % dist.get_world_size()
        with opt.micro_batch(weight=tokens(rank, 0, k)):
            loss_of(net, batch(rank, 0, k).to(next(net.parameters()).dtype)).backward()
        opt.step()
        opt.zero_grad()


def through_a_file(state: Any) -> Any:
    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def resumed(case: str) -> Report:
    """ "engine-stop": saved after so many micro-batches, by each process; and by the first one."""
    engine, stop = case.split("-")
    dtype = torch.bfloat16
    model, net, opt = made(engine, dtype, max_grad_norm=1.0)
    run(net, opt, 0, int(stop))
    state = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    run(net, opt, int(stop), 12)
    other, other_net, other_opt = made(engine, dtype, max_grad_norm=1.0)
    other.load_state_dict(state["model"])
    other_opt.load_state_dict(state["optimizer"])
    run(other_net, other_opt, int(stop), 12)
    same = torch.equal(flat(masters(opt)), flat(masters(other_opt)))
    box = [state["optimizer"]]
    dist.broadcast_object_list(box, 0)
    _, _, third_opt = made(engine, dtype, max_grad_norm=1.0)
    return {"same": same, "of the first": message(lambda: third_opt.load_state_dict(box[0]))}


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


def by_dcp(stop: str) -> Report:
    """torch.distributed.checkpoint: between windows, and the window of one process for all."""
    model, net, opt = made("ddp", torch.bfloat16)
    run(net, opt, 0, int(stop))
    folder = f"{os.environ['FOLDER']}/dcp-{stop}"
    state = get_optimizer_state_dict(model, opt)
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=folder)
    other, other_net, other_opt = made("ddp", torch.bfloat16)
    loaded: Any = {
        "model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, other_opt)
    }  # fmt: skip

    def load() -> None:
        dcp.load(loaded, checkpoint_id=folder)
        other.load_state_dict(loaded["model"])
        set_optimizer_state_dict(other, other_opt, loaded["optimizer"])

    report: Report = {"load": message(load)}
    if report["load"] is None:
        run(net, opt, int(stop), 12)
        run(other_net, other_opt, int(stop), 12)
        report["same"] = torch.equal(flat(masters(opt)), flat(masters(other_opt)))
    return report


# --- mistakes ---


def refused(what: str) -> Report:
    """DDP that does more than averaging; what is mended trains right."""
    torch.manual_seed(0)
    model = Net()
    options: dict[str, Any] = {}
    if what == "static":
        options["static_graph"] = True
    params = list(model.parameters())
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


def different(what: str) -> Report:
    """One process has other settings or parameters. Not DDP, which looks at the shapes too."""
    second = dist.get_rank() == 1
    torch.manual_seed(0)
    model: nn.Module = Net(extra=second and what == "parameters")
    steps = 2 if second and what == "steps" else 1
    clip = 1.0 if second and what == "clip" else None
    kind = torch.optim.SGD if second and what == "optimizer" else torch.optim.AdamW
    with mock.patch.object(reduction, "broadcast", lambda *_: None):
        inner = kind(model.parameters(), lr=1e-2)
        opt = FusedAccumOptimizer(inner, steps, clip, process_group=dist.group.WORLD)
    start = flat(list(model.parameters()))

    def train() -> None:
        for i in range(2):
            loss_of(model, batch(dist.get_rank(), 0, i)).backward()
            opt.step()

    report: Report = {"backward": message(train)}
    report["unchanged"] = torch.equal(start, flat(list(model.parameters())))
    return report


def fault(what: str) -> Report:
    """A process dies, or raises, in the backward that averages. It ends then."""
    model, net, opt = made("ddp", steps=2)
    run(net, opt, 0, 2)
    start = flat(masters(opt))

    def fail(_: torch.Tensor) -> None:
        if dist.get_rank() == 1 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 1:
            raise ValueError("the test's")

    def train() -> None:
        run(net, opt, 2, 3)
        handle = model.a.weight.register_hook(fail)  # when other buckets are on their way
        try:
            run(net, opt, 3, 4)
        finally:
            handle.remove()

    with watched():
        report: Report = {"backward": message(train), "step": message(opt.step)}
        report["zero_grad"] = message(opt.zero_grad)
    report["unchanged"] = torch.equal(start, flat([p for p in model.parameters()]))
    torch.save({f"fault:{what}": report}, f"{os.environ['FOLDER']}/report{dist.get_rank()}")
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
