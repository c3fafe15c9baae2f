"""What test_scalers.py runs in the processes of a group: GradScalers, one in each process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.ddp_cases import (
    Report,
    batch,
    flat,
    is_same_everywhere,
    loss_of,
    masters,
    whole,
)
from tests.distributed.window_cases import made

N = 3
FORMS: dict[str, tuple[int | None, bool, dict[str, Any]]] = {  # steps, unscale_(), options
    "counted": (N, False, {}),
    "unscaled": (N, True, {}),
    "loop": (None, True, {}),
    "handed": (None, False, {"fused_unscale": True}),
    "stock": (None, True, {}),
}


def scaled(case: str) -> Report:
    """ "engine-form-dtype-where": six windows; the second process overflows in the second one, in
    this micro-batch. "early": it also ends the third window before the first process does."""
    engine, form, dtype, where = case.split("-")
    steps, unscales, options = FORMS[form]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    if form in ("counted", "unscaled", "loop"):
        options = {"grad_scaler": scaler}
    _, net, opt = made(engine, getattr(torch, dtype), steps, max_grad_norm=1.0, **options)
    rank = dist.get_rank()
    report: Report = {"scales": [], "growth": [], "skipped": [], "changed": [], "same": True}
    # With a group every backward of a loop averages; one per window then.
    n = 1 if engine == "group" and steps is None else N

    def step() -> None:
        if unscales:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    for window in range(6):
        before = flat(list(map(whole, masters(opt))))
        is_early = where == "early" and window == 2 and rank == 1
        for i in range(n - is_early):
            if engine == "ddp":
                net.require_backward_grad_sync = steps is not None or i == n - 1
            elif engine == "fsdp2" and steps is None:
                net.set_requires_gradient_sync(i == n - 1)
            loss = loss_of(net, batch(rank, window, i).to(getattr(torch, dtype)))
            overflow_at = 0 if where == "early" else min(int(where), n - 1)
            if (window, i, rank) == (1, overflow_at, 1):
                loss = loss * float("inf")
            scaler.scale(loss if steps else loss / n).backward()
            if steps:
                step()
        if is_early:
            opt.flush()
        elif steps is None:
            step()
        report["scales"].append(scaler.get_scale())
        if where != "early" or window != 2:  # there the first process has one update more
            report["growth"].append(scaler._get_growth_tracker())
        report["skipped"].append(int(opt.skipped_steps))
        report["changed"].append(not torch.equal(before, flat(list(map(whole, masters(opt))))))
        report["same"] &= is_same_everywhere(
            [whole(p) for g in opt.param_groups for p in g["params"]]
        )
        report["same"] &= is_same_everywhere(list(map(whole, masters(opt))))
        if opt.grad_norm is not None:  # stock: GradScaler does not call step() after an overflow
            report["same"] &= is_same_everywhere([opt.grad_norm])
    return report
