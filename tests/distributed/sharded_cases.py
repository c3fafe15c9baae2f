"""What test_sharded.py runs in the processes of a group: FSDP2 and tensor parallelism.

Every process knows the data of all, and adds up the micro-gradients of all in float64, as autograd
makes them for the whole model in the dtype that it computes in.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fusedaccum import FusedAccumOptimizer
from tests.distributed.ddp_cases import (
    DTYPES,
    Net,
    Report,
    batch,
    flat,
    is_same_everywhere,
    loss_of,
    masters,
    mean_gradient_of,
    off,
    whole,
)

RATE = 0.05


class Odd(nn.Module):
    """Layers of 5, 3, 7 and 1 rows: shards of unequal sizes, and empty ones."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (16, 5, 3, 7, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def sharded(model: nn.Module, mesh: Any, **options: Any) -> None:
    """fully_shard, a group for each layer."""
    layers = model.layers if isinstance(model, Odd) else [model.a, model.norm, model.b, model.extra]
    for layer in layers:
        if layer is not None:
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def build(options: dict[str, str], dtype: torch.dtype) -> tuple[nn.Module, nn.Module, int, int]:
    """A sharded model, the whole one, this process's place among those with data of their own, and
    how many there are."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = (Odd() if options.get("net") == "odd" else Net()).to(dtype)
    twin = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[options["compute"]] if "compute" in options else None,
        reduce_dtype=torch.float32,
    )
    mesh_of = options.get("mesh", "flat")
    if mesh_of == "flat":
        sharded(model, init_device_mesh("cpu", (world,)), mp_policy=policy)
        return model, twin, rank, world
    if mesh_of == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
        sharded(model, mesh, mp_policy=policy)
        return model, twin, rank, world
    n = world if mesh_of == "tp" else 2
    mesh = init_device_mesh("cpu", (world // n, n), mesh_dim_names=("data", "tp"))
    plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
    if mesh_of == "tp":
        model.norm = nn.Identity()
        twin.norm = nn.Identity()
    else:
        plan = {"b": ColwiseParallel(), "c": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    if mesh_of != "tp":
        sharded(model, mesh["data"], mp_policy=policy)
    return model, twin, rank // n, world // n


def reference(
    options: dict[str, str], model: nn.Module, twin: nn.Module
) -> Callable[[int, Sequence[Sequence[float]]], list[Tensor]]:
    """What gives the mean gradient of a window, in float64, of `model` as it is then."""
    n, dtype = int(options.get("n", 4)), DTYPES[options.get("dtype", "fp32")]
    compute = DTYPES[options["compute"]] if "compute" in options else dtype

    def micro(rank: int, window: int, i: int) -> Callable[[nn.Module], Tensor]:
        return lambda net: loss_of(net, batch(rank, window, i).to(compute))

    def mean(window: int, weights: Sequence[Sequence[float]]) -> list[Tensor]:
        net = twin
        if options.get("mesh") == "tp":  # adds up products in another order than the whole model
            net, _, _, _ = build(options, dtype)
        with torch.no_grad():
            for p, q in zip(net.parameters(), model.parameters(), strict=True):
                p.copy_(q if isinstance(p, DTensor) else whole(q))
        micros = [
            (w, micro(r, window, i)) for r, ws in enumerate(weights) for i, w in enumerate(ws)
        ]
        assert len(micros) == n * len(weights)
        return mean_gradient_of(copy.deepcopy(net).to(compute) if net is twin else net, micros)

    return mean


def train(case: str) -> Report:
    """ "key=value,...": three windows of one configuration.

    mesh: flat, hsdp, tp, both; dtype: of the parameters; compute: of forward and backward; net:
    "" or odd; n: micro-batches; owner: n or loop; weights: whether each has another; clip: the
    norm; by: whether the loop clips, with our method or with torch's; master: master_weights;
    moves: whether the model is converted there and back between windows.
    """
    options = dict(pair.split("=") for pair in case.split(","))
    dtype = DTYPES[options.get("dtype", "fp32")]
    model, twin, place, places = build(options, dtype)
    mean = reference(options, model, twin)
    n, owner, by = int(options.get("n", 4)), options.get("owner", "n"), options.get("by")
    clip = float(options["clip"]) if "clip" in options else None
    opt = FusedAccumOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5),
        n if owner == "n" else None,
        max_grad_norm=None if by else clip,
        master_weights=options.get("master"),
    )
    exact = torch.optim.SGD(
        [p.detach().double().requires_grad_() for p in twin.parameters()], lr=RATE, momentum=0.5
    )
    doubles = exact.param_groups[0]["params"]
    report: Report = {"gradient": [], "norm": [], "weights": [], "returned": []}
    for window in range(3):
        weights = [[1.0] * n for _ in range(places)]
        if "weights" in options:
            weights = [[float(1 + (3 * r + 5 * i) % 7) for i in range(n)] for r in range(places)]
        gradient = mean(window, weights)
        compute = DTYPES[options["compute"]] if "compute" in options else dtype
        for i in range(n):
            x = batch(place, window, i).to(compute)
            if "weights" in options:
                with opt.micro_batch(weight=weights[place][i]):
                    loss_of(model, x).backward()
            else:
                (loss_of(model, x) / (n if owner == "loop" else 1)).backward()
            if i == n - 1:
                shown = [whole(p.grad).double() for p in model.parameters()]
                if by is not None:
                    clipper = opt.clip_grad_norm_ if by == "ours" else torch_clip(model)
                    returned = float(whole(clipper(clip)))
                    norm = float(flat(gradient).norm())
                    report["returned"].append(abs(returned - norm) / norm)
            if owner == "n" or i == n - 1:
                opt.step()
        assert opt.window_closed
        norm = float(flat(gradient).norm())
        total = sum(map(sum, weights)) / len(weights)
        factor = (n if owner == "n" else 1) / total if "weights" in options else 1.0
        report["gradient"].append(off([g * factor for g in shown], gradient))
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        used = norm * factor if by == "torch" else norm  # it clips what p.grad shows
        report["norm"].append(abs(float(opt.grad_norm) - used) / used)
        for p, g in zip(doubles, gradient, strict=True):
            p.grad = g * factor
        exact.step()
        precise = [whole(m) for m in masters(opt)]
        report["weights"].append(off(precise, doubles))
        with torch.no_grad():
            for p, q in zip(doubles, precise, strict=True):
                p.copy_(q)
        if "moves" in options:
            model.to(torch.float64).to(dtype)
        opt.zero_grad()
    report["same"] = is_same_everywhere([whole(p) for p in model.parameters()])
    return report


def torch_clip(model: nn.Module) -> Callable[[float], Tensor]:
    return lambda clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
