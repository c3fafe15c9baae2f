"""What test_shares.py runs in the processes of a group: states shared out, each process's part."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import (
    DTYPES,
    Net,
    Report,
    batch,
    flat,
    is_same_everywhere,
    loss_of,
    off,
)
from tests.distributed.sharded_checkpoint_cases import both_of, load_both
from tests.processes import message

N = 2
KINDS: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.01),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
}


class Run:
    """A model and its optimizer, averaged by DDP's place taken or by process_group."""

    def __init__(
        self,
        dtype: str,
        kind: str = "adamw",
        engine: str = "ddp",
        shares: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net().to(DTYPES[dtype])
        if kind == "muon":
            for p in self.model.parameters():
                p.requires_grad_(p.dim() == 2)
        self.net: nn.Module = self.model
        if engine == "ddp":
            self.net = DistributedDataParallel(self.model)
        else:
            options["process_group"] = dist.group.WORLD
        inner = KINDS[kind]([p for p in self.model.parameters() if p.requires_grad])
        options = {"gradient_accumulation_steps": N, "max_grad_norm": 0.5} | options
        self.opt = FusedAccumOptimizer(inner, shard_states=shares, **options)

    def micro(self, window: int, i: int, rank: int | None = None) -> None:
        x = batch(dist.get_rank() if rank is None else rank, window, i)
        loss_of(self.net, x.to(next(self.model.parameters()).dtype)).backward()

    def train(self, windows: range, rank: int | None = None) -> None:
        for window in windows:
            for i in range(N):
                self.micro(window, i, rank)
                self.opt.step()
                self.opt.zero_grad()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def entries(opt: FusedAccumOptimizer) -> dict[str, Any]:
    """Tensors of the states that this process keeps, by parameter and name."""
    state = opt.state_dict()["state"]
    return {
        f"{i}.{name}": value
        for i, entry in state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor) and not name.startswith("window_")
    }


def everyones(found: dict[str, Any]) -> dict[str, Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    merged: dict[str, Any] = {}
    for part in parts:
        assert not set(merged) & set(part)  # each is kept once
        merged |= part
    return merged


def beside_all(case: str) -> Report:
    """ "adamw-bf16-ddp": shared out beside a run in which every process keeps all."""
    kind, dtype, engine = case.split("-")
    runs = [Run(dtype, kind, engine, shares) for shares in (True, False)]
    for run in runs:
        run.train(range(4))
    part, full = (run.opt for run in runs)
    mine, whole = everyones(entries(part)), entries(full)
    return {
        "weights": all(map(torch.equal, *(run.values() for run in runs))),
        "names": sorted(mine) == sorted(whole),
        "states": all(torch.equal(mine[name], whole[name]) for name in whole),
        "norm": float(part.grad_norm) == float(full.grad_norm),  # type: ignore[arg-type]
        "same": is_same_everywhere(runs[0].values()),
    }


def loops(how: str) -> Report:
    """A loop that owns the window; token weights; more processes than parameters; a frozen one that
    is unfrozen later."""
    options: dict[str, Any] = {"gradient_accumulation_steps": None if how == "loop" else N}
    runs = [Run("bf16", shares=shares, **options) for shares in (True, False)]
    for run in runs:
        if how == "few":
            run.opt.detach() if not run.opt.state else None
            run.model, run.net = (net := nn.Linear(16, 16, bias=False).bfloat16()), net
            nn.init.constant_(net.weight, 0.25)
            run.net = DistributedDataParallel(net)
            inner = torch.optim.AdamW(net.parameters(), lr=0.01)
            shares = run is runs[0]
            run.opt = FusedAccumOptimizer(inner, N, 0.5, shard_states=shares)
        if how == "unfrozen":
            run.model.c.requires_grad_(False)
        for window in range(4):
            if how == "unfrozen" and window == 2:
                run.model.c.requires_grad_(True)
            for i in range(N):
                if how == "weights":
                    with run.opt.micro_batch(weight=1.0 + dist.get_rank() + 2 * i):
                        run.micro(window, i)
                else:
                    run.micro(window, i)
                if how != "loop" or i == N - 1:
                    run.opt.step()
                    run.opt.zero_grad()
    part, full = runs
    return {
        "weights": all(map(torch.equal, part.values(), full.values())),
        "same": is_same_everywhere(part.values()),
        "norm": float(part.opt.grad_norm) == float(full.opt.grad_norm),  # type: ignore[arg-type]
    }


def bytes_per_parameter(case: str) -> Report:
    """ "bf16-part", or "-all": what this process keeps, of parameters that can be dealt out evenly;
    DDP's own buckets aside."""
    dtype, shares = case.split("-")
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8))).to(DTYPES[dtype])
    net = DistributedDataParallel(model)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), shard_states=shares == "part")
    net(torch.randn(2, 64, dtype=DTYPES[dtype])).float().square().sum().backward()
    opt.step()
    slots = list(opt._core.collector.slots.values())
    flats = [t for slot in slots for t in slot.block._flats.values()]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flats}
    n_bytes = sum(kept.values()) + sum(slot.nbytes for slot in slots)
    return {"bytes": n_bytes / sum(slot.numel for slot in slots)}


