"""State dicts: the wrapped optimizer's own format, plus one key.

`state_dict()["fusedaccum"]` holds what plain torch has no place for: the open window with its
accumulators, and step counts of optimizers that keep none. Masters are saved as fp32
`master_param` beside a parameter's other states, whatever the layout inside, so that a checkpoint
outlives the layout. Plain torch ignores both.

torch.distributed.checkpoint takes "state" and "param_groups" alone. So an open window is beside a
parameter's states too (`window_*`), and its number of micro-batches always is: what is loaded into
another optimizer's state dict has that one's keys, and must not lose a window in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..rules import registry
from ..rules.rule import Rule
from ..update.updater import Updater
from ..window.collector import Collector
from ..window.saved import go_on, open_accumulators, places, window_numbers, zeros
from ..window.shards import is_sharded
from ..window.slots import PARAM_DTYPES, Fill, Slot
from ..window.watch import place
from . import load_hooks
from .entries import (
    IS_OPEN,
    KEY,
    MASTER,
    MICRO_BATCHES,
    VERSION,
    StateDict,
    entries_of,
    number,
    open_window,
    read_extra,
    without_gaps,
    without_ours,
)
from .frameworks import is_asked_for_keys, refuse_part, refuse_second_count
from .malformed import refuse_malformed, refuse_malformed_states


def _indexed(optimizer: Optimizer, collector: Collector) -> dict[int, Slot]:
    """Slots by torch's index of their parameter in a state dict."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: s for i, p in enumerate(params) if (s := collector.slots.get(p)) is not None}


@torch.no_grad()
def save(inner: StateDict, updater: Updater) -> StateDict:
    """Add to the wrapped optimizer's state dict what the wrapper knows.

    Args:
        inner: `optimizer.state_dict()` of the wrapped optimizer; not changed.
        updater: the wrapper's.
    """
    collector, window = updater.collector, updater.collector.window
    slots = _indexed(updater.optimizer, collector)
    is_part = not collector.attached.updates_all
    if is_part:
        refuse_part()
    state, all_keys = without_ours(inner), is_asked_for_keys()
    for index, slot in slots.items():
        if not all_keys and updater.states.is_unused(slot):
            state.pop(index, None)  # plain torch would take them for those of an update
    held, numbers = open_accumulators(collector), window_numbers(collector)
    zeroed = set() if held else zeros(collector)
    of_whom = places(collector, bool(window.is_explicit))[0]
    accumulators = {i: held[s.param] for i, s in slots.items() if s.param in held}
    is_open = bool(window.micro_batches or accumulators)
    steps: dict[int, float] = {}
    masters: dict[int, Tensor] = {}
    # Many an optimizer takes an entry for a complete one: plain torch would not load ours alone.
    may_window = slots if all_keys else {*state, *_may_lack_states(updater, True)}
    may_add = slots if all_keys else {*state, *_may_lack_states(updater, False)}
    for index, slot in slots.items():
        entry = state.get(index)
        precise = updater.masters[slot].precise()
        precise = None if precise is None else slot.shown(precise)
        if precise is not None and index in may_add:
            state.setdefault(index, {})[MASTER] = precise
        elif precise is not None:
            masters[index] = precise
        for name in updater.states[slot].numbers:
            if entry is not None and name in entry:
                entry[name] = entry[name].detach().cpu()  # where torch keeps them by default
        step = updater.states.step_of(slot, entry)
        if step is not None and "step" not in (entry or {}):
            steps[index] = step
        if index in accumulators and index in may_window:
            of_window = open_window(slot, numbers, window.steps, step, of_whom)
            state.setdefault(index, {}).update(of_window)
        if all_keys and not slot.is_own:
            state.setdefault(index, {})  # DCP asks for one of each parameter
        if index in state:
            state[index][MICRO_BATCHES] = number(window.micro_batches)
            state[index][IS_OPEN] = number(is_open)
    extra: StateDict = {
        "version": VERSION,
        "gradient_accumulation_steps": window.steps,
        "window": numbers,
        "accumulators": accumulators,
        "arrived": [i for i in accumulators if slots[i].fill is Fill.CURRENT],
        "zeros": [i for i, s in slots.items() if s.param in zeroed],
        "steps": steps,
        "masters": masters,
        "skipped_steps": updater.states.skipped,
        "updates": updater.record.updates,
    }
    extra["rank"], extra["world"] = place()
    extra["is_part"] = is_part
    return {**inner, "state": state, KEY: extra}


