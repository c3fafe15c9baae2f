"""What test_docs.py runs in the processes of a group: the code of the pages in docs/."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedaccum
from tests.distributed.ddp_cases import Report, is_same_everywhere, whole
from tests.processes import ROOT


class Model(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x.float(), y)


def blocks(page: str) -> dict[str, str]:
    """The Python code of a page, by the comment that each block begins with."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return dict(re.findall(r"```python\n# (.*?)\n(.*?)```", text, re.S))


def names(dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """What the page has and does not show; the data of this seed."""
    torch.manual_seed(0)
    model = Model()
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(2, 4, 8, generator=generator) for _ in range(20)]
    return {
        "torch": torch, "dist": dist, "fusedaccum": fusedaccum, "Path": Path, "model": model,
        "DistributedDataParallel": DistributedDataParallel, "device": torch.device("cpu"),
        "fully_shard": fully_shard, "MixedPrecisionPolicy": MixedPrecisionPolicy,
        "get_optimizer_state_dict": get_optimizer_state_dict,
        "loader": [(x.to(dtype), y) for x, y in data],
    }  # fmt: skip


def page(case: str) -> Report:
    """ "distributed.md/DDP": a block that trains."""
    name, block = case.split("/")
    dtype = torch.float16 if block == "fp16" else torch.bfloat16
    given = names(dtype, dist.get_rank())
    if block in ("DDP", "ZeRO-1", "process group"):
        given["model"] = given["model"].to(dtype)
    before = [p.detach().to(dtype, copy=True) for p in given["model"].parameters()]
    exec(compile(blocks(name)[block], name, "exec"), given)
    after = [whole(p.detach()) for p in given["model"].parameters()]
    opt: fusedaccum.FusedAccumOptimizer = given["opt"]
    return {
        "same": is_same_everywhere(after),
        "changed": [not torch.equal(a, b) for a, b in zip(before, after, strict=True)],
        "open": opt.micro_batches,
        "skipped": int(opt.skipped_steps),
    }


def universal() -> Report:
    """The block that reads a universal checkpoint, of AdamW in fp32 after three updates."""
    os.chdir(os.environ["FOLDER"])
    given = names(torch.float32, 0)
    source: Model = given["model"]
    adamw = torch.optim.AdamW(source.parameters(), lr=1e-2)
    for x, y in given["loader"][:3]:
        adamw.zero_grad()
        source(x, y).backward()
        adamw.step()
    for name, param in source.named_parameters():
        folder = Path("universal", "zero", name) if dist.get_rank() == 0 else Path("other", name)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"param": param.detach().clone()}, folder / "fp32.pt")
        for key in ("exp_avg", "exp_avg_sq") if param in adamw.state else ():
            # In one row, where DeepSpeed does not know the shape.
            torch.save({"param": adamw.state[param][key].flatten()}, folder / f"{key}.pt")
        if name.startswith("layers.0"):  # else it is what `updates` says
            torch.save(int(adamw.state[param]["step"]), folder / "step.pt")
    dist.barrier()
    model = Model().to(torch.bfloat16)
    opt = fusedaccum.FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    code = blocks("from_deepspeed.md")["checkpoint"].replace("updates=1000", "updates=3")
    exec(compile(code, "from_deepspeed.md", "exec"), given | {"model": model, "opt": opt})
    report: Report = {"off": [], "missing": 0}
    loaded = opt.state_dict()["state"]
    for i, (param, theirs) in enumerate(zip(model.parameters(), source.parameters(), strict=True)):
        entry, exact = loaded.get(i, {}), adamw.state.get(theirs, {})
        if not torch.equal(param, theirs.to(torch.bfloat16)):
            report["off"].append(f"parameter {i}")
        if not exact:
            report["missing"] += 1
        for key, value in {**exact, "master_param": theirs}.items():
            if key not in entry or not torch.equal(entry[key].float(), value.float()):
                report["off"].append(f"{key} of {i}")
    return report
