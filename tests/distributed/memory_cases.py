"""What test_memory.py runs in the processes of a group: bytes that each engine keeps, counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.memory import footprint
from fusedaccum import FusedAccumOptimizer
from fusedaccum.bench.memory import Request, rows
from tests.distributed.ddp_cases import DTYPES, Report

# Of outputs that can be cut into 2 and 4, and that cannot be dealt out evenly.
WIDTHS = (256, 512, 128, 128, 1024)


def sizes() -> list[tuple[int, ...]]:
    return [(n_out, n_in) for n_in, n_out in pairwise(WIDTHS)]


def held(model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """Bytes of the memory that is reached from parameters and optimizer. FSDP2 frees what it has
    gathered by an operation that `footprint` does not see."""
    found = [*model.parameters(), *(p.grad for p in model.parameters())]
    found += [value for state in opt.state.values() for value in state.values()]
    if isinstance(opt, FusedAccumOptimizer):
        slots = opt._core.collector.slots.values()
        found += [flat for slot in slots for flat in slot.block._flats.values()]
    # Of a flat buffer, DTensors show parts as storages of their own: memory counts once.
    n_bytes = end = 0
    for start, size in sorted(ranges(found)):
        n_bytes += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return n_bytes


def ranges(tensors: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Address and bytes of what these processes hold of each."""
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def kept(case: str) -> Report:
    """ "fusedaccum-ddp-bf16": what all processes counted, and what the formula says."""
    form, engine, dtype = case.split("-")
    options: dict[str, Any] = {"shard_states": True} if engine == "zero1" else {}
    processes = dist.get_world_size()
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (processes,))

    def build() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        layers = [nn.Linear(size[1], size[0], bias=False) for size in sizes()]
        model: nn.Module = nn.Sequential(*layers).to(DTYPES[dtype])
        net = model
        if engine == "fsdp2":
            fully_shard(model, mesh=mesh)
        else:
            net = DistributedDataParallel(model)
        opt: torch.optim.Optimizer
        if form == "stock" and engine == "zero1":
            opt = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
        else:
            opt = torch.optim.AdamW(model.parameters())
        if form == "fusedaccum":
            opt = FusedAccumOptimizer(opt, 1, **options)
        return model, net, opt

    def use(built: tuple[nn.Module, nn.Module, torch.optim.Optimizer]) -> None:
        _, net, opt = built
        opt.zero_grad(set_to_none=False)  # not at the end: gradients are kept
        net(torch.ones(1, WIDTHS[0], dtype=DTYPES[dtype])).float().square().mean().backward()
        opt.step()

    if engine == "fsdp2":
        built = build()
        use(built)
        mine = held(built[0], built[2])
    else:
        # What ZeRO-1 broadcasts may live on in gloo's thread for a moment after it has arrived:
        # that is seen at some counts, and not kept.
        times = 3 if engine == "zero1" else 1
        mine = min(footprint(torch.device("cpu"), build, use)[1] for _ in range(times))
    counted: list[int] = [0] * processes
    dist.all_gather_object(counted, mine)
    request = Request(sizes(), dtype=DTYPES[dtype], processes=processes, engine=engine)
    names = {"bf16": "plain_bf16", "fp32": "fp32 and autocast"}
    name = "fusedaccum" if form == "fusedaccum" else names[dtype]
    (row,) = (r for r in rows(request) if r["form"] == name)
    return {"counted": counted, "row": row}
