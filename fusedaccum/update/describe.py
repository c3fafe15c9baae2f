"""What `repr` says: which path each param group takes, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .. import backends
from ..backends import Keep
from ..options import Options
from ..rules import registry
from .updater import Updater


def describe(updater: Updater, options: Options, more: Sequence[str] = ()) -> str:
    """A few lines for people; `more` come last."""
    backend, max_grad_norm = options.backend, options.max_grad_norm
    inner, collector = updater.optimizer, updater.collector
    if gone := collector.attached.gone:
        return f"FusedAccumOptimizer({type(inner).__name__})\n  {gone.partition(';')[0]}"
    window = collector.window
    device = next(p.device for g in inner.param_groups for p in g["params"])
    chosen, because = backends.why(backend, device)
    owner = (
        "owned by the loop (every step() updates with the sum)"
        if window.steps is None
        else f"{window.steps} micro-batches ({window.micro_batches} in the open one)"
    )
    clip = "none" if max_grad_norm is None else f"{max_grad_norm:g}"
    lines = [
        f"FusedAccumOptimizer({type(inner).__name__})",
        f"  window: {owner}",
        f"  backend: {chosen} ({because})",
        f"  max_grad_norm: {clip}; non-finite windows are "
        + ("skipped" if options.skip_nonfinite else "applied"),
    ]
    for index, group in enumerate(inner.param_groups):
        params = _params(group["params"], updater)
        lines.append(f"  group {index}: {path_of(updater, group)}; {params}")
    return "\n".join([*lines, *more])


def path_of(updater: Updater, group: dict[str, Any]) -> str:
    """Which step a param group takes, and why."""
    rule = registry.select(updater.optimizer, group)
    if rule is None:
        return f"native step on fp32 gradients ({registry.reason(updater.optimizer)})"
    if not updater.is_fused:
        return "native step, because another param group has no fused rule"
    return f"fused rule {rule.name!r}"


def _params(params: list[Any], updater: Updater) -> str:
    """Counts by dtype and how their precise values are kept."""
    kinds: Counter[str] = Counter()
    fused = updater.is_fused
    numel = 0
    for param in params:
        numel += param.numel()
        dtype = str(param.dtype).removeprefix("torch.")
        slot = updater.collector.slots.get(param)
        if slot is None or not param.requires_grad:
            kinds[f"{dtype} (frozen)"] += 1
            continue
        master = updater.masters[slot]
        keep = master.keep if fused or not master.is_kept else Keep.FP32
        if master.is_kept:
            dtype += f" with {keep.value} master"
        elif keep is Keep.STOCHASTIC:
            dtype += " rounded stochastically"
        kinds[dtype] += 1
    listing = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"{counted(len(params), 'tensor')}, {counted(numel, 'parameter')}: {listing}"


def counted(n: int, noun: str) -> str:
    """A number of things, for people."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
