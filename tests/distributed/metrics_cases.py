"""What test_metrics.py runs in the processes of a group: what people log, with each engine."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import Report


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Own(torch.optim.SGD):
    """A subclass has no fused rule."""


def logged(case: str) -> Report:
    """ "ddp-weights": metrics after two windows, the second of which is NaN in one process, and the
    lines of the log."""
    engine, window = case.split("-")
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(64, 64, bias=False)
    net, options = model, dict[str, Any]()
    if engine == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif engine == "group":
        options["process_group"] = dist.group.WORLD
    else:
        net = DistributedDataParallel(model)
        options["shard_states"] = engine == "zero1"
    kind = Own if window == "wrapped" else torch.optim.SGD
    if window == "scaler":
        options["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop = window == "loop"
    inner = kind(model.parameters(), lr=0.1)
    opt = FusedAccumOptimizer(inner, None if loop else 2, max_grad_norm=1.0, **options)
    rank, handler = dist.get_rank(), Lines()
    logger = logging.getLogger("fusedaccum")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found = []
    for i in range(4):
        x = torch.full((1, 64), torch.nan if i == 2 and rank else 1.0)
        loss = net(x).sum()
        if window == "weights":
            with opt.micro_batch(weight=1 + rank + 10 * i):
                loss.backward()
        elif window == "scaler":
            opt.grad_scaler.scale(loss).backward()
        else:
            loss.backward()
        if window == "scaler":
            opt.grad_scaler.step(opt)
            opt.grad_scaler.update()
        elif not loop or i % 2:
            opt.step()
        if not loop or i % 2:
            opt.zero_grad()
        if i % 2:
            found.append({name: plain(value) for name, value in opt.metrics().items()})
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    return {"metrics": repr(found), "lines": handler.lines}


def plain(value: Tensor | float) -> Any:
    return value.item() if isinstance(value, Tensor) else value