def _may_lack_states(updater: Updater, surely: bool) -> set[int]:
    """Indices of the parameters for which the wrapped optimizer keeps no states: its rule has none,
    or, where that need not be sure, it has no rule and none after its own step()."""
    found: set[int] = set()
    start = 0
    slots, keeps_none = updater.collector.slots, updater.wrapped.keeps_none
    for group in updater.optimizer.param_groups:
        rule = registry.select(updater.optimizer, group)
        lacks = rule and not (rule.states or rule.family.memory or rule.family.step_key)
        for index, param in enumerate(group["params"], start):
            if lacks or (rule is None and not surely and slots.get(param) in keeps_none):
                found.add(index)
        start += len(group["params"])
    return found


def with_window_of(state_dict: StateDict, own: StateDict) -> StateDict:
    """A state dict of another process, with the open window of this one's."""
    names = (
        "gradient_accumulation_steps", "window", "accumulators", "arrived", "zeros", "rank",
        "world",
    )  # fmt: skip
    return {**state_dict, KEY: {**state_dict[KEY], **{name: own[KEY][name] for name in names}}}


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
    state_dict = without_gaps(state_dict)
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
    extra = read_extra(state_dict)
    if extra.get("version", VERSION) != VERSION:
        raise ValueError(
            f"the checkpoint was written by version {extra['version']!r} of the format, this "
            f"fusedaccum reads version {VERSION}"
        )
    is_lost = "lost" in extra and "accumulators" not in extra
    if extra and not is_lost:
        refuse_malformed(extra, set(ids))
    accumulators, masters = extra.get("accumulators", {}), extra.get("masters", {})
    elementwise = _elementwise(updater)
    known_steps = extra.get("steps", {})
    rules: list[Rule | None] = []
    for group in here:
        rules += [registry.select(optimizer, group)] * len(group["params"])
    for index, param, rule in zip(ids, params, rules, strict=True):
        entry = state_dict["state"].get(index, {})
        step_key = rule.family.step_key if rule else None
        names = {MASTER, *(elementwise if rule else ())}
        refuse_malformed_states(index, entry, names, step_key, index in known_steps)
        entries = {**entry, "accumulator": accumulators.get(index)}
        entries.setdefault(MASTER, masters.get(index))
        for name, value in entries.items():
            is_ours = name in ("accumulator", MASTER)
            if not isinstance(value, Tensor) or not (is_ours or name in elementwise):
                continue
            if value.shape != param.shape and (is_ours or value.dim()):
                raise ValueError(
                    f"{name} of parameter {index} has shape {tuple(value.shape)} in the "
                    f"checkpoint, the parameter has {tuple(param.shape)}"
                )
    if is_lost:
        raise ValueError(
            f"the checkpoint was saved inside a window of {extra['lost']} micro-batches, but their "
            "gradients were not loaded: torch.distributed.checkpoint loads what the state dict it "
            "is given has. Save between windows (window_closed), or load without a template"
        )
    if not extra:
        return
    is_open = extra["window"]["micro_batches"] > 0 or accumulators
    rank, world = extra.get("rank", 0), extra.get("world", 1)
    is_part = extra.get("is_part", False)
    shares = not updater.collector.attached.updates_all
    is_elsewhere = (rank, world) != place() or (is_part and not shares)
    if KEY in state_dict and is_elsewhere and (is_part or _holds_shards(state_dict)):
        raise ValueError(
            f"the checkpoint holds the shards of rank {rank} of {world} processes, this is rank "
            f"{place()[0]} of {place()[1]}. Load a file per rank in as many ranks, with the same "
            "shard_states, or use torch.distributed.checkpoint, which deals shards out anew"
        )
    if KEY in state_dict and is_part:
        _refuse_other_deal(state_dict, dict(zip(ids, params, strict=True)), updater.collector)
    has_weights = bool(extra["window"].get("is_explicit"))
    if is_open and (rank, world) not in places(updater.collector, has_weights):
        own, of_all = place()
        raise ValueError(
            f"the checkpoint was saved inside a window by rank {rank} of {world} processes, this "
            f"is rank {own} of {of_all}: until the last micro-batch each process accumulates by "
            "itself. Save between windows (window_closed), or a file per rank for as many ranks"
        )
    if is_open and extra["gradient_accumulation_steps"] != window.steps:
        raise ValueError(
            "the checkpoint was saved inside a window of gradient_accumulation_steps="
            f"{extra['gradient_accumulation_steps']}, this optimizer has {window.steps}: construct "
            "it with the same number to finish that window"
        )


def _holds_shards(state_dict: StateDict) -> bool:
    entries = state_dict["state"].values()
    return any(is_sharded(v) for entry in entries if entry for v in entry.values())


def _elementwise(updater: Updater) -> set[str]:
    """Names of the states that have the parameter's shape."""
    names: set[str] = set()
    for group in updater.optimizer.param_groups:
        rule = registry.select(updater.optimizer, group)
        names.update(rule.states if rule else ())
    return names


