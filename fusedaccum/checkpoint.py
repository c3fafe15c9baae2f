"""State dicts: the wrapped optimizer's own format, plus one key.

`state_dict()["fusedaccum"]` holds what plain torch has no place for: the open window with its
accumulators, and step counts of optimizers that keep none. Masters are saved as fp32
`master_param` beside a parameter's other states, whatever the layout inside, so that a checkpoint
outlives the layout. Plain torch ignores both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .collect import Collector
from .frameworks import refuse_second_count
from .segments import Segment
from .update import Updater

VERSION = 1
KEY = "fusedaccum"
MASTER = "master_param"

StateDict = dict[str, Any]


def _indexed(optimizer: Optimizer, collector: Collector) -> dict[int, Segment]:
    """Segments by torch's index of their parameter in a state dict."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: s for i, p in enumerate(params) if (s := collector.segments.get(p)) is not None}


@torch.no_grad()
def save(inner: StateDict, updater: Updater) -> StateDict:
    """Add to the wrapped optimizer's state dict what the wrapper knows.

    Args:
        inner: `optimizer.state_dict()` of the wrapped optimizer; not changed.
        updater: the wrapper's.
    """
    collector, window = updater.collector, updater.collector.window
    collector.check()
    segments = _indexed(updater.optimizer, collector)
    # Some optimizers keep what belongs to no parameter under names of their own.
    state: dict[Any, Any] = {
        i: dict(entry) if isinstance(i, int) else entry for i, entry in inner["state"].items()
    }
    steps: dict[int, float] = {}
    for index, segment in segments.items():
        entry = state.get(index)
        precise = segment.precise()
        if precise is not None:
            state.setdefault(index, {})[MASTER] = precise
        for name in segment.numbers:
            if entry is not None:
                entry[name] = entry[name].detach().cpu()  # where torch keeps them by default
        if segment.step is not None and "step" not in segment.numbers:
            steps[index] = float(segment.step)
    overflow = collector.scaling.overflow
    extra: StateDict = {
        "version": VERSION,
        "gradient_accumulation_steps": window.steps,
        "window": {
            "micro_batches": window.micro_batches,
            "total": window.total,
            "reference": window.reference,
            "is_explicit": window.is_explicit,
            "overflow": 0.0 if overflow is None else float(overflow),
        },
        "accumulators": _open_accumulators(segments, collector),
        "steps": steps,
        "skipped_steps": 0 if updater.scalars is None else int(updater.scalars.skipped),
    }
    return {**inner, "state": state, KEY: extra}


def _open_accumulators(segments: dict[int, Segment], collector: Collector) -> dict[int, Tensor]:
    """The accumulators of a window that is still to be updated.

    Where the loop owns the window, `param.grad` may still show the last one, which it need not.
    """
    window = collector.window
    if window.steps is None and not window.micro_batches and not collector.has_arrivals:
        return {}
    return {
        i: s.grad
        for i, s in segments.items()
        if s.filled and s.grad is not None and (window.steps or s.param.grad is not None)
    }


def check(state_dict: StateDict, updater: Updater) -> None:
    """Refuse a checkpoint of something else, and a second count, before anything is changed.

    Raises:
        ValueError: naming the difference, or who counts.
    """
    optimizer, window = updater.optimizer, updater.collector.window
    refuse_second_count(window.steps)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"not an optimizer's state dict: it has no {key!r}")
    saved, here = state_dict["param_groups"], optimizer.param_groups
    if len(saved) != len(here):
        raise ValueError(f"the checkpoint has {len(saved)} param groups, the optimizer {len(here)}")
    for i, (theirs, ours) in enumerate(zip(saved, here, strict=True)):
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"param group {i} has {len(theirs['params'])} parameters in the checkpoint and "
                f"{len(ours['params'])} in the optimizer"
            )
    ids = [index for group in saved for index in group["params"]]
    params = [p for group in here for p in group["params"]]
    extra = state_dict.get(KEY, {})
    accumulators = extra.get("accumulators", {})
    for index, param in zip(ids, params, strict=True):
        entries = {**state_dict["state"].get(index, {}), "accumulator": accumulators.get(index)}
        for name, value in entries.items():
            is_scalar = not isinstance(value, Tensor) or value.dim() == 0
            elementwise = name in ("accumulator", MASTER) or name in _elementwise(updater)
            if elementwise and not is_scalar and value.shape != param.shape:
                raise ValueError(
                    f"{name} of parameter {index} has shape {tuple(value.shape)} in the "
                    f"checkpoint, the parameter has {tuple(param.shape)}"
                )
    if not extra:
        return
    if extra.get("version") != VERSION:
        raise ValueError(
            f"the checkpoint was written by version {extra.get('version')!r} of the format, this "
            f"fusedaccum reads version {VERSION}"
        )
    is_open = extra["window"]["micro_batches"] > 0 or accumulators
    if is_open and extra["gradient_accumulation_steps"] != window.steps:
        raise ValueError(
            "the checkpoint was saved inside a window of gradient_accumulation_steps="
            f"{extra['gradient_accumulation_steps']}, this optimizer has {window.steps}: construct "
            "it with the same number to finish that window"
        )


