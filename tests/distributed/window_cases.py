"""What test_windows.py runs in the processes of a group: weights, skips, checkpoints."""

from __future__ import annotations

import copy
import io
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import (
    DTYPES,
    Micro,
    Net,
    Report,
    batch,
    flat,
    is_same_everywhere,
    loss_of,
    masters,
    mean_gradient,
    off,
    watched,
)
from tests.distributed.sharded_cases import sharded
from tests.processes import message

N = 4


def made(
    engine: str, dtype: torch.dtype = torch.float32, steps: int | None = N, **options: Any
) -> tuple[nn.Module, Any, FusedAccumOptimizer]:
    """A model, what is called instead of it, and its optimizer."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    if engine == "fsdp2":
        sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))
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


# --- what differs between processes later ---


def differs_later(case: str) -> Report:
    """ "engine-what": one process assigns a setting, or gives weights, from the second window on;
    or "first": it gives weights from the beginning."""
    engine, what = case.split("-")
    _, net, opt = made(engine, skip_nonfinite=what != "lets_nan")
    rank = dist.get_rank()

    def window(number: int, other: bool) -> None:
        steps = opt.gradient_accumulation_steps
        assert steps is not None
        for i in range(steps):
            x = batch(rank, number, i)
            if other and what in ("weights", "first"):
                with opt.micro_batch(weight=3):
                    loss_of(net, x).backward()
            else:
                loss_of(net, x).backward()
            opt.step()
            opt.zero_grad()

    if what != "first":
        window(0, other=False)
    before = flat(masters(opt))
    is_other = rank == dist.get_world_size() - 1
    assigned = {
        "steps": ("gradient_accumulation_steps", 1),
        "clip": ("max_grad_norm", 0.5),
        "skip": ("skip_nonfinite", False),
        "lets_nan": ("max_grad_norm", 0.5),
    }
    if is_other and what in assigned:
        setattr(opt, *assigned[what])
    report: Report = {"error": message(lambda: window(1, is_other))}
    opt.zero_grad()
    report["unchanged"] = torch.equal(before, flat(masters(opt)))
    # All go on when they are alike again.
    for name, _ in assigned.values():
        setattr(opt, name, {"gradient_accumulation_steps": N, "max_grad_norm": 1.0}.get(name, True))
    report["then"] = message(lambda: window(2, other=False))
    report["changed"] = not torch.equal(before, flat(masters(opt)))
    if engine != "fsdp2":
        report["same"] = is_same_everywhere(masters(opt))
    return report


# --- checkpoints ---


def run(net: Any, opt: FusedAccumOptimizer, start: int, stop: int) -> None:
    """Micro-batches `start` to `stop`."""
    rank = dist.get_rank()
    for k in range(start, stop):
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