def _fp32_stand_ins(updater: Updater) -> dict[Tensor, Tensor]:
    """An fp32 tensor for each parameter: loading rounds states to a parameter's dtype.

    Not for those whose own step really runs in low precision.
    """
    is_fused = updater.is_fused
    return {
        s.param: torch.zeros((), dtype=torch.float32, device=s.device).expand(s.shape)
        for s in updater.collector.slots.values()
        if s.dtype != torch.float32 and (is_fused or updater.masters[s].is_kept)
    }


def _refuse_other_deal(
    state_dict: StateDict, params: Mapping[Any, Tensor], collector: Collector
) -> None:
    """Raise where the file of this process has states that another one keeps here, or none.

    Args:
        state_dict: of shared-out states.
        params: all parameters, by index.
        collector: has the slots of those that are dealt out.
    """
    for index, entry in entries_of(state_dict):
        slot = collector.slots.get(params[index])
        if entry and (slot is None or not slot.is_own):
            now = "is frozen here" if slot is None else "another process updates here"
            raise ValueError(
                f"the checkpoint has this process's states of parameter {index}, of shape "
                f"{tuple(params[index].shape)}, which {now}: shard_states=True deals parameters "
                "out as they come. Freeze, unfreeze and add them in the order of the "
                "run that saved, and load then; or use torch.distributed.checkpoint, which deals "
                "states out anew"
            )


def _attach_frozen(known: Set[Any], params: Mapping[Any, Tensor], collector: Collector) -> None:
    """Give parameters that are frozen now a place for what the checkpoint has of them.

    Args:
        known: torch's indices of the parameters that it has something of.
        params: all parameters, by index.
        collector: where the places are.
    """
    collector.attach(
        (f"parameter {index}", param)
        for index, param in params.items()
        if index in known and param not in collector.slots and param.dtype in PARAM_DTYPES
    )


@torch.no_grad()
def load(state_dict: StateDict, updater: Updater) -> None:
    """Take over a state dict of the wrapper, or of the plain optimizer. Call `check` first.

    torch casts states to the parameter's dtype as it loads; here they stay fp32.
    """
    optimizer, collector = updater.optimizer, updater.collector
    state_dict = without_gaps(state_dict)
    extra = read_extra(state_dict)
    entries = state_dict["state"]
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    known = {index for index, entry in entries_of(state_dict) if entry}
    _attach_frozen(
        known.union(*(extra.get(name, ()) for name in ("accumulators", "masters", "zeros"))),
        dict(zip(ids, params, strict=True)),
        collector,
    )
    plain = {k: v for k, v in state_dict.items() if k != KEY}
    plain["state"] = without_ours(state_dict)
    stand_ins = _fp32_stand_ins(updater)
    with load_hooks.without(optimizer), updater.wrapped.swap.of(stand_ins, with_states=False):
        optimizer.load_state_dict(plain)
    updater.wrapped.has_own_states = {
        collector.slots[param] for param in stand_ins if param in optimizer.state
    }
    updater.wrapped.keeps_none = set()
    updater.states.is_provisional = False
    collector.discard()
    accumulators = extra.get("accumulators", {})
    steps, masters = extra.get("steps", {}), extra.get("masters", {})
    is_weighted = bool(extra) and extra["window"]["micro_batches"] > 0
    # A checkpoint of before 0.1.0 does not tell what the open micro-batch has brought: there it is
    # the one that a loop with its own window never closes.
    unknown = list(accumulators) if collector.window.steps is None and not is_weighted else []
    arrived, in_zeros = set(extra.get("arrived", unknown)), set(extra.get("zeros", ()))
    going_on: dict[Tensor, tuple[Tensor, bool]] = {}
    zeroed: set[Tensor] = set()
    for index, param in zip(ids, params, strict=True):
        param.grad = None
        slot = collector.slots.get(param)
        if slot is None:
            continue
        entry = entries.get(index, {})
        if not slot.is_own:
            optimizer.state.pop(param, None)
            entry = {}
        master = entry.get(MASTER, masters.get(index)) if slot.is_own else None
        updater.masters[slot].restore(master)
        for name, value in entry.items():
            # It is the caller's, which a step would write, or a view of what `restore` writes.
            if optimizer.state[param].get(name) is value and (
                type(value) is Tensor or slot.shard is not None
            ):
                optimizer.state[param][name] = value.clone()
        updater.states.restore(slot, steps.get(index))
        accumulated = accumulators.get(index)
        if accumulated is not None:
            going_on[param] = accumulated, index in arrived
        elif index in in_zeros:
            zeroed.add(param)
    # A weight or a clip of a window that holds nothing means nothing where another one counts.
    is_same = extra.get("gradient_accumulation_steps") == collector.window.steps
    go_on(collector, going_on, zeroed, extra["window"] if extra and is_same else None)
    if extra:
        updater.states.scalars.skipped.fill_(extra.get("skipped_steps", 0))
        updater.record.updates = extra.get("updates", 0)  # older ones lack it
