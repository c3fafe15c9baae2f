"""What test_sharded_serving.py runs in the processes of a group: gradients of shards that users or
FSDP2 itself keep back, write, and take away."""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fusedaccum import FusedAccumOptimizer
from fusedaccum.window.fsdp2 import fsdp2_groups
from tests.distributed.ddp_cases import (
    Micro,
    Report,
    batch,
    flat,
    is_same_everywhere,
    loss_of,
    mean_gradient_of,
    off,
    whole,
)
from tests.distributed.sharded_cases import Odd, sharded
from tests.distributed.sharded_serving_cases import N, adamw, build, precise, train, values, x_of
from tests.processes import message


def one_overflows(where: str) -> Report:
    """NaN on the last rank, in its shard's gradient or in everybody's."""
    model = build()
    opt = FusedAccumOptimizer(adamw(model), N, max_grad_norm=1.0)
    train(model, opt, range(1))
    before = values(model)
    last = dist.get_rank() == dist.get_world_size() - 1
    for i in range(N):
        x = x_of(dist.get_rank(), 1, i, model)
        if where == "data" and last and i == 0:
            x = x * torch.nan
        loss_of(model, x).backward()
        if where == "shard" and last and i == N - 1:
            grad: Any = next(iter(model.parameters())).grad
            grad._local_tensor[0] = torch.inf
        opt.step()
        opt.zero_grad()
    report: Report = {
        "unchanged": all(map(torch.equal, before, values(model))),
        "skipped": int(opt.skipped_steps),
    }
    train(model, opt, range(2, 3))
    report["went on"] = not all(map(torch.equal, before, values(model)))
    report["same"] = is_same_everywhere(values(model))
    return report


def hooks_of_users() -> Report:
    """A hook after the accumulation halves each fresh gradient, and another one comes after FSDP2's
    reduction: both go on as they did. What the first one writes is what FSDP2 has rounded."""
    results, seen = [], []
    for has_hook in (True, False):
        model = build(torch.bfloat16)
        if has_hook:
            for layer in model.layers:
                layer.set_all_reduce_hook(lambda flat: seen.append(flat.dtype))
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
        for i in range(N):
            loss_of(model, x_of(dist.get_rank(), 0, i, model)).backward()
            opt.step()
        factor = 1.0 if has_hook else 0.5
        results.append([whole(p.grad).double() * factor for p in model.parameters()])
    return {"off": off(*results), "seen": len(seen), "dtypes": {str(d) for d in seen}}


