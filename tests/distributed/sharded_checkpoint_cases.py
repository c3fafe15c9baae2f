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
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


def options_of(form: str) -> StateDictOptions:
    """Of "nested" or "flat" state dicts."""
    return StateDictOptions(flatten_optimizer_state_dict=form == "flat")


def both_of(model: nn.Module, opt: Any, form: str) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves, or loads into."""
    held = get_optimizer_state_dict(model, opt, options=options_of(form))
    return {"model": get_model_state_dict(model), "optimizer": held}


def load_both(model: nn.Module, opt: Any, form: str, folder: str) -> None:
    """Take over what was saved there."""
    both = both_of(model, opt, form)
    dcp.load(both, checkpoint_id=folder)
    set_model_state_dict(model, both["model"])
    set_optimizer_state_dict(model, opt, both["optimizer"], options=options_of(form))


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
    dcp.save(both_of(model, opt, form), checkpoint_id=f"{os.environ['FOLDER']}/{case}")
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
    load_both(model, opt, form, f"{os.environ['FOLDER']}/{case}")
    now, later = torch.load(f"{os.environ['FOLDER']}/{case}.pt")
    report: Report = {"now": [off(precise(opt), now[0]), off(states(opt), now[1])]}
    report["micro_batches"] = opt.micro_batches
    go_on(model, opt, window == "open")
    report["later"] = [off(precise(opt), later[0]), off(states(opt), later[1])]
    report["steps"] = int(next(iter(opt.state_dict()["state"].values()))["step"])
    return report


class Container(torch.optim.Optimizer, Stateful):
    """In the manner of torchtitan's: an optimizer for each part of a model (a stage of a pipeline),
    shown as one, whose state dict is flat."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self.own = [FusedAccumOptimizer(adamw(part)) for part in parts]
        params = [p for part in parts for p in part.parameters()]
        torch.optim.Optimizer.__init__(self, params, {"lr": 0.01})

    def step(self) -> None:  # type: ignore[override]
        for opt in self.own:
            opt.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for opt in self.own:
            opt.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        found: dict[str, Any] = {}
        for part, opt in zip(self.parts, self.own, strict=True):
            found.update(get_optimizer_state_dict(part, opt, options=options))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, opt in zip(self.parts, self.own, strict=True):
            set_optimizer_state_dict(part, opt, optim_state_dict=state_dict, options=options)


class Stages(nn.Module):
    """Two parts with names of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = build(torch.bfloat16, seed), nn.Linear(1, 3).bfloat16()
        fully_shard(self.second, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


class Part(nn.Module):
    """A stage under the name that it has in the whole."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def run_container(windows: range, seed: int, load: bool = False) -> Any:
    model = Stages(seed)
    container = Container([Part("first", model.first), Part("second", model.second)])
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step) for opt in container.own
    ]
    folder = f"{os.environ['FOLDER']}/container"
    if load:
        state = {"model": get_model_state_dict(model), "optimizer": container}
        dcp.load(state, checkpoint_id=folder)
        for _ in range(windows.start):
            for scheduler in schedulers:
                scheduler.step()
    for window in windows:
        container.zero_grad()
        for i in range(N):
            (loss_of(model, x_of(0, window, i, model)) / N).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        container.step()
        for scheduler in schedulers:
            scheduler.step()
        if window == 2:
            state = {"model": get_model_state_dict(model), "optimizer": container}
            dcp.save(state, checkpoint_id=folder)
    return [p for opt in container.own for p in precise(opt)]


def container(how: str) -> Report:
    """ "saved", or "loaded" by another number of processes: how far it ends from the first run."""
    path = f"{os.environ['FOLDER']}/container.pt"
    if how == "saved":
        torch.save(run_container(range(5), 0), path)
        return {}
    ended = run_container(range(3, 5), 1, load=True)
    return {"off": off(ended, torch.load(path))}


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