def _elementwise(updater: Updater) -> set[str]:
    """Names of the states that have the parameter's shape."""
    from . import rules

    names: set[str] = set()
    for group in updater.optimizer.param_groups:
        rule = rules.select(updater.optimizer, group)
        names.update(rule.states if rule else ())
    return names


@contextmanager
def _fp32_stand_ins(updater: Updater) -> Iterator[None]:
    """Show the wrapped optimizer fp32 parameters: loading rounds states to a parameter's dtype.

    Not those whose native step really runs in low precision.
    """
    optimizer, segments = updater.optimizer, updater.collector.segments
    is_fused = updater.is_fused
    originals = {
        torch.zeros((), device=s.device).expand(s.shape): s.param
        for s in segments.values()
        if s.dtype != torch.float32 and (is_fused or s.kind != "none")
    }
    stand_ins = {param: stand_in for stand_in, param in originals.items()}
    for group in optimizer.param_groups:
        group["params"] = [stand_ins.get(p, p) for p in group["params"]]
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["params"] = [originals.get(p, p) for p in group["params"]]
        for stand_in, param in originals.items():
            updater.has_own_states.add(segments[param])
            if stand_in in optimizer.state:
                optimizer.state[param] = optimizer.state.pop(stand_in)


@torch.no_grad()
def load(state_dict: StateDict, updater: Updater) -> None:
    """Take over a state dict of the wrapper, or of the plain optimizer. Call `check` first.

    torch casts states to the parameter's dtype as it loads; here they stay fp32.
    """
    optimizer, collector = updater.optimizer, updater.collector
    extra = state_dict.get(KEY, {})
    entries = state_dict["state"]
    plain = {
        **{k: v for k, v in state_dict.items() if k != KEY},
        "state": {
            i: {k: v for k, v in e.items() if k != MASTER} if isinstance(i, int) else e
            for i, e in entries.items()
        },
    }
    with _fp32_stand_ins(updater):
        optimizer.load_state_dict(plain)
    collector.discard()
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scalars = updater.prepared_scalars() if collector.segments else None
    accumulators = extra.get("accumulators", {})
    steps = extra.get("steps", {})
    is_weighted = bool(extra) and extra["window"]["micro_batches"] > 0
    for index, param in zip(ids, params, strict=True):
        param.grad = None
        segment = collector.segments.get(param)
        if segment is None or scalars is None:
            continue
        entry = entries.get(index, {})
        for name, value in entry.items():
            if name == MASTER:
                segment.loaded_master = value.to(param.device, torch.float32)
            elif optimizer.state[param].get(name) is value and type(value) is Tensor:
                optimizer.state[param][name] = value.clone()  # the caller's; a step would write it
        segment.states, segment.step = (), None
        scalars.steps[segment.row] = float(steps.get(index, 0.0))
        accumulated = accumulators.get(index)
        if accumulated is not None:
            segment.allocate()
            assert segment.grad is not None
            segment.acc.copy_(accumulated)
            segment.filled, segment.sums_version = True, None
            # Of the micro-batch that a loop with its own window never closes.
            segment.arrived = collector.window.steps is None and not is_weighted
            param.grad = segment.grad
    window = collector.window
    if extra:
        saved = extra["window"]
        window.micro_batches, window.total = saved["micro_batches"], saved["total"]
        window.reference, window.is_explicit = saved["reference"], saved["is_explicit"]
        collector.scaling.restore(saved.get("overflow", 0.0))
        if scalars is not None:
            scalars.skipped.fill_(extra["skipped_steps"])


@torch.no_grad()
def release_states(updater: Updater) -> None:
    """Give the wrapped optimizer states of its own, in the dtypes plain torch would have."""
    for param, segment in updater.collector.segments.items():
        entry = updater.optimizer.state.get(param, {})
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 0:
                entry[name] = value.detach().clone().cpu()
            elif value.is_floating_point():
                entry[name] = value.to(segment.dtype, copy=True)