class Scatter:
    """A reduce-scatter of a user."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **more: Any) -> Any:
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, *args, **more)


def late_hooks(what: str) -> Report:
    """ "hook", or "scatter": a user sets it after the optimizer was made, which has one there."""
    results, seen, found = [], [], []
    for is_late in (True, False):
        model = build()
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
        if is_late and what == "hook":
            model.layers[1].set_all_reduce_hook(seen.append)
        elif is_late:
            model.layers[1].set_custom_reduce_scatter(Scatter())

        def train_window(model: Any = model, opt: Any = opt) -> None:
            for i in range(N):
                with opt.micro_batch(weight=1.0 + i + dist.get_rank()):
                    loss_of(model, x_of(dist.get_rank(), 0, i, model)).backward()
                opt.step()

        before = values(model)
        if is_late:
            found.append(message(train_window))
            found.append(all(map(torch.equal, before, values(model))))
            opt.zero_grad()
            seen.clear()
        train_window()
        results.append(values(model))
    return {"message": found[0], "unchanged": found[1], "off": off(*results), "seen": len(seen)}


def roots(how: str) -> Report:
    """ "plain", or "weighted": each layer is sharded for itself, beside one root for all."""
    results = []
    for is_each in (True, False):
        torch.manual_seed(0)
        model: Any = Odd().bfloat16()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in model.layers if is_each else [model]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
        for window in range(2):
            for i in range(N):
                with contextlib.ExitStack() as stack:
                    if how == "weighted":
                        stack.enter_context(opt.micro_batch(weight=1.0 + i + 2 * dist.get_rank()))
                    loss_of(model, x_of(dist.get_rank(), window, i, model)).backward()
                opt.step()
                opt.zero_grad()
        results.append(precise(opt))
    return {"off": off(*results)}


def raises() -> Report:
    """A backward raises half-way in every process, zero_grad() ends the window, and a run that had
    no such backward comes to the same."""

    def fail(_: Tensor) -> None:
        raise ValueError("the test's")

    def void(_: object) -> None:
        pass

    results = []
    for has_failed in (True, False):
        model = build()
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
        train(model, opt, range(1))
        if has_failed:
            before = values(model)
            layer = model.layers[1]
            handle = layer.register_forward_hook(lambda a, x, y: void(y.register_hook(fail)))
            failed = message(partial(train, model, opt, range(1, 2)))
            handle.remove()
            refused = message(opt.step)
            opt.zero_grad()
            unchanged = all(map(torch.equal, before, values(model)))
        train(model, opt, range(1, 3))
        results.append(values(model))
    report: Report = {"backward": failed, "step": refused, "unchanged": unchanged}
    return report | {"off": off(*results)}


def loop_goes_on() -> Report:
    """A loop that does not zero: sums go on, as in torch; zero_grad() of the model too."""
    model = build()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    seen = []
    for step in range(4):
        if step == 3:
            model.zero_grad()
        loss_of(model, x_of(dist.get_rank(), 0, 0, model)).backward()
        opt.step()
        seen.append(float(flat([whole(p.grad) for p in model.parameters()]).norm()))
    return {"ratios": [round(s / seen[0], 5) for s in seen]}


def by_hand() -> Report:
    """Gradients that are assigned, scaled, and taken away between backward and step."""
    model = build()
    params = list(model.parameters())
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    loss_of(model, x_of(dist.get_rank(), 0, 0, model)).backward()
    before, grads = values(model), [whole(p.grad).double() for p in params]
    params[0].grad = params[0].grad * 3  # type: ignore[operator]
    params[1].grad.mul_(2)  # type: ignore[union-attr]
    params[2].grad = None
    opt.step()
    moved = [b - a for b, a in zip(before, values(model), strict=True)]
    factors = [3.0, 2.0, 0.0] + [1.0] * (len(params) - 3)
    exact = [g * f for g, f in zip(grads, factors, strict=True)]
    return {"off": off(moved, exact)}


def counts_for_nothing() -> Report:
    """One process has no tokens in a micro-batch, and runs it, as the others wait for it."""
    weights = {(rank, i): 1e-6 if (rank, i) == (1, 0) else 100.0 for rank in (0, 1) for i in (0, 1)}
    torch.manual_seed(0)
    twin, model = Odd().double(), build()
    before = values(model)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), N)
    for i in range(N):
        weight = weights[dist.get_rank(), i]
        with opt.micro_batch(weight=weight):
            loss = loss_of(model, x_of(dist.get_rank(), 0, i, model))
            (0 * loss if weight < 1 else loss).backward()
        opt.step()
        opt.zero_grad()
    del weights[1, 0]
    micros: list[Micro] = [
        (1.0, lambda net, at=at: net(batch(at[0], 0, at[1]).double()).square().mean())  # type: ignore[misc]
        for at in weights
    ]
    moved = [b - a for b, a in zip(before, values(model), strict=True)]
    return {"off": off(moved, mean_gradient_of(twin, micros))}


def synchronises(how: str) -> Report:
    """ "gradient", or "reduce" (over copies), "-weighted": FSDP2 waits until the last one."""
    kind, _, weighted = how.partition("-")
    results = []
    for waits in (True, False):
        torch.manual_seed(0)
        model: Any = Odd()
        world = dist.get_world_size()
        shape = (2, world // 2) if kind == "reduce" else (world,)
        names = ("copies", "shards")[-len(shape) :]
        sharded(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
        for i in range(N):
            is_last = i == N - 1
            if waits and kind == "reduce":
                model.set_requires_all_reduce(is_last)
            elif waits:
                model.set_requires_gradient_sync(is_last)
            x = x_of(dist.get_rank(), 0, i, model)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if weighted:
                    with opt.micro_batch(weight=1.0 + i + 2 * dist.get_rank()):
                        loss_of(model, x).backward()
                else:
                    loss_of(model, x).backward()
                opt.step()
        results.append(values(model))
    return {"off": off(*results)}


def outside() -> Report:
    """FSDP2 reduces when the backward is over, as it does with manual finalization (torch 2.15)."""
    model: Any = build()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), N)
    before = values(model)
    if hasattr(model, "finalize_backward"):
        model.set_manual_backward_finalization(True)
    else:
        model.set_requires_gradient_sync(False)
    finalize = getattr(model, "finalize_backward", partial(_reduce, model))
    loss_of(model, x_of(dist.get_rank(), 0, 0, model)).backward()
    report: Report = {"reduced": message(finalize), "step": message(opt.step)}
    report["unchanged"] = all(map(torch.equal, before, values(model)))
    return report


def _reduce(model: Any) -> None:
    for module in model.modules():
        for group in fsdp2_groups(module) if isinstance(module, FSDPModule) else ():
            group.reduce_grads = True
            group.post_backward()


def held_back(how: str) -> Report:
    """What would lose a gradient that FSDP2 keeps back, or weigh it wrongly."""
    model = build()
    n = None if how == "loop" else N
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), n)
    before = values(model)

    def micro() -> None:
        loss_of(model, x_of(0, 0, 0, model)).backward()

    model.set_requires_gradient_sync(False)
    if how == "weighted":
        with opt.micro_batch(weight=3.0):
            micro()
    else:
        micro()
    if how == "plain":
        opt.step()  # closes a micro-batch
        micro()
    report: Report = {"saved": message(opt.state_dict)}
    report |= {"step": message(opt.step), "again": message(opt.step)}
    report["unchanged"] = all(map(torch.equal, before, values(model)))
    opt.zero_grad()
    model.set_requires_gradient_sync(True)
    for _ in range(n or 1):
        micro()
        opt.step()
    once = [b - a for b, a in zip(before, values(model), strict=True)]
    report["after"] = off(once, [0.05 * whole(p.grad).double() for p in model.parameters()])
    return report


def goes_back() -> Report:
    """After detach() FSDP2 reduces, rounds and assigns as it does for a model that we never had."""
    found = []
    for is_ours in (True, False):
        model = build(torch.bfloat16)
        if is_ours:
            opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), N)
            train(model, opt, range(1))
            opt.detach()
        loss_of(model, x_of(dist.get_rank(), 1, 0, model)).backward()
        found.append([p.grad for p in model.parameters()])
    ours, stock = ([whole(grad) for grad in grads] for grads in found)
    return {"same": all(map(torch.equal, ours, stock)), "dtypes": {str(g.dtype) for g in ours}}


def reduces_unused() -> Report:
    """A layer that one process does not use, where FSDP2 reduces zeros for it, in bf16."""
    found = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        model: Any = Odd().bfloat16()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        model.set_reduce_scatter_unused_params(True)
        params = list(model.parameters())
        opt = torch.optim.SGD(params, lr=0.0)
        if is_ours:
            opt = FusedAccumOptimizer(opt)
        layers = model.layers[: 2 + dist.get_rank()]
        model.forward = lambda x, layers=layers: [x := layer(x) for layer in layers][-1]
        loss_of(model, x_of(dist.get_rank(), 0, 0, model)).backward()
        found.append([whole(p.grad).double() for p in params[:6]])
    return {"same": all(map(torch.equal, *found))}


def other_grad_dtype() -> Report:
    """One parameter of a group is of a plain optimizer, and its gradient in fp32: ours are as
    precise as where it is not."""
    found = []
    for is_other in (True, False):
        torch.manual_seed(0)
        model: Any = Odd().bfloat16()
        if is_other:
            model.layers[0].bias.grad_dtype = torch.float32
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(model, mp_policy=policy)
        params = [p for name, p in model.named_parameters() if name != "layers.0.bias"]
        opt = FusedAccumOptimizer(torch.optim.SGD(params, lr=0.0), N)
        for i in range(N):
            loss_of(model, x_of(dist.get_rank(), 0, i, model)).backward()
            opt.step()
        found.append([whole(p.grad).double() for p in params])
    return {"same": all(map(torch.equal, *found))}