def overflows(_: str) -> Report:
    """NaN in the data of the last process."""
    run = Run("bf16")
    run.train(range(1))
    before = run.values()
    for i in range(N):
        x = batch(dist.get_rank(), 1, i).bfloat16()
        if dist.get_rank() == dist.get_world_size() - 1:
            x = x * torch.nan
        loss_of(run.net, x).backward()
        run.opt.step()
        run.opt.zero_grad()
    report: Report = {
        "unchanged": all(map(torch.equal, before, run.values())),
        "skipped": int(run.opt.skipped_steps),
    }
    run.train(range(2, 3))
    report["went on"] = not all(map(torch.equal, before, run.values()))
    report["same"] = is_same_everywhere(run.values())
    return report


def refused() -> Report:
    model = Net()
    alone = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), shard_states=True)
    loss_of(model, batch(0, 0, 0)).backward()
    report: Report = {"alone": message(alone.step)}
    both = nn.ModuleList([Net(), Net()])
    net = DistributedDataParallel(both[0])
    opt = FusedAccumOptimizer(torch.optim.AdamW(both.parameters()), shard_states=True)
    report["part"] = message(loss_of(net, batch(0, 0, 0)).backward)
    del opt
    run = Run("bf16")
    run.train(range(1))
    report["detach"] = message(run.opt.detach)
    report["lbfgs"] = message(
        lambda: FusedAccumOptimizer(torch.optim.LBFGS(Net().parameters()), shard_states=True)
    )
    zero = ZeroRedundancyOptimizer(Net().parameters(), torch.optim.AdamW, lr=1e-2)
    report["zero"] = message(lambda: FusedAccumOptimizer(zero))
    full = StateDictOptions(full_state_dict=True)
    report["full"] = message(lambda: get_optimizer_state_dict(run.model, run.opt, options=full))
    other = Run("bf16", shares=False)
    into_all = message(lambda: other.opt.load_state_dict(run.opt.state_dict()))
    report["into all"] = str(into_all).replace(f"rank {dist.get_rank()} ", "rank R ")
    return report


# --- checkpoints ---


def _go_on(run: Run, is_open: bool) -> dict[str, Any]:
    if is_open:
        run.micro(3, 1, 0)
        run.opt.step()
        run.opt.zero_grad()
    run.train(range(4, 6), 0)
    return {"weights": run.values(), "states": everyones(entries(run.opt))}


def _apart(found: dict[str, Any], other: dict[str, Any]) -> float:
    assert sorted(found["states"]) == sorted(other["states"])
    names = sorted(found["states"])
    pairs = [[d["states"][n] for n in names] for d in (found, other)]
    return max(off(found["weights"], other["weights"]), off(*pairs))


