"""Checks of every update rule with every way of keeping the parameter, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..backends import StepBatch, UpdateRequest, UpdateScalars, reference, rounding
from ..backends.compiled import compiler
from ..backends.compiled import engine as native
from ..backends.compiled import source as cgen
from ..kernels.layout import ScalarsRow
from ..rules.as_torch import as_torch
from ..rules.builtin import RULES
from ..rules.rule import Rule, sign
from . import checks
from .checks import Check, Memory, Runner, host, normal
from .sums import short

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Parameter dtype, and how its precise value is kept.
LAYOUTS = [(FP32, "none"), (BF16, "split"), (BF16, "fp32"), (BF16, "none"), (BF16, "stochastic")]
HALF_LAYOUTS = [(FP16, "fp32"), (FP16, "none")]
COEF = 0.7
# Hyper-parameters of two param groups, for every family. The rate is large, so that a wrong update
# stands out from the rounding of the parameter.
GROUP: dict[str, Any] = {
    "lr": 0.25, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.9,
    "decoupled_weight_decay": True, "momentum_decay": 0.02, "lr_decay": 0.1, "alpha": 0.75,
    "rho": 0.9, "lambd": 0.1, "t0": 3.0, "etas": (0.5, 1.2), "step_sizes": (1e-3, 2.0),
    "dampening": 0.3, "initial_accumulator_value": 0.5, "maximize": False,
}  # fmt: skip
OTHER = {
    "lr": 0.125, "decoupled_weight_decay": False, "maximize": True, "weight_decay": 0.2,
    "dampening": 0.0,
}  # fmt: skip
GROUPS = [GROUP, GROUP | OTHER]
# The numbers of the checked updates: the first, the second, and one in which RAdam's variance is
# tractable and ASGD averages.
UPDATES = (1, 2, 10)
KINDS = {
    "none": "",
    "split": " with split master",
    "fp32": " with fp32 master",
    "stochastic": " rounded stochastically",
}


def all_checks(backend: Runner, full: bool) -> Iterator[Check]:
    """Every rule with every layout, aligned, and with one layout unaligned; with `full` with every
    layout, fp16's as well."""
    layouts = [*LAYOUTS, *HALF_LAYOUTS] if full else LAYOUTS
    unaligned = cycle(LAYOUTS)
    for rule in RULES.values():
        for dtype, master in layouts:
            yield check(backend, rule, dtype, master, 0)
        for dtype, master in layouts if full else [next(unaligned)]:
            yield check(backend, rule, dtype, master, 1)


def compile_ahead(full: bool) -> None:
    """Have the CPU's loops compiled, on all cores; what fails is found by the checks."""

    def load(source: str) -> None:
        with suppress(compiler.CompilerMissing):
            native.load(source)

    layouts = [*LAYOUTS, *HALF_LAYOUTS] if full else LAYOUTS
    sources = [cgen.step_source(rule, *layout) for rule in RULES.values() for layout in layouts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, sources))


def check(backend: Runner, rule: Rule, dtype: torch.dtype, master: str, offset: int) -> Check:
    """Three updates of tensors of all sizes in two param groups."""

    def run() -> None:
        memory = Memory(backend.device, offset)
        batch = make_batch(memory, rule, dtype, master)
        n_memory = len(rule.family.memory)
        scalars = UpdateScalars(len(batch.params), rule.family.n_scalars, backend.device, n_memory)
        for row, group in zip(batch.rows, batch.groups, strict=True):
            for i, (_, start) in enumerate(rule.family.memory):
                scalars.memory[row, i] = float(start(GROUPS[group]))
        for update in UPDATES:
            scalars.steps.fill_(update - 1)
            for row, acc in enumerate(batch.accs):
                acc.copy_(normal(checks.SIZES[row], 10 + update))
            _one_update(backend, batch, scalars, update)
        memory.check()

    name = f"step {rule.name}, {short(dtype)}{KINDS[master]}"
    return Check(name + (", unaligned" if offset else ""), run)


def make_batch(memory: Memory, rule: Rule, dtype: torch.dtype, master: str) -> StepBatch:
    """Parameters, masters, accumulators and states of all sizes."""
    batch = StepBatch(rule, master)
    for row, n in enumerate(checks.SIZES):
        group = row % len(GROUPS)
        batch.params.append(memory.holding(normal(n, 4), dtype, "parameter"))
        batch.accs.append(memory.empty(n, name="accumulator"))
        batch.states.append(
            tuple(
                memory.empty(n, name=f"state {name}").fill_(rule.start(name, GROUPS[group]))
                for name in rule.states
            )
        )
        batch.rows.append(row)
        batch.groups.append(group)
        if master == "split":
            low = (normal(n, 5) * 10_000).clamp(-32767, 32767)
            batch.masters.append(memory.holding(low, torch.int16, "remainder"))
        elif master == "fp32":
            # Not the rounded value itself, but one that rounds to it.
            exact = batch.params[-1].float().cpu() * (1 + 2.0**-14)
            batch.masters.append(memory.holding(exact, FP32, "master"))
        elif master == "stochastic":
            batch.keys.append(rounding.tensor_key(7, row))
    return batch


def precise(batch: StepBatch, i: int) -> Tensor:
    """The value of a parameter as precisely as it is kept, float64."""
    if batch.master == "split":
        return host(reference.join_master(batch.params[i], batch.masters[i]))
    return host(batch.masters[i] if batch.masters else batch.params[i])


