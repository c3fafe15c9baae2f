"""What test_sharded_checkpoints.py runs in the processes of a group: shards saved and loaded."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import DTYPES, Report, loss_of, off
from tests.distributed.sharded_serving_cases import (
    N,
    adamw,
    build,
    precise,
    states,
    train,
    x_of,
)
from tests.processes import message


def open_window(model: nn.Module, opt: Any, rank: int) -> None:
    """One micro-batch of the next window."""
    loss_of(model, x_of(rank, 3, 0, model)).backward()
    opt.step()
    opt.zero_grad()


def go_on(model: nn.Module, opt: Any, is_open: bool) -> None:
    if is_open:
        loss_of(model, x_of(0, 3, 1, model)).backward()
        opt.step()
        opt.zero_grad()
    train(model, opt, range(4, 6), rank=0)


def saved(case: str) -> Report:
    """ "bf16-nested-closed": saved by this many processes, for others to load; and how it went on.

    The data is the same in all, so that their number makes no difference.
    """
    dtype, form, window = case.split("-")
    model = build(DTYPES[dtype])
    opt = FusedAccumOptimizer(adamw(model), N)
    train(model, opt, range(3), rank=0)
    if window == "open":
        open_window(model, opt, 0)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    both = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt, options=options),
    }
    dcp.save(both, checkpoint_id=f"{os.environ['FOLDER']}/{case}")
    now = [precise(opt), states(opt)]
    go_on(model, opt, window == "open")
    torch.save([now, [precise(opt), states(opt)]], f"{os.environ['FOLDER']}/{case}.pt")
    return {}


def loaded(case: str) -> Report:
    """What `saved` wrote, in a group of another size."""
    dtype, form, window = case.split("-")
    model = build(DTYPES[dtype], seed=1)
    opt = FusedAccumOptimizer(adamw(model), N)
    if window == "open":  # the template of a load has what the optimizer has
        train(model, opt, range(1))
        open_window(model, opt, 0)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    both = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt, options=options),
    }
    dcp.load(both, checkpoint_id=f"{os.environ['FOLDER']}/{case}")
    set_model_state_dict(model, both["model"])
    set_optimizer_state_dict(model, opt, both["optimizer"], options=options)
    now, later = torch.load(f"{os.environ['FOLDER']}/{case}.pt")
    report: Report = {"now": [off(precise(opt), now[0]), off(states(opt), now[1])]}
    report["micro_batches"] = opt.micro_batches
    go_on(model, opt, window == "open")
    report["later"] = [off(precise(opt), later[0]), off(states(opt), later[1])]
    report["steps"] = int(next(iter(opt.state_dict()["state"].values()))["step"])
    return report


def full() -> Report:
    """A whole state dict from rank 0, broadcast into another model."""
    model, other = build(torch.bfloat16), build(torch.bfloat16, seed=1)
    opt, again = (FusedAccumOptimizer(adamw(m), N) for m in (model, other))
    train(model, opt, range(3))
    take = StateDictOptions(full_state_dict=True, cpu_offload=True)
    give = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights = get_model_state_dict(model, options=take)
    held = get_optimizer_state_dict(model, opt, options=take)
    set_model_state_dict(other, weights, options=give)
    set_optimizer_state_dict(other, again, held, options=give)
    train(model, opt, range(3, 5))
    train(other, again, range(3, 5))
    return {"off": [off(precise(again), precise(opt)), off(states(again), states(opt))]}


def files(how: str) -> Report:
    """ "open-same": one of each rank, "closed" or in mid-window ("open", "weighted"), and loaded by
    itself ("same") or by the other one ("turned")."""
    window, how = how.split("-")
    weighted = window == "weighted"
    rank, world = dist.get_rank(), dist.get_world_size()

    def micro(model: nn.Module, opt: Any, i: int) -> None:
        x = x_of(rank, 1, i, model)
        if weighted:
            with opt.micro_batch(weight=1.0 + rank + 2 * i):
                loss_of(model, x).backward()
        else:
            loss_of(model, x).backward()
        opt.step()
        opt.zero_grad()

    model = build(torch.bfloat16)
    opt = FusedAccumOptimizer(adamw(model), N)
    train(model, opt, range(1))
    if window != "closed":
        micro(model, opt, 0)
    file = io.BytesIO()
    torch.save([opt.state_dict(), model.state_dict()], file)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, file.getvalue())
    source = rank if how == "same" else (rank + 1) % world
    held, weights = torch.load(io.BytesIO(everyone[source]), weights_only=False)
    other = build(torch.bfloat16, seed=1)
    again = FusedAccumOptimizer(adamw(other), N)
    if error := message(lambda: again.load_state_dict(held)):
        error = error.replace(f"rank {source} ", "rank S ").replace(f"rank {rank} ", "rank R ")
        return {"error": error}
    other.load_state_dict(weights)
    for m, o in ((model, opt), (other, again)):
        for i in range(window != "closed", N):
            micro(m, o, i)
        train(m, o, range(2, 3))
    return {"same": all(map(torch.equal, precise(opt), precise(again)))}