def saved(form: str) -> Report:
    run = Run("bf16")
    run.train(range(3), 0)
    dcp.save(both_of(run.model, run.opt, form), checkpoint_id=f"{os.environ['FOLDER']}/{form}")
    ended = _go_on(run, False)
    if dist.get_rank() == 0:
        torch.save(ended, f"{os.environ['FOLDER']}/{form}.pt")
    dist.barrier()
    return {}


def loaded(case: str) -> Report:
    """ "nested-part": what `saved` wrote, loaded by as many processes as there are, which share
    states out, or keep "all"."""
    form, shares = case.split("-")
    torch.manual_seed(1)
    run = Run("bf16", shares=shares == "part")
    load_both(run.model, run.opt, form, f"{os.environ['FOLDER']}/{form}")
    run.train(range(4, 6), 0)
    found = {"weights": run.values(), "states": entries(run.opt)}
    if shares == "part":
        found["states"] = everyones(found["states"])
    return {"off": _apart(found, torch.load(f"{os.environ['FOLDER']}/{form}.pt"))}


def files(case: str) -> Report:
    """A file of each process, also in mid-window ("open"), loaded by itself or by another one."""
    window, whose = case.split("-")
    run = Run("bf16")
    run.train(range(3), 0)
    is_open = window == "open"
    if is_open:
        run.micro(3, 0, 0)
        run.opt.step()
        run.opt.zero_grad()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [run.opt.state_dict(), run.model.state_dict()])
    rank = dist.get_rank()
    source = rank if whose == "own" else (rank + 1) % dist.get_world_size()
    again = Run("bf16")
    again.model.load_state_dict(parts[source][1])
    if error := message(lambda: again.opt.load_state_dict(parts[source][0])):
        return {
            "error": error.replace(f"rank {source} ", "rank S ").replace(f"rank {rank} ", "rank R ")
        }
    return {"off": _apart(_go_on(again, is_open), _go_on(run, is_open))}


def dealt(case: str) -> Report:
    """A layer was "unfrozen" or "frozen" in mid-run. The file of each process is loaded by an
    optimizer that was made after that ("late"), or in the order of the run ("again")."""
    what, how = case.split("-")

    def made() -> Run:
        torch.manual_seed(0)
        run = Run.__new__(Run)
        run.model = Net()
        run.model.b.requires_grad_(what == "frozen")
        run.net = DistributedDataParallel(run.model)
        inner = torch.optim.AdamW(run.model.parameters(), lr=0.01)
        run.opt = FusedAccumOptimizer(inner, N, shard_states=True)
        return run

    def change(run: Run) -> None:
        run.model.b.requires_grad_(what == "unfrozen")

    run = made()
    run.train(range(2))
    change(run)
    run.train(range(2, 4))
    saved = run.opt.state_dict()
    again = made()
    again.model.load_state_dict(run.model.state_dict())
    if how == "again":
        if what == "unfrozen":
            change(again)
        again.opt.load_state_dict(saved)
        change(again)
    else:
        change(again)
        inner = torch.optim.AdamW(again.model.parameters(), lr=0.01)
        again.opt.detach()
        again.opt = FusedAccumOptimizer(inner, N, shard_states=True)
        if error := message(lambda: again.opt.load_state_dict(saved)):
            return {"is refused": "deals parameters out as they come" in error}
    for each in (run, again):
        each.train(range(4, 6))
    return {"same": all(map(torch.equal, run.values(), again.values()))}


def from_all(_: str) -> Report:
    """The state dict of a run in which every process keeps all, and of plain torch."""
    full = Run("bf16", shares=False)
    full.train(range(3))
    part = Run("bf16")
    part.model.load_state_dict(full.model.state_dict())
    part.opt.load_state_dict(full.opt.state_dict())
    for run in (full, part):
        run.train(range(3, 5))
    mine, whole = everyones(entries(part.opt)), entries(full.opt)
    return {
        "weights": all(map(torch.equal, full.values(), part.values())),
        "states": float((flat(list(mine.values())) * 0).sum()) == 0.0
        and all(torch.equal(mine[name], whole[name]) for name in whole),
    }