def _one_update(backend: Runner, batch: StepBatch, scalars: UpdateScalars, update: int) -> None:
    rule = batch.rule
    before = [
        [precise(batch, i), host(batch.accs[i]), *(host(s) for s in batch.states[i])]
        for i in range(len(batch.params))
    ]
    memory = host(scalars.memory)
    accs = [acc.clone() for acc in batch.accs]
    hyper = [(sign(group), *rule.family.hyper(group)) for group in GROUPS]
    request = UpdateRequest(rule.family, hyper, None, COEF, None, True)
    backend.finalize(request, [batch], scalars)
    backend.step(batch, scalars)
    where = f"in update {update}"
    for g, row in enumerate(hyper):
        members = [i for i, group in enumerate(batch.groups) if group == g]
        numbers = [_require_scalars(rule, row, scalars, memory, i, update) for i in members]
        # The tensors of a group in one, which they are to a rule of elements.
        sizes = [before[i][0].numel() for i in members]
        joined = [torch.cat(tensors) for tensors in zip(*(before[i] for i in members), strict=True)]
        results = _bounds(rule, joined, COEF * row[0], numbers[0])
        parts = [[t.split(sizes) for t in pair] for pair in results]
        for k, i in enumerate(members):
            (expected, allowed), *states = ((new[k], bound[k]) for new, bound in parts)
            _require_param(batch, i, expected, allowed, update, where)
            for state, name, (new, bound) in zip(batch.states[i], rule.states, states, strict=True):
                checks.require_close(f"{where} state {name}", host(state), new, bound)
            checks.require_same(f"{where} accumulator", batch.accs[i], accs[i])


def _bounds(
    rule: Rule, inputs: list[Tensor], coef: float, scalars: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """New parameter and states by the reference, each with what it may be off by.

    A sum whose terms cancel, and a sign of such a sum, magnify the roundings before it. How much
    is measured: the reference is run again with each input off by a few roundings.
    """

    def run(param: Tensor, acc: Tensor, *states: Tensor) -> list[Tensor]:
        new, updated = getattr(as_torch(rule.family.kernels, torch.float64), rule.name)(
            param, acc * coef, states, scalars
        )
        return [new, *updated]

    results = run(*inputs)
    states = [inputs[0], *inputs[2:]]
    allowed = [
        checks.STEP_ROUNDINGS * checks.U * (new.abs() + old.abs() + (new - old).abs()) + checks.TINY
        for new, old in zip(results, states, strict=True)
    ]
    nudges = [(i, checks.INPUT_ROUNDINGS * checks.U) for i in range(len(inputs))]
    nudges.append((1, -checks.INPUT_ROUNDINGS * checks.U))  # over a change of sign, on both sides
    for i, nudge in nudges:
        nudged = list(inputs)
        nudged[i] = inputs[i] * (1 + nudge)
        for bound, new, other in zip(allowed, results, run(*nudged), strict=True):
            bound += (other - new).abs()
    return list(zip(results, allowed, strict=True))


def _require_scalars(
    rule: Rule,
    hyper: tuple[Any, ...],
    scalars: UpdateScalars,
    memory: Tensor,
    row: int,
    update: int,
) -> tuple[float, ...]:
    """The rule's scalars for a tensor by the reference, once the backend's agree."""
    function = getattr(as_torch(rule.family.kernels), f"{rule.family.name}_scalars")
    own, kept = function(hyper[1:], float(update), tuple(memory[row].tolist()))
    numbers = scalars.scalars[row].tolist()
    relative = checks.SCALAR_ROUNDINGS * checks.U
    wanted = (COEF * hyper[0], float(update), *own)
    for i, (got, expected) in enumerate(zip(numbers, wanted, strict=True)):
        name = (
            ("gradient coefficient", "step count")[i]
            if i < ScalarsRow.OWN
            else f"scalar {i - ScalarsRow.OWN}"
        )
        checks.require_number(f"in update {update} {name}", got, expected, relative)
    for (name, _), got, expected in zip(
        rule.family.memory, scalars.memory[row].tolist(), kept, strict=True
    ):
        checks.require_number(f"in update {update} {name}", got, expected, relative)
    return tuple(own)


def _require_param(
    batch: StepBatch, i: int, expected: Tensor, allowed: Tensor, update: int, where: str
) -> None:
    """The parameter, and what keeps it precise, are what this layout makes of `expected`."""
    param = batch.params[i]
    if batch.master in ("split", "fp32"):
        checks.require_close(f"{where} master", precise(batch, i), expected, allowed)
        if batch.master == "split":
            high, low = reference.split_master(precise(batch, i).float())
            checks.require_same(f"{where} parameter", param, high)
            checks.require_same(f"{where} remainder", batch.masters[i], low)
        else:
            rounded = batch.masters[i].cpu().to(param.dtype)
            checks.require_same(f"{where} parameter", param, rounded)
        return
    store = _rounding(batch, i, update)
    low_end, high_end = store(expected - allowed), store(expected + allowed)
    checks.require_between(f"{where} parameter", host(param), low_end, high_end)


def _rounding(batch: StepBatch, i: int, update: int) -> Callable[[Tensor], Tensor]:
    """How a value becomes the parameter: a monotone function."""
    param = batch.params[i]
    if batch.master != "stochastic":
        return lambda value: value.float().to(param.dtype).double()
    n = param.numel()
    if n:
        random = rounding.random_bits(batch.keys[i], update, 0, n)
    else:
        random = torch.zeros(0, dtype=torch.int64, device="cpu")
    return lambda value: rounding.round_stochastic(value.float(), random).double()
